"""mixup_cross_entropy and soft_target_cross_entropy, held to torch.nn.functional.cross_entropy in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import SEED, error
from torch.library import opcheck

import mixfeat as mf

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(7, 10), (1, 2), (3, 1), (33, 65), (5, 1000), (2, 50257), (64, 16)]
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


def two_losses(x, a, b, lam, *, reduction="mean", **options):
    """lam CE(a) + (1 - lam) CE(b) as users write it, lam inside the mean if there are several."""
    if not isinstance(lam, torch.Tensor) or lam.dim() == 0:
        return sum(w * F.cross_entropy(x, t, reduction=reduction, **options) for t, w in ((a, lam), (b, 1 - lam)))
    rows = [w * F.cross_entropy(x, t, reduction="none", **options) for t, w in ((a, lam), (b, 1 - lam))]
    if reduction == "mean":
        return sum(
            row.sum() / (t != options.get("ignore_index", -100)).sum() for row, t in zip(rows, (a, b), strict=True)
        )
    return sum(rows) if reduction == "none" else sum(rows).sum()


def results(f, x, *args, upstream=None, **options):
    x = x.detach().requires_grad_()
    loss = f(x, *args, **options)
    grad = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    return loss.detach(), *torch.autograd.grad(loss, x, grad)


def exact(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check(f, formula, x, *args, **options):
    """Loss and gradient within the budget of the dtype: in half precision at most twice what the formula errs in it."""
    mine = results(f, x, *args, **options)
    true = results(formula, x.double(), *map(exact, args), **options)
    usual = results(formula, x, *args, **options)
    assert mine[0].dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert mine[1].dtype == x.dtype
    for i, (a, b, c) in enumerate(zip(mine, true, usual, strict=True)):
        assert a.shape == b.shape
        half, usual_error = x.dtype.itemsize == 2, 2 * error([c], [b])
        # a loss is formed in float32 also of half-precision logits; where it is next to 0, digits cancel in any formula
        budget = 1e-13 if x.dtype == torch.float64 else usual_error if half and i else max(1e-5, usual_error)
        assert error([a], [b]) <= budget, f"{'loss' if i == 0 else 'gradient'}: {error([a], [b]):.1e} > {budget:.1e}"


def check_mixup(x, *args, **options):
    check(mf.mixup_cross_entropy, two_losses, x, *args, **options)


def soft_loss(x, target, **options):
    return F.cross_entropy(x, target.to(x.dtype), **options)


def check_soft(x, target, **options):
    check(mf.soft_target_cross_entropy, soft_loss, x, target, **options)


def probabilities(shape, dtype, device):
    target = torch.rand(shape, dtype=torch.float64).square()
    target[..., shape[1] // 2 :] = 0  # some classes have none
    target[..., 0] += 0.1
    return (target / target.sum(1, keepdim=True)).to(device, dtype)


def enough(shape, dtype):
    """A shape with numbers enough for errors in half precision to compare."""
    return (64, shape[1]) if dtype.itemsize == 2 and math.prod(shape) < 500 else shape


def unless_refused(backend, dtype, run):
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(ValueError, match=r"'triton' does not serve torch\.float64"):
            run()
    else:
        run()


@pytest.mark.parametrize("lam", ["float", "0-d", "per-sample"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(backend, device, shape, dtype, lam):
    x, *rest = make_inputs(enough(shape, dtype), dtype, device, lam=lam)
    if shape[1] > 1 or dtype.itemsize > 2:  # with one class everything is 0 but for rounding
        unless_refused(backend, dtype, lambda: check_mixup(x, *rest))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("lam", ["float", "per-sample"])
def test_accuracy_of_options(backend, device, lam, reduction, label_smoothing):
    for ignore_index in (-100, 3, -1):
        x, a, b, lams = make_inputs((20, 7), torch.float32, device, lam=lam, ignored=ignore_index == -100)
        options = {"label_smoothing": label_smoothing, "ignore_index": ignore_index, "reduction": reduction}
        if ignore_index == -1:
            a[::4] = -1
        upstream = torch.randn(20 if reduction == "none" else (), device=device)
        check_mixup(x, a, b, lams, upstream=upstream, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy_of_soft_targets(backend, device, shape, dtype):
    shape = enough(shape, dtype)
    if shape[1] > 1 or dtype.itemsize > 2:
        x = make_inputs(shape, dtype, device)[0]
        for target_dtype in {dtype, torch.float32, torch.bfloat16}:
            target = probabilities(shape, target_dtype, device)
            unless_refused(backend, dtype, lambda: check_soft(x, target))  # noqa: B023


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_accuracy_of_soft_targets_options(backend, device, reduction, label_smoothing):
    x, target = make_inputs((20, 37), torch.float32, device)[0], probabilities((20, 37), torch.float32, device)
    upstream = torch.randn(20 if reduction == "none" else (), device=device)
    for scale in (1.0, 0.25):  # a target need not sum to 1
        check_soft(x, scale * target, upstream=upstream, reduction=reduction, label_smoothing=label_smoothing)


def test_both_losses_agree(backend, device):
    x, a, b, lam = make_inputs((16, 9), torch.float32, device, ignored=False)
    dense = torch.lerp(F.one_hot(b, 9).float(), F.one_hot(a, 9).float(), lam[:, None])
    for options in ({}, {"label_smoothing": 0.2}, {"reduction": "sum"}):
        torch.testing.assert_close(
            results(mf.mixup_cross_entropy, x, a, b, lam, **options),
            results(mf.soft_target_cross_entropy, x, dense, **options),
        )


def check_everything(device="cpu"):
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float64):
            check_mixup(*make_inputs(shape, dtype, device), label_smoothing=0.1 if shape[1] > 1 else 0.0)
            check_soft(make_inputs(shape, dtype, device)[0], probabilities(shape, dtype, device))
    for dtype in (torch.bfloat16, torch.float16):
        check_mixup(*make_inputs((64, 77), dtype, device))
        check_soft(make_inputs((64, 77), dtype, device)[0], probabilities((64, 77), dtype, device))


@pytest.mark.parametrize("capability", ["generic", "avx2", "avx512"])
def test_accuracy_of_each_instruction_set(capability, run_python):
    run_python(
        "import sys, torch; sys.path.insert(0, 'tests'); import test_cross_entropy as t\n"
        f"torch.manual_seed({SEED}); t.check_everything()\n",
        MIXFEAT_CPU_CAPABILITY=capability,
    )


def test_many_classes(backend, device):
    if backend == "triton" and device.type == "cpu":
        pytest.skip("too slow in the interpreter")
    x, a, b, _ = make_inputs((2, 2**18), torch.float32, device)
    check_mixup(x, a, b, 0.4, label_smoothing=0.1)


def test_threads():
    x, a, b, lam = make_inputs((300, 1000), torch.float32, "cpu")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(mf.mixup_cross_entropy, x, a, b, lam))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_strides_and_poison(backend, device):
    """Sliced, transposed and expanded tensors, gradients too; and all new memory starts as NaN."""
    x, a, b, lam = make_inputs((6, 9), torch.float32, device)
    layouts = [
        x.t().contiguous().t(), torch.cat([x, x], 1)[:, 3:12], torch.cat([x, x], 1)[:, ::2], x[:1].expand(6, 9),
        x[:, :1].expand(6, 9), torch.cat([x, x])[::2],
    ]  # fmt: skip
    twice = [torch.stack([t, t], 1)[:, 0] for t in (a, b, lam)]
    torch.use_deterministic_algorithms(True)
    try:
        for layout in layouts:
            for upstream in (torch.ones((), device=device).expand(6), torch.rand(2, 6, device=device).t()[:, 0]):
                check_mixup(layout, *twice, reduction="none", upstream=upstream)
            target = probabilities((6, 9), torch.float32, device)
            for soft in (target, target.t().contiguous().t(), target[:1].expand(6, 9)):
                check_soft(layout, soft)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by the interpreter's numpy
def test_extreme_logits(backend, device):
    """Large ones do not overflow; minus infinity rules a class out; what is not a number shows, in its row alone."""
    x, a, b, lam = make_inputs((6, 40), torch.float32, device, ignored=False)
    check_mixup(1e4 * x, a, b, lam)
    check_mixup(x - 1e6, a, b, lam)
    ruled_out = x.clone()
    ruled_out[:, 5] = -math.inf
    check_mixup(ruled_out, a.where(a != 5, 6), b.where(b != 5, 6), lam)
    for value in (math.nan, math.inf):
        bad = x.clone()
        bad[2, 7] = value
        loss, grad = results(mf.mixup_cross_entropy, bad, a, b, lam, reduction="none")
        true = results(two_losses, bad, a, b, lam, reduction="none")
        assert loss[2].isnan()
        assert grad[2].isnan().any()
        assert torch.equal(grad.isfinite().all(1), true[1].isfinite().all(1))
        others = [0, 1, 3, 4, 5]
        torch.testing.assert_close((loss[others], grad[others]), (true[0][others], true[1][others]))
    soft = probabilities((6, 40), torch.float32, device)
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
            true = results(two_losses, x[:size], target, other, 0.5, reduction=reduction)
            torch.testing.assert_close(mine, true, equal_nan=True)
    soft = torch.zeros(0, 9, device=device)
    mine = results(mf.soft_target_cross_entropy, x[:0], soft, reduction=reduction)
    torch.testing.assert_close(mine, results(soft_loss, x[:0], soft, reduction=reduction), equal_nan=True)


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
    true = results(two_losses, x.double(), a, b, lam.double())[1]
    assert error([scaled.double() / 2**14], [true]) <= (1e-6 if dtype == torch.float32 else 1e-3)


def test_memory():
    """Nothing as large as the logits but the gradient."""
    import subprocess
    import sys

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
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.9 < float(run.stdout) < 1.1


def test_gradcheck(backend, device):
    if backend == "triton":
        pytest.skip("its float64 is the reference's")
    x, a, b, lam = make_inputs((6, 5), torch.float64, device)
    x.requires_grad_()
    for reduction in REDUCTIONS:
        options = {"reduction": reduction, "label_smoothing": 0.1}
        assert torch.autograd.gradcheck(lambda x: mf.mixup_cross_entropy(x, a, b, lam, **options), x)  # noqa: B023
        soft = probabilities((6, 5), torch.float64, device)
        assert torch.autograd.gradcheck(lambda x: mf.soft_target_cross_entropy(x, soft, **options), x)  # noqa: B023


def test_opcheck(backend, device):
    x, a, b, lam = make_inputs((6, 5), torch.float32, device)
    for grad in (False, True):
        for input in (x, x.clone().requires_grad_()):
            for reduction in REDUCTIONS:
                opcheck(torch.ops.mixfeat.mixup_cross_entropy.default, (input, a, b, lam, 0.1, -100, reduction, grad))
                soft = probabilities((6, 5), torch.float32, device)
                opcheck(torch.ops.mixfeat.soft_target_cross_entropy.default, (input, soft, 0.1, reduction, grad))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend, device, dynamic):
    """Of a training step, in one graph, with an upstream gradient other than 1."""
    torch._dynamo.reset()

    def step(x, a, b, lam, soft):
        return 2 * mf.mixup_cross_entropy(x, a, b, lam) + mf.soft_target_cross_entropy(x, soft, reduction="none").mean()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for samples in (6, 9):
        x, a, b, lam = make_inputs((samples, 5), torch.float32, device)
        soft = probabilities((samples, 5), torch.float32, device)
        torch.testing.assert_close(results(compiled, x, a, b, lam, soft), results(step, x, a, b, lam, soft))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, device, dtype):
    """Half-precision logits are taken as they are; the loss is float32."""
    layer = torch.nn.Linear(8, 5, device=device)
    _, a, b, lam = make_inputs((6, 5), torch.float32, device)
    with torch.autocast(device.type, dtype):
        logits = layer(torch.randn(6, 8, device=device))
        loss = mf.mixup_cross_entropy(logits, a, b, lam)
    assert logits.dtype == dtype
    assert loss.dtype == torch.float32
    loss.backward()
    assert layer.weight.grad.isfinite().all()
    assert layer.weight.grad.any()


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
    torch.testing.assert_close(x.grad, results(two_losses, x, a, b, lam)[1])


X, Y, SOFT = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), torch.ones(4, 3) / 3


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (([1.0], Y, Y, 0.5), {}, TypeError, "input must be a tensor, got list"),
        ((X.long(), Y, Y, 0.5), {}, TypeError, r"input must be float32, .*, got torch\.int64"),
        ((X[0], Y, Y, 0.5), {}, ValueError, r"input must have shape \(N,C\) with C at least 1, got \(3,\)"),
        ((X[:, :0], Y, Y, 0.5), {}, ValueError, r"input must have shape \(N,C\) with C at least 1, got \(4, 0\)"),
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
