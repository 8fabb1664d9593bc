"""The Triton kernels of patch_conv against the float64 reference, called as operators call them: see triton_checks."""

from functools import partial

import pytest
import torch
from triton_checks import DEVICE, HALF, NAN, poisoned, running, shuffled_programs

from mixfeat import reference
from mixfeat.activations import Identity, PolyReLU, Power, PowerReLU, ReLU


def run(grad, x, w, index, lam, activation, keep=False):
    """Logits and both gradients from the kernels, which keep the slopes or compute them again."""
    from mixfeat.kernels.triton import patch_conv

    arguments = (x, w, index, lam, activation.polynomial)
    with poisoned():
        slope = torch.empty(*x.shape[:3], w.shape[1] * w.shape[2], dtype=x.dtype, device=x.device) if keep else None
        logits = patch_conv.patch_conv(*arguments, slope=slope)
        grads = patch_conv.patch_conv_backward(grad, *arguments, input_grad=True, weight_grad=True, slope=slope)
    assert all(t.is_contiguous() and t.dtype == x.dtype for t in (logits, *grads))
    assert (logits.shape, grads[0].shape, grads[1].shape) == (grad.shape, x.shape, w.shape)
    return logits, *grads


def expected(grad, x, w, index, lam, activation, dtype=torch.float64):
    """The same from the reference."""
    x, w = x.detach().to(dtype).requires_grad_(), w.detach().to(dtype).requires_grad_()
    lam = None if lam is None else lam.to(dtype)
    logits = reference.patch_conv(x, w, activation, index=index, lam=lam)
    return logits.detach(), *torch.autograd.grad(logits, (x, w), grad.to(dtype))


def errors(results, truth):
    return [((r.double() - t).norm() / t.norm()).item() if t.norm() > 0 else r.double().norm().item()
            for r, t in zip(results, truth, strict=True)]  # fmt: skip


def random(*shape, scale=1.0, dtype=torch.float32):
    return (scale * torch.randn(shape, device=DEVICE)).to(dtype)


def problem(shape, activation, dtype=torch.float32, mix=None):
    """Random (grad, input, weight, index, lam, activation) of shape (B,N,P,D,C,M); mix None, "lam" (one) or "lams"."""
    runs, samples, patches, dim, classes, filters = shape
    x = random(runs, samples, patches, dim, dtype=dtype)
    w = random(runs, classes, filters, dim, scale=0.5 / max(dim, 1) ** 0.5, dtype=dtype)
    index = lam = None
    if mix:
        index = torch.randint(samples, (samples,), device=DEVICE)  # some samples serve twice, others never
        lam = torch.rand(() if mix == "lam" else samples, device=DEVICE)
    return random(runs, samples, classes, dtype=dtype), x, w, index, lam, activation


def check_accuracy(shape, activation, dtype=torch.float32, mix=None, precision="highest", keep=False):
    torch.set_float32_matmul_precision(precision)
    arguments = problem(shape, activation, dtype, mix)
    results, truth = run(*arguments, keep=keep), expected(*arguments)
    if dtype == torch.float32:
        tolerances = [1e-5 if precision == "highest" else 1e-2] * 3
    else:
        tolerances = [2 * error for error in errors(expected(*arguments, dtype=dtype), truth)]
    found = errors(results, truth)
    assert all(e <= t for e, t in zip(found, tolerances, strict=True)), f"errors {found} over {tolerances}"


def tf32(x):
    """Round float32 to the 10 bits of TF32's mantissa, to nearest, ties away from 0."""
    last_bit = torch.exp2((torch.frexp(x).exponent.clamp(min=-125) - 11).double())
    return (x.sign() * (x.double().abs() / last_bit + 0.5).floor() * last_bit).float()


def check_tf32(shape):
    """Both operands of a product are rounded, not cut off: in the logits no other error is left."""
    torch.set_float32_matmul_precision("high")
    grad, x, w, *rest = problem(shape, PolyReLU(8, 0.3))
    logits, *grads = errors(run(grad, x, w, *rest), expected(grad, tf32(x), tf32(w), *rest))
    assert logits <= 1e-5
    assert max(grads) <= 2**-11  # E is rounded as well


def check_operand():
    """Every kind of float32 as an operand in TF32: ties, the largest, subnormals, infinities, NaN of any payload."""
    import triton
    import triton.language as tl

    from mixfeat.kernels.triton.patch_conv import _operand

    @triton.jit
    def kernel(x, rounded, operand: tl.constexpr, BLOCK: tl.constexpr):
        n = tl.arange(0, BLOCK)
        tl.store(rounded + n, operand(tl.load(x + n), "tf32"))

    bits = torch.randint(-(2**31), 2**31, (1024,))
    bits[:10] = torch.tensor([0, 0x1000, 0x3F801000, 0x3F800FFF, 0x7F800000, 0x7FFFFFFF, 0x7F800001, 0x7FC00000, 1, -1])
    x = bits.to(torch.int32).view(torch.float32).to(DEVICE)
    rounded = torch.empty_like(x)
    kernel[1,](x, rounded, _operand, len(x))
    expected = torch.where(x.isfinite(), tf32(x), x)
    assert torch.equal(rounded.isnan(), x.isnan())
    assert torch.equal(rounded.nan_to_num(7.0), expected.nan_to_num(7.0))


def check_repeats(shape):
    arguments = problem(shape, PolyReLU(), mix="lams")
    torch.use_deterministic_algorithms(True)
    try:
        first = run(*arguments)
        with shuffled_programs():
            second = run(*arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_empty(shape, mix):
    arguments = problem(shape, PolyReLU(), mix=mix)
    assert all((result == 0).all() for result in run(*arguments))


def check_strides(layout, dtype):
    """Results for tensors of any layout are those for their contiguous copies, to the bit."""
    grad, x, w, index, lam, activation = problem((2, 9, 3, 16, 4, 5), PolyReLU(4, 0.5), dtype, "lams")
    if layout == "expanded":
        grad, x, lam = grad[:1, :1, :1].expand_as(grad), x[:1, :, :1].expand_as(x), lam[:1].expand_as(lam)
        w = w[:1].expand_as(w)
    elif layout == "transposed":
        grad, x, w = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in (grad, x, w))
        index, lam = torch.stack([index, index], 1)[:, 0], torch.stack([lam, lam], 1)[:, 0]
    elif layout == "sliced":
        grad, x, w = (torch.cat([t, t], -1)[..., 1 : t.shape[-1] + 1] for t in (grad, x, w))
    elif layout == "permuted":
        x, w = x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3), w.transpose(1, 2).contiguous().transpose(1, 2)
    copies = (t.contiguous() for t in (grad, x, w, index, lam))
    for result, same in zip(run(grad, x, w, index, lam, activation), run(*copies, activation), strict=True):
        assert torch.equal(result, same)


def check_far_apart():
    """Elements more than 2^31 apart; only the pages that are written take memory."""
    grad, x, w, index, lam, activation = problem((1, 3, 2, 8, 2, 3), PolyReLU(2), torch.float16, "lams")
    storage = torch.empty(2 * 2**31 + 16, dtype=torch.float16, device=DEVICE)
    far = storage.as_strided(x.shape, (0, 2**31, 8, 1))
    far.copy_(x)
    near = run(grad, x, w, index, lam, activation)
    assert all(torch.equal(a, b) for a, b in zip(run(grad, far, w, index, lam, activation), near, strict=True))


def check_not_finite(value, activation):
    """What is not a finite number reaches the logits it belongs to, as in the reference, and no others."""
    arguments = problem((1, 5, 3, 20, 4, 5), activation)
    _, x, w, *_ = arguments
    x[0, 1, 2, 3] = value
    w[0, 2, 4, 1] = value
    logits, *_ = run(*arguments)
    truth, *_ = expected(*arguments)
    torch.testing.assert_close(logits.double(), truth, equal_nan=True, rtol=1e-5, atol=1e-5)


def check_index_out_of_range(partner, shape):
    """The sample gets NaN, and every other one what it would get if that sample had no part in the loss."""
    arguments = problem(shape, PolyReLU(3, 0.5), mix="lams")
    grad, _, _, index, _, _ = arguments
    index[2] = partner
    logits, x_grad, _ = run(*arguments)
    index[2], grad[:, 2] = 0, 0
    truth, x_truth, _ = expected(*arguments)
    others = [n for n in range(shape[1]) if n != 2]
    assert logits[:, 2].isnan().all()
    assert max(errors((logits[:, others], x_grad[:, others]), (truth[:, others], x_truth[:, others]))) <= 1e-5


SMALL = (1, 9, 3, 20, 4, 5)
SHAPES = [
    (2, 70, 3, 20, 10, 5),  # several networks and blocks of samples
    (1, 1, 1, 1, 1, 1),
    (1, 17, 1, 33, 1, 7),
    (2, 3, 5, 8, 7, 1),
    (1, 5, 2, 50, 3, 70),
    (1, 5, 2, 20, 2, 150),  # more filters per class than a tile
    (1, 5, 2, 150, 3, 11),  # longer patches than a tile, rows not aligned
    (1, 5, 2, 160, 3, 43),
    (1, 2, 70, 20, 3, 5),  # few samples: tiles of several patches, and slices of them
]
# Two errors in half precision compare only where many roundings enter both: here more networks supply them.
MANY = (4, *SMALL[1:])
MANY_SHAPES = [(runs, *shape[1:]) for runs, shape in zip((2, 32, 16, 8, 2, 2, 4, 2, 4), SHAPES, strict=True)]
ACTIVATIONS = [
    *(PolyReLU(degree, 0.3) for degree in (1, 2, 8, 13, 16)),
    *(PolyReLU(degree, 0.3, clamp=False) for degree in (1, 3, 8)),
    *(PowerReLU(degree) for degree in (1, 2, 3, 7)),
    *(Power(degree) for degree in (1, 2, 11, 16)),
    ReLU(),
    Identity(),
]
CHECKS = {
    **{f"activation-{a}": partial(check_accuracy, SMALL, a) for a in ACTIVATIONS},
    **{f"activation-{a}-{d}": partial(check_accuracy, MANY, a, d, "lam") for a in ACTIVATIONS[2:6] for d in HALF},
    **{
        f"shape-{shape}-{mix}-{dtype}": partial(check_accuracy, shape, PolyReLU(), dtype, mix)
        for dtype, shapes in ((torch.float32, SHAPES), (torch.float16, MANY_SHAPES))
        for shape in shapes
        for mix in (None, "lams")
    },
    **{
        f"kept-{shape}-{mix}-{dtype}": partial(check_accuracy, shape, PolyReLU(), dtype, mix, keep=True)
        for dtype, shapes in ((torch.float32, SHAPES), (torch.float16, MANY_SHAPES))
        for shape, mix in ((shapes[0], "lams"), (shapes[5], None), (shapes[6], "lam"), (shapes[8], None))
    },
    **{
        f"tf32-{d}": partial(check_accuracy, (1, 9, 2, d, 3, 11), PolyReLU(), mix="lam", precision="high")
        for d in (20, 40, 70)
    },
    **{f"tf32-rounds-{d}": partial(check_tf32, (1, 33, 3, d, 3, 11)) for d in (20, 70)},
    "tf32-operand": check_operand,
    "repeats": partial(check_repeats, (1, 70, 5, 20, 4, 5)),
    **{
        f"empty-{shape}-{mix}": partial(check_empty, shape, mix)
        for shape in [tuple(0 if i == zero else 3 for i in range(6)) for zero in range(6)]
        for mix in ((None, "lam") if shape[1] else (None,))
    },
    **{
        f"strides-{layout}-{dtype}": partial(check_strides, layout, dtype)
        for layout in ("expanded", "transposed", "sliced", "permuted")
        for dtype in (torch.float32, torch.float16)
    },
    "far-apart": check_far_apart,
    **{
        f"not-finite-{value}-{a}": partial(check_not_finite, value, a)
        for value in (NAN, float("inf"))
        for a in (PolyReLU(8, 0.3), PolyReLU(2, 0.3, clamp=False), PowerReLU(3), ReLU())
    },
    **{
        f"index-{partner}-{shape}": partial(check_index_out_of_range, partner, shape)
        for partner in (-1, 5, 2**40, -(2**40))
        for shape in ((2, 5, 2, 20, 3, 4), (1, 5, 2, 50, 3, 4))
    },
}


@pytest.fixture(scope="module")
def checks(request):
    with running(request) as checks:
        yield checks


@pytest.mark.triton
@pytest.mark.parametrize("name", CHECKS)
def test_kernel(checks, name):
    checks(name)
