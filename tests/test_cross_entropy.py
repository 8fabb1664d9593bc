"""mixup_cross_entropy and soft_target_cross_entropy, held to torch.nn.functional.cross_entropy in float64."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import error

import mixfeat as mf
from mixfeat import reference

REDUCTIONS = ["mean", "sum", "none"]


def make_inputs(shape, dtype, device, *, lam="per-sample", ignored=True):
    """Logits, two targets with some that are ignored, lam; the smallest problems keep their targets."""
    samples, classes = shape
    x = (3 * torch.randn(shape, dtype=torch.float64)).to(device, dtype)
    a, b = torch.randint(classes, (2, samples), device=device)
    b[::3] = a[::3]  # pairs of one class
    if ignored and samples > 4:
        a[1], b[2], a[3], b[3] = -100, -100, -100, -100
    kinds = {"float": 0.3, "0-d": torch.tensor(0.7), "per-sample": torch.rand(samples)}
    return x, a, b, kinds[lam] if lam == "float" else kinds[lam].to(device)


def results(f, x, *args, upstream=None, **options):
    x = x.detach().requires_grad_()
    loss = f(x, *args, **options)
    grad = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    return loss.detach(), *torch.autograd.grad(loss, x, grad)


def check_mixup(x, a, b, lam, **options):
    """Loss and gradient within the budget, or twice what PyTorch errs where the loss is next to 0 and digits cancel."""
    exact = lam.double() if isinstance(lam, torch.Tensor) else lam
    mine = results(mf.mixup_cross_entropy, x, a, b, lam, **options)
    true = results(reference.mixup_cross_entropy, x.double(), a, b, exact, **options)
    usual = results(reference.mixup_cross_entropy, x, a, b, lam, **options)
    for found, truth, plain in zip(mine, true, usual, strict=True):
        assert error([found], [truth]) <= max(1e-5, 2 * error([plain], [truth]))


def probabilities(shape, dtype, device):
    target = torch.rand(shape, dtype=torch.float64).square()
    target[..., shape[1] // 2 :] = 0  # some classes have none
    target[..., 0] += 0.1
    return (target / target.sum(1, keepdim=True)).to(device, dtype)


def test_both_losses_agree(backend, device):
    x, a, b, lam = make_inputs((16, 9), torch.float32, device, ignored=False)
    dense = torch.lerp(F.one_hot(b, 9).float(), F.one_hot(a, 9).float(), lam[:, None])
    for options in ({}, {"label_smoothing": 0.2}, {"reduction": "sum"}):
        torch.testing.assert_close(
            results(mf.mixup_cross_entropy, x, a, b, lam, **options),
            results(mf.soft_target_cross_entropy, x, dense, **options),
        )


def test_many_classes(backend, device):
    if backend == "triton" and device.type == "cpu":
        pytest.skip("too slow in the interpreter")
    x, a, b, _ = make_inputs((2, 2**18), torch.float32, device)
    check_mixup(x, a, b, 0.4, label_smoothing=0.1)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by the interpreter's numpy
@pytest.mark.parametrize("classes", [9, 24, 40])  # a vector of AVX-512, two, and more
def test_extreme_logits(backend, device, classes):
    """Large ones do not overflow; minus infinity rules a class out; what is not a number shows, in its row alone."""
    x, a, b, lam = make_inputs((6, classes), torch.float32, device, ignored=False)
    check_mixup(1e4 * x, a, b, lam)
    check_mixup(x - 1e6, a, b, lam)
    ruled_out = x.clone()
    ruled_out[:, 5] = -math.inf
    check_mixup(ruled_out, a.where(a != 5, 6), b.where(b != 5, 6), lam)
    for value in (math.nan, math.inf):
        bad = x.clone()
        bad[2, 7] = value
        loss, grad = results(mf.mixup_cross_entropy, bad, a, b, lam, reduction="none")
        true = results(reference.mixup_cross_entropy, bad, a, b, lam, reduction="none")
        assert loss[2].isnan()
        assert grad[2].isnan().any()
        assert torch.equal(grad.isfinite().all(1), true[1].isfinite().all(1))
        others = [0, 1, 3, 4, 5]
        torch.testing.assert_close((loss[others], grad[others]), (true[0][others], true[1][others]))
    soft = probabilities((6, classes), torch.float32, device)
    infinite = mf.soft_target_cross_entropy(ruled_out, soft, reduction="none").isfinite()
    assert torch.equal(infinite, F.cross_entropy(ruled_out, soft, reduction="none").isfinite())


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by the interpreter's numpy
def test_ignored_rows_do_not_count(backend, device):
    """Their loss and gradient are 0 even where their logits are not numbers."""
    x, a, b, lam = make_inputs((6, 9), torch.float32, device, ignored=False)
    a[4] = b[4] = -100
    x[4] = math.nan
    loss, grad = results(mf.mixup_cross_entropy, x, a, b, lam, reduction="none")
    assert loss[4] == 0
    assert (grad[4] == 0).all()
    assert loss.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_average(backend, device, reduction):
    """As F.cross_entropy has it: the mean over no targets is NaN, other sums over nothing are 0."""
    x, a, b, _ = make_inputs((6, 9), torch.float32, device)
    for size, target in ((0, a[:0]), (6, torch.full_like(a, -100))):
        for other in (target, b[:size]):
            mine = results(mf.mixup_cross_entropy, x[:size], target, other, 0.5, reduction=reduction)
            true = results(reference.mixup_cross_entropy, x[:size], target, other, 0.5, reduction=reduction)
            torch.testing.assert_close(mine, true, equal_nan=True)
    soft = torch.zeros(0, 9, device=device)
    mine = results(mf.soft_target_cross_entropy, x[:0], soft, reduction=reduction)
    torch.testing.assert_close(
        mine, results(reference.soft_target_cross_entropy, x[:0], soft, reduction=reduction), equal_nan=True
    )


@pytest.mark.parametrize("bad", [-1, 9, 2**40, -101])
@pytest.mark.parametrize("which", ["target_a", "target_b"])
def test_target_out_of_range(backend, device, bad, which):
    x, a, b, lam = make_inputs((6, 9), torch.float32, device)
    (a if which == "target_a" else b)[5] = bad
    if device.type == "cpu":
        with pytest.raises(IndexError, match=rf"{which} must lie in \[0, 9\) or be ignore_index \(-100\), got {bad}"):
            mf.mixup_cross_entropy(x, a, b, lam)
        return
    loss, grad = results(mf.mixup_cross_entropy, x, a, b, lam, reduction="none")
    assert torch.equal(loss.isnan(), torch.arange(6, device=device) == 5)
    assert torch.equal(grad.isnan().all(1), loss.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_backward_again_and_scaled(backend, device, dtype):
    """A graph that is kept can be differentiated again; a loss scaled up for float16 loses no small gradients."""
    x, a, b, lam = make_inputs((64, 50), dtype, device)
    x.requires_grad_()
    loss = mf.mixup_cross_entropy(x, a, b, lam)
    first, again, scaled = (torch.autograd.grad(s * loss, x, retain_graph=True)[0] for s in (3, 3, 2**14))
    kept = first.clone()
    assert torch.equal(first, again)
    last = torch.autograd.grad(loss, x)[0]
    assert torch.equal(first, kept)
    torch.testing.assert_close(first, 3 * last)
    true = results(reference.mixup_cross_entropy, x.double(), a, b, lam.double())[1]
    assert error([scaled.double() / 2**14], [true]) <= (1e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [0, 4096])
@pytest.mark.parametrize("ignored", [False, True])
def test_means_as_a_gpu_forms_them(backend, device, monkeypatch, dtype, rows, ignored):
    """The mean of few rows assumes that all targets count, and backward mends that; that of many counts them first."""
    if backend == "cpu":
        pytest.skip("for a GPU's kernels and what stands in for them")
    monkeypatch.setattr("mixfeat.ops.cross_entropy._counts_serve", lambda input: True)
    if backend == "triton":
        monkeypatch.setattr("mixfeat.kernels.triton.configs.MEAN_ROWS", rows)
    x, a, b, lam = make_inputs((7, 9), dtype, device, ignored=ignored)
    true = results(reference.mixup_cross_entropy, x.double(), a, b, lam.double(), label_smoothing=0.1)
    for factor in (1.0, 3.0):
        leaf = x.clone().requires_grad_()
        loss = mf.mixup_cross_entropy(leaf, a, b, lam, label_smoothing=0.1)
        for keep in (True, False):
            grad = torch.autograd.grad(loss, leaf, torch.full_like(loss, factor), retain_graph=keep)[0]
            assert grad.dtype == dtype
            assert error([grad], [factor * true[1]]) <= (1e-6 if dtype == torch.float32 else 1e-3)
        assert error([loss], [true[0]]) <= 1e-6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory(run_python):
    """Nothing as large as the logits but the gradient."""
    code = (
        "import torch, mixfeat as mf\n"
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) << 10\n"
        "torch.set_num_threads(1)\n"
        "x = torch.zeros(128, 2**18, requires_grad=True); y = torch.arange(128)\n"
        "mf.mixup_cross_entropy(x[:2], y[:2], y[:2], 0.5); x.detach().fill_(1.0)\n"
        "before = peak()\n"
        "mf.mixup_cross_entropy(x, y, y.flip(0), 0.5).backward()\n"
        "print((peak() - before) / x.nbytes)\n"
    )
    assert 0.9 < float(run_python(code)) < 1.1


@pytest.mark.gpu
def test_no_host_synchronisation():
    x, a, b, lam = make_inputs((64, 1000), torch.float32, "cuda")
    x.requires_grad_()
    mf.mixup_cross_entropy(x, a, b, lam).backward()  # compiled now
    torch.cuda.set_sync_debug_mode("error")
    try:
        (3 * mf.mixup_cross_entropy(x, a, b, lam, label_smoothing=0.1)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_graph():
    x, a, b, lam = make_inputs((64, 1000), torch.float32, "cuda")
    x.requires_grad_()
    x.grad = torch.zeros_like(x)

    def step():
        x.grad.zero_()
        mf.mixup_cross_entropy(x, a, b, lam).backward()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    with torch.no_grad():
        x.normal_()
    graph.replay()
    torch.testing.assert_close(x.grad, results(reference.mixup_cross_entropy, x, a, b, lam)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_lse_and_its_square(backend, device, dtype, reduction):
    """The z-loss is that of the logsumexp which is returned; either result has its gradient, also without the other."""
    x, a, b, lam = make_inputs((7, 9), dtype, device)
    options = {"label_smoothing": 0.1, "reduction": reduction}
    plain = mf.mixup_cross_entropy(x, a, b, lam, **options)
    loss, lse = mf.mixup_cross_entropy(x, a, b, lam, lse_square_scale=0.1, return_lse=True, **options)
    torch.testing.assert_close(lse, x.to(lam.dtype).logsumexp(1))
    rows = [share * lse.square().where(y != -100, 0) for y, share in ((a, lam), (b, 1 - lam))]
    if reduction == "mean":
        rows = [row.sum() / (y != -100).sum() for y, row in zip((a, b), rows, strict=True)]
    square = sum(rows) if reduction != "sum" else sum(rows).sum()
    torch.testing.assert_close(loss, plain + 0.1 * square)

    def both(f, x, factors, **more):
        x = x.detach().requires_grad_()
        results = f(x, a, b, lam.to(torch.promote_types(x.dtype, torch.float32)), return_lse=True, **options, **more)
        terms = [factor * result for factor, result in zip(factors, results, strict=True) if factor is not None]
        value = sum(term.sum() for term in terms)
        return torch.autograd.grad(value, x)[0]

    h = torch.randn_like(lse)
    for factors in ((3.0, h), (None, h), (3.0, None)):
        for scale in (0.0, 0.1):
            mine = both(mf.mixup_cross_entropy, x, factors, lse_square_scale=scale)
            true = both(reference.mixup_cross_entropy, x.double(), factors, lse_square_scale=scale)
            assert mine.dtype == dtype
            assert error([mine], [true]) <= (1e-5 if dtype == torch.float32 else 1e-3)


def test_lse_of_dense_predictions_and_class_weights(backend, device):
    x = torch.randn(3, 4, 2, 5, device=device)
    a, b = torch.randint(4, (2, 3, 2, 5), device=device)
    for weight in (None, torch.rand(4, device=device)):
        loss, lse = mf.mixup_cross_entropy(x, a, b, 0.3, weight=weight, lse_square_scale=0.2, return_lse=True)
        torch.testing.assert_close(lse, x.logsumexp(1))
        theirs = 0.3 * F.cross_entropy(x, a, weight) + 0.7 * F.cross_entropy(x, b, weight)
        torch.testing.assert_close(loss, theirs + 0.2 * lse.square().mean())


X, Y, SOFT = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), torch.ones(4, 3) / 3


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (([1.0], Y, Y, 0.5), {}, TypeError, "input must be a tensor, got list"),
        ((X.long(), Y, Y, 0.5), {}, TypeError, r"input must be float32, .*, got torch\.int64"),
        (
            (X[0], Y, Y, 0.5),
            {},
            ValueError,
            r"input must have shape \(N,C\) or \(N,C,d1,\.\.\.\) with C .*, got \(3,\)",
        ),
        ((X[:, :0], Y, Y, 0.5), {}, ValueError, r"input must have shape \(N,C\) or .* with C at least 1, got \(4, 0\)"),
        ((X, Y.int(), Y, 0.5), {}, TypeError, r"target_a must be an int64 tensor of classes, got torch\.int32"),
        ((X, Y, SOFT, 0.5), {}, TypeError, r"target_b must be an int64 tensor of classes, got torch\.float32"),
        ((X, Y[:3], Y, 0.5), {}, ValueError, r"target_a must have shape \(4,\), one class for each sample, got \(3,\)"),
        ((X, Y, Y.to("meta"), 0.5), {}, ValueError, "target_b must be on input's device cpu, got meta"),
        ((X, Y, Y, 2), {}, ValueError, r"lam must be in \[0, 1\], got 2"),
        ((X, Y, Y, torch.tensor(-0.5)), {}, ValueError, r"lam must be in \[0, 1\], got -0.5"),
        ((X, Y, Y, None), {}, TypeError, "lam must be a number or a tensor, got None"),
        ((X, Y, Y, torch.ones(2)), {}, ValueError, r"lam must have shape \(\) or \(4,\), got \(2,\)"),
        ((X, Y, Y, 0.5), {"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ((X, Y, Y, 0.5), {"label_smoothing": "a"}, TypeError, "label_smoothing must be a number, got 'a'"),
        ((X, Y, Y, 0.5), {"lse_square_scale": -1}, ValueError, "lse_square_scale must be at least 0, got -1"),
        ((X, Y, Y, 0.5), {"lse_square_scale": math.inf}, ValueError, "lse_square_scale must be finite, got inf"),
        ((X, Y, Y, 0.5), {"return_lse": 1}, TypeError, "return_lse must be a bool, got 1"),
        ((X, Y, Y, 0.5), {"ignore_index": 0.5}, TypeError, "ignore_index must be an integer, got 0.5"),
        ((X, Y, Y, 0.5), {"reduction": "max"}, ValueError, 'reduction must be "mean", "sum" or "none", got \'max\''),
    ],
)
def test_refuses(args, options, error, message):
    with pytest.raises(error, match=message):
        mf.mixup_cross_entropy(*args, **options)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((X, Y), {}, TypeError, r"target must be a floating-point tensor of probabilities, got torch\.int64"),
        ((X, SOFT[:, :2]), {}, ValueError, r"target must have input's shape \(4, 3\), got \(4, 2\)"),
        ((X, SOFT.to("meta")), {}, ValueError, "target must be on input's device cpu, got meta"),
        ((X, SOFT.clone().requires_grad_()), {}, ValueError, "target must not require grad"),
        ((X, SOFT), {"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\], got -0.1"),
        ((X, SOFT), {"reduction": None}, ValueError, 'reduction must be "mean", "sum" or "none", got None'),
    ],
)
def test_soft_targets_refuse(args, options, error, message):
    with pytest.raises(error, match=message):
        mf.soft_target_cross_entropy(*args, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_are_those_of_pytorch(backend, device, reduction, smoothing):
    x, lam = torch.randn(12, 5, device=device), 0.3
    a, b = torch.randint(5, (2, 12), device=device)
    b[3], weight = 1, 2 * torch.rand(5, device=device)
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    for ignored in (-100, 1):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        mine = mf.mixup_cross_entropy(leaves[0], a, b, lam, ignore_index=ignored, **options)
        theirs = lam * F.cross_entropy(leaves[1], a, ignore_index=ignored, **options)
        theirs = theirs + (1 - lam) * F.cross_entropy(leaves[1], b, ignore_index=ignored, **options)
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(
            *(torch.autograd.grad(v.sum(), t)[0] for v, t in zip((mine, theirs), leaves, strict=True))
        )
    soft = torch.rand(12, 5, device=device)
    torch.testing.assert_close(
        mf.soft_target_cross_entropy(x, soft, **options), F.cross_entropy(x, soft, **options), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"weight must have shape \(5,\), one weight for each class, got \(4,\)"):
        mf.mixup_cross_entropy(x, a, b, lam, weight=weight[:4])
    with pytest.raises(ValueError, match="weight must not require grad"):
        mf.soft_target_cross_entropy(x, soft, weight=weight.clone().requires_grad_())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_dense_predictions(backend, device, reduction):
    """Logits (N,C,d1,...) with a class or a distribution at each position, as F.cross_entropy takes them."""
    x = torch.randn(3, 4, 2, 5, device=device)
    a, b = torch.randint(4, (2, 3, 2, 5), device=device)
    options = {"label_smoothing": 0.1, "reduction": reduction}
    theirs = 0.3 * F.cross_entropy(x, a, **options) + 0.7 * F.cross_entropy(x, b, **options)
    torch.testing.assert_close(mf.mixup_cross_entropy(x, a, b, 0.3, **options), theirs)
    lam = torch.rand(3, device=device)
    rows = mf.mixup_cross_entropy(x, a, b, lam, label_smoothing=0.1, reduction="none")
    for n in range(3):
        torch.testing.assert_close(
            rows[n],
            mf.mixup_cross_entropy(
                x[n : n + 1], a[n : n + 1], b[n : n + 1], lam[n], label_smoothing=0.1, reduction="none"
            )[0],
        )
    soft = torch.rand(3, 4, 2, 5, device=device)
    mine = mf.soft_target_cross_entropy(x, soft, **options)
    mean = F.cross_entropy(x, soft, **options)
    torch.testing.assert_close(
        mine, mean if reduction != "mean" else F.cross_entropy(x, soft, label_smoothing=0.1, reduction="none").mean()
    )
    with pytest.raises(
        ValueError, match=r"target_b must have shape \(3, 2, 5\), one class for each position, got \(3, 2\)"
    ):
        mf.mixup_cross_entropy(x, a, b[..., 0], 0.3)
