"""The Triton kernels of the cross-entropies against formulas in float64, called as the operators call them."""

from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from triton_checks import DEVICE, HALF, NAN, error, ordered_accesses, running, shuffled_programs

INF = float("inf")
IGNORED = -7


def results_for(input, need_grad=True):
    """Memory for a loss and a gradient, NaN."""
    loss = torch.full(input.shape[:1], NAN, device=DEVICE)
    return loss, torch.full(input.shape, NAN, dtype=input.dtype, device=DEVICE) if need_grad else None


def run(input, a, b, lam, smoothing=0.0, total_weight=None, need_grad=True, scale=0.0):
    """Loss (N,) and gradient (N,C) of two classes a row."""
    from mixfeat.kernels.triton.cross_entropy import count, cross_entropy

    loss, grad = results_for(input, need_grad)
    counts = count(a, b, IGNORED) if total_weight is not None and len(input) else None
    cross_entropy(input, a, b, lam, smoothing, scale, IGNORED, total_weight, loss, None, grad, counts=counts)
    return loss, grad


def run_dense(input, target, weight=1.0, smoothing=0.0, need_grad=True):
    """Loss (N,) and gradient (N,C) for probabilities."""
    from mixfeat.kernels.triton.cross_entropy import soft_target_cross_entropy

    loss, grad = results_for(input, need_grad)
    soft_target_cross_entropy(input, target, weight, smoothing, loss, grad)
    return loss, grad


def expected(input, a, b, lam, smoothing=0.0, total_weight=None, dtype=torch.float64, scale=0.0, factor=1, h=0):
    """The same from PyTorch; the gradient is that of factor * loss + h * logsumexp."""
    x, lam = input.detach().to(dtype).requires_grad_(), lam.to(dtype)
    lse = x.logsumexp(1)
    loss = sum(
        w
        * (F.cross_entropy(x, y, reduction="none", label_smoothing=smoothing, ignore_index=IGNORED)
           + (scale * lse.square()).where(y != IGNORED, 0))
        * (1 if total_weight is None else total_weight / (y != IGNORED).sum())
        for y, w in ((a, lam), (b, 1 - lam))
    )  # fmt: skip
    return loss.detach(), *torch.autograd.grad((factor * loss + h * lse).sum(), x)


def expected_dense(input, target, weight=1.0, smoothing=0.0, dtype=torch.float64):
    x = input.detach().to(dtype).requires_grad_()
    loss = weight * F.cross_entropy(x, target.to(dtype), reduction="none", label_smoothing=smoothing)
    return loss.detach(), *torch.autograd.grad(loss.sum(), x)


def problem(samples, classes, dtype=torch.float32):
    """Random logits, two classes a row, which are the same in some rows, and lam."""
    x = (3 * torch.randn(samples, classes, device=DEVICE)).to(dtype)
    a, b = torch.randint(classes, (2, samples), device=DEVICE)
    b[::3] = a[::3]
    return x, a, b, torch.rand(samples, device=DEVICE)


def probabilities(samples, classes, dtype=torch.float32):
    return torch.randn(samples, classes, device=DEVICE).softmax(1).to(dtype)


def compare(results, truth, plain):
    """float32 to 1e-5 of the truth, a gradient in half precision to twice the error of plain PyTorch."""
    (loss, grad), (true_loss, true_grad) = results, truth
    assert error(loss, true_loss) <= 1e-5
    assert error(grad, true_grad) <= (
        1e-5 if grad.dtype == torch.float32 else 2 * error(plain(grad.dtype)[1], true_grad)
    )


def check_classes(samples, classes, dtype, smoothing):
    arguments = (*problem(samples, classes, dtype), smoothing)
    results = run(*arguments)
    compare(results, expected(*arguments), lambda dtype: expected(*arguments, dtype=dtype))
    assert torch.equal(run(*arguments, need_grad=False)[0], results[0])


def check_mean(samples, classes, total_weight, one):
    """Targets that are ignored do not count; without any that are not, every loss is NaN."""
    x, a, b, lam = problem(samples, classes)
    lam = lam[0] if one else lam
    a[torch.rand(samples, device=DEVICE) < 0.2] = IGNORED
    b[torch.rand(samples, device=DEVICE) < 0.7] = IGNORED
    a[0], b[-1] = 0, 1
    arguments = (x, a, b, lam, 0.1, total_weight)
    compare(run(*arguments), expected(*arguments), None)
    for target in (a, b):
        target[:] = IGNORED
        loss, grad = run(*arguments)
        assert loss.isnan().all()
        assert grad.isfinite().all()
    assert (grad == 0).all()


def check_lse(samples, classes, dtype, smoothing):
    """The logsumexp and its square in the loss; the gradient of both, scaled; rows that do not count have one too."""
    from mixfeat.kernels.triton.cross_entropy import count, cross_entropy

    x, a, b, lam = problem(samples, classes, dtype)
    a[1], b[1], a[2] = IGNORED, IGNORED, IGNORED
    counts = count(a, b, IGNORED)
    factor, h = torch.rand(samples, device=DEVICE), torch.randn(2 * samples, device=DEVICE)[::2]
    loss, grad = results_for(x)
    lse = torch.full_like(loss, NAN)
    arguments = x, a, b, lam, smoothing
    cross_entropy(*arguments, 0.1, IGNORED, 1.0, loss, lse, grad, counts=counts)
    wanted = partial(expected, *arguments, 1.0, scale=0.1)
    compare((loss, grad), wanted(), lambda dtype: wanted(dtype=dtype))
    assert error(lse, x.double().logsumexp(1)) <= 1e-6
    for f in (factor, factor[0]):
        grad.fill_(NAN)
        cross_entropy(*arguments, 0.1, IGNORED, 1.0, None, None, grad, f, h, counts)
        wanted = partial(expected, *arguments, 1.0, scale=0.1, factor=f.double(), h=h.double())
        compare((loss, grad), (loss.double(), wanted()[1]), lambda dtype, wanted=wanted: wanted(dtype=dtype))
    x[1] = NAN
    h[1] = 0
    cross_entropy(*arguments, 0.1, IGNORED, 1.0, loss, lse, grad, factor, h, counts)
    assert lse.isnan().tolist() == [n == 1 for n in range(samples)]
    assert loss[1] == 0
    assert (grad[1] == 0).all()


def check_counts_later(samples, classes, dtype, smoothing, ignored):
    """A mean in which all targets are assumed to count, and the gradient formed anew where not all do."""
    from mixfeat.kernels.triton import cross_entropy as kernels

    x, a, b, lam = problem(samples, classes, dtype)
    if ignored:
        a[torch.rand(samples, device=DEVICE) < 0.3] = IGNORED
        b[torch.rand(samples, device=DEVICE) < 0.6] = IGNORED
        a[0], b[-1] = 0, classes - 1
    _, grad = results_for(x)
    losses, loss = torch.full((2, samples), NAN, device=DEVICE), torch.full((), NAN, device=DEVICE)
    counts = torch.full((2,), -1, dtype=torch.int32, device=DEVICE)
    arguments = x, a, b, lam, smoothing, 0.1, IGNORED
    kernels.cross_entropy(*arguments, 1.0, losses, None, grad)
    kernels.mean(losses, a, b, IGNORED, samples, loss, counts)
    assert counts.tolist() == [(y != IGNORED).sum() for y in (a, b)]
    left = grad.clone()
    for factor in (1.0, 0.3):
        upstream = torch.full((), factor, device=DEVICE)
        kernels.cross_entropy(*arguments, 1.0, None, None, grad, upstream, counts=counts, written=2)
        if factor == 1 and not ignored:
            assert torch.equal(grad, left)
        wanted = partial(expected, x, a, b, lam, smoothing, 1.0, scale=0.1, factor=factor)
        true_loss, true_grad = wanted()
        compare((loss, grad), (true_loss.sum(), true_grad), lambda dtype, wanted=wanted: wanted(dtype=dtype))
    a[:] = IGNORED
    kernels.mean(losses, a, b, IGNORED, samples, loss, counts)
    assert loss.isnan()


def check_dense(samples, classes, dtype, target_dtype, smoothing):
    arguments = (problem(samples, classes, dtype)[0], probabilities(samples, classes, target_dtype), 0.3, smoothing)
    results = run_dense(*arguments)
    compare(results, expected_dense(*arguments), lambda dtype: expected_dense(*arguments, dtype=dtype))
    assert torch.equal(run_dense(*arguments, need_grad=False)[0], results[0])


def check_not_probabilities():
    """Dense targets of any sum, none at all too."""
    x, t = problem(6, 10)[0], torch.randn(6, 10, device=DEVICE)
    t[2] = 0
    compare(run_dense(x, t, 0.5, 0.2), expected_dense(x, t, 0.5, 0.2), None)


def check_blocks(classes, smoothing):
    """Rows of several blocks, the last of them not whole: blocks smaller than those that ship."""
    from mixfeat.kernels.triton import configs

    config = configs.CrossEntropyConfig(1, 128, 128, max_warps=1)
    with mock.patch.object(configs, "cross_entropy_config", return_value=config):
        check_classes(3, classes, torch.float32, smoothing)
        check_dense(3, classes, torch.float32, torch.float32, smoothing)
        check_far_from_zero(classes)
        check_not_finite(classes)


def check_far_from_zero(classes):
    """Logits whose exponentials no float holds, and which differ by less than their distance to 0."""
    x, *rest = problem(6, classes)
    for shift in (-1e4, 1e4):
        shifted = x + shift
        compare(run(shifted, *rest, 0.1), expected(shifted, *rest, 0.1), None)
        t = probabilities(6, classes)
        t /= t.double().sum(1, keepdim=True)
        compare(run_dense(shifted, t), expected_dense(shifted, t), None)
    for factor in (1e2, 1e4):
        compare(run(x * factor, *rest), expected(x * factor, *rest), None)


def check_not_finite(classes):
    """What is not finite shows where PyTorch shows it, in its own row alone; -inf does no harm where nothing counts."""
    x, a, b, lam = problem(8, classes)
    a[:], b[:] = 0, 1
    for row, value in enumerate((NAN, INF, -INF)):
        x[row, classes - 1] = value
    x[3, 0] = -INF
    x[4, 1], b[4] = -INF, IGNORED
    x[5] = -INF
    x[6, : classes - 1] = -INF
    loss, grad = run(x, a, b, lam)
    true_loss, true_grad = expected(x, a, b, lam)
    torch.testing.assert_close(loss.double(), true_loss, equal_nan=True, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), true_grad, equal_nan=True, rtol=1e-5, atol=1e-6)
    for smoothing in (0.0, 0.1):
        t = F.one_hot(a, classes).float()
        loss, grad = run_dense(x, t, 1.0, smoothing)
        true_loss, true_grad = expected_dense(x, t, 1.0, smoothing)
        torch.testing.assert_close(loss.double(), true_loss, equal_nan=True, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad.double(), true_grad, equal_nan=True, rtol=1e-5, atol=1e-6)


def check_target_out_of_range(target, classes, smoothing):
    """NaN in its row and in no other, wherever it is a target; nothing at all where it does not count."""
    x, a, b, lam = problem(5, classes)
    a[1], b[2] = target, target
    b[3], lam[3] = target, 1
    loss, grad = run(x, a, b, lam, smoothing)
    assert loss.isnan().tolist() == [False, True, True, False, False]
    assert grad.isnan().all(1).tolist() == grad.isnan().any(1).tolist() == loss.isnan().tolist()
    a[1], b[2], b[3] = 0, 0, 0
    true_loss, true_grad = expected(x, a, b, lam, smoothing)
    assert error(loss[[0, 3, 4]], true_loss[[0, 3, 4]]) <= 1e-5
    assert error(grad[[0, 3, 4]], true_grad[[0, 3, 4]]) <= 1e-5


def check_ignored(classes, smoothing):
    """Rows of no weight: 0 whatever their logits and targets are."""
    x, a, b, lam = problem(6, classes)
    ignored = [0, 2, 3, 5]
    a[ignored], b[ignored] = IGNORED, IGNORED
    b[2], lam[2] = 1, 1  # the weight of b is 0
    x[3], x[5, 0] = NAN, INF
    loss, grad = run(x, a, b, lam, smoothing)
    assert (loss[ignored] == 0).all()
    assert (grad[ignored] == 0).all()
    assert (loss[[1, 4]] > 0).all()


def check_strides(classes, dtype):
    """Results for tensors of any layout are those for their contiguous copies, up to rounding."""
    x, a, b, lam = problem(5, classes, dtype)
    t = probabilities(5, classes, dtype)
    memory = torch.empty(2**32 // dtype.itemsize * 2 + 2 * classes, dtype=dtype, device=DEVICE)
    far = memory.as_strided((3, classes), (2**32 // dtype.itemsize, 1))  # only the pages that are written take memory
    far.copy_(x[:3])
    layouts = [
        (x[:1].expand_as(x), t[:1].expand_as(t), a[:1].expand(5), lam[:1].expand(5)),
        (torch.cat([x, x], 1)[:, 1 : classes + 1], torch.cat([t, t[:, :1]], 1)[:, 1:], a.flip(0), lam[0]),
        (torch.cat([x, x], 1)[:, :classes], t, torch.stack([a, b], 1)[:, 0], torch.stack([lam, lam + 1], 1)[:, 0]),
        (far, t[:3], a[:3], lam[:3]),
    ]
    for x, t, a, lam in layouts:
        b = b[: len(a)]
        for results, same in (
            (run(x, a, b, lam, 0.1), run(x.contiguous(), a.contiguous(), b, lam.expand(len(a)).contiguous(), 0.1)),
            (run_dense(x, t), run_dense(x.contiguous(), t.contiguous())),
        ):
            for result, other in zip(results, same, strict=True):
                torch.testing.assert_close(result, other)


def check_grad_strides():
    """What lies between the rows of a gradient is not touched."""
    from mixfeat.kernels.triton.cross_entropy import cross_entropy

    arguments = problem(5, 10)
    loss, _ = results_for(arguments[0])
    memory = torch.full((5, 13), NAN, device=DEVICE)
    cross_entropy(*arguments, 0.0, 0.0, IGNORED, None, loss, None, memory[:, 1:11])
    assert error(memory[:, 1:11], expected(*arguments)[1]) <= 1e-5
    assert memory[:, [0, 11, 12]].isnan().all()


def check_ordered_accesses(samples, classes):
    """Rows beyond the last and classes beyond the last are masked where a kernel works in place."""
    from mixfeat.kernels.triton.cross_entropy import scale_

    with ordered_accesses():
        scale_(torch.randn(samples, classes), torch.rand(samples))


def check_repeats(samples, classes):
    """The same bits again, in any order of programs."""
    x, *rest = problem(samples, classes)
    target = torch.rand(samples, classes, device=DEVICE)
    first = *run(x, *rest, 0.1, total_weight=1.0), *run_dense(x, target, 1.0, 0.1)
    with shuffled_programs():
        second = *run(x, *rest, 0.1, total_weight=1.0), *run_dense(x, target, 1.0, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_scale(samples, classes, dtype, one):
    from mixfeat.kernels.triton.cross_entropy import scale_

    grad = torch.randn(samples, classes, device=DEVICE).to(dtype)
    factor = torch.rand(() if one else samples, device=DEVICE)
    if not one:
        factor[::2] = 1
    scaled = grad.clone()
    scale_(scaled, factor)
    assert torch.equal(scaled, (grad * (factor if one else factor[:, None])).to(dtype))
    scale_(scaled, factor.new_full((), NAN).expand_as(factor))
    assert scaled.isnan().all()
    scaled = grad.clone()
    scale_(scaled, torch.ones_like(factor))
    assert torch.equal(scaled, grad)


def check_empty(shape):
    x, *rest = (torch.empty(shape, device=DEVICE), *[torch.zeros(shape[0], dtype=torch.int64, device=DEVICE)] * 2)
    lam = torch.ones((), device=DEVICE)
    for loss, grad in (run(x, *rest, lam), run(x, *rest, lam, total_weight=1.0), run_dense(x, x)):
        assert (loss == 0).all()
        assert grad.shape == shape


# Classes: whole rows, several to a program (to 128) and one; rows of two blocks; lengths that are and are not aligned.
CLASSES = [1, 2, 10, 100, 127, 200, 1000, 1001, 17000]
CHECKS = {
    **{
        f"classes-{c}-{d}-{s}": partial(check_classes, 5 if c > 200 else 9, c, d, s)
        for c in CLASSES
        for d in (torch.float32, *(HALF if c in (10, 127, 1000) else ()))
        for s in (0.0, 0.1)
    },
    **{
        f"dense-{c}-{d}-{t}-{s}": partial(check_dense, 5 if c > 200 else 9, c, d, t, s)
        for c in CLASSES
        for d, t in [
            (torch.float32,) * 2,
            *([*zip(HALF, HALF, strict=True), (HALF[0], torch.float32)] if c in (10, 127, 1000) else ()),
        ]
        for s in (0.0, 0.1)
    },
    **{f"classes-50257-{d}": partial(check_classes, 3, 50257, d, 0.1) for d in (torch.float32, torch.bfloat16)},
    "dense-50257": partial(check_dense, 1, 50257, torch.float32, torch.float32, 0.1),
    **{
        f"mean-{n}-{weight}-{one}": partial(check_mean, n, classes, weight, one)
        for n, classes, weight, one in ((5, 10, 1.0, False), (5, 300, 5.0, True), (5000, 2, 1.0, True))
    },
    **{f"many-rows-{c}": partial(check_classes, n, c, torch.float32, 0.1) for n, c in ((1500, 1), (300, 5), (33, 60))},
    "not-probabilities": check_not_probabilities,
    **{f"blocks-{c}-{s}": partial(check_blocks, c, s) for c in (33, 64, 100) for s in (0.0, 0.1)},
    **{f"far-from-zero-{c}": partial(check_far_from_zero, c) for c in (10, 300)},
    **{f"not-finite-{c}": partial(check_not_finite, c) for c in (10, 300)},
    **{
        f"target-{t}-{c}-{s}": partial(check_target_out_of_range, t, c, s)
        for t in (-1, -6, 300, 2**32, 2**40, -(2**40))
        for c, s in ((10, 0.0), (300, 0.1))
    },
    **{f"ignored-{c}-{s}": partial(check_ignored, c, s) for c, s in ((10, 0.0), (10, 0.1), (300, 0.0))},
    **{f"strides-{c}-{d}": partial(check_strides, c, d) for c in (16, 200) for d in (torch.float32, torch.float16)},
    "grad-strides": check_grad_strides,
    **{
        f"counts-later-{n}-{c}-{ignored}": partial(check_counts_later, n, c, torch.float32, 0.1, ignored)
        for n, c in ((5, 10), (7, 300), (1500, 2))
        for ignored in (False, True)
    },
    "counts-later-bfloat16": partial(check_counts_later, 5, 10, torch.bfloat16, 0.0, True),
    "counts-later-blocks": partial(check_counts_later, 2, 17000, torch.float32, 0.0, True),
    **{f"lse-{c}-{s}": partial(check_lse, 5, c, torch.float32, s) for c, s in ((10, 0.0), (300, 0.1))},
    **{f"lse-{c}-{d}": partial(check_lse, 5, c, d, 0.1) for c, d in ((10, HALF[0]), (17000, torch.float32))},
    **{
        f"scale-{c}-{d}-{one}": partial(check_scale, 5, c, d, one)
        for c in (10, 300)
        for d in (torch.float32, *HALF)
        for one in (False, True)
    },
    **{f"empty-{shape}": partial(check_empty, shape) for shape in ((0, 3), (3, 0))},
    **{f"ordered-accesses-{c}": partial(check_ordered_accesses, 5, c) for c in (1, 10, 300) if DEVICE == "cpu"},
    **{f"repeats-{c}": partial(check_repeats, n, c) for n, c in ((300, 10), (5, 300))},
}


@pytest.fixture(scope="module")
def checks(request):
    with running(request) as checks:
        yield checks


@pytest.mark.triton
@pytest.mark.parametrize("name", CHECKS)
def test_kernel(checks, name):
    checks(name)
