import copy
import functools
import math

import pytest
import torch
from conftest import SEED, error, interpreted
from torch.library import opcheck

import mixfeat as mf
from mixfeat import reference

POLY = mf.PolyReLU(8, 0.1)
ACTIVATIONS = [
    POLY,
    mf.PolyReLU(1, 0.3),
    mf.PolyReLU(5, 0.2, clamp=False),
    mf.PolyReLU(16, 0.5),
    mf.PowerReLU(3),
    mf.Power(2),
    mf.Power(7),
    mf.ReLU(),
    mf.Identity(),
]
DEGENERATE = (1, 1, 1, 1, 1)
# (N, P, D, C, M): plain, odd, degenerate, wider than a block in each dimension; of logits enough for one draw
SHAPES = [
    (8, 4, 16, 8, 4),
    (7, 3, 5, 11, 5),
    DEGENERATE,
    (33, 12, 20, 10, 10),
    (2, 1, 70, 33, 1),
    (65, 2, 3, 1, 150),
    (3, 50, 9, 40, 1),
    (13, 3, 150, 5, 7),
]
LARGE = [(64, 300, 33, 3, 17), (300, 2, 257, 2, 3), (70, 16, 64, 10, 16)]  # several blocks of rows and several tasks
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def make_inputs(shape, dtype, device, *, runs="", mix=None):
    """Random arguments; pre-activations are of the order of the threshold. runs: which of "x" and "w" have R = 3."""
    samples, patches, features, classes, filters = shape
    x = torch.randn(*[3] * ("x" in runs), samples, patches, features, dtype=torch.float64)
    w = torch.randn(*[3] * ("w" in runs), classes, filters, features, dtype=torch.float64) * 0.1 / math.sqrt(features)
    kwargs = {}
    if mix is not None:
        kwargs["index"] = torch.randint(samples, (samples,), device=device)
        kwargs["lam"] = {"float": 0.3, "0-d": torch.tensor(0.7), "per-sample": torch.rand(samples)}[mix]
        if isinstance(kwargs["lam"], torch.Tensor):
            kwargs["lam"] = kwargs["lam"].to(device)
    return x.to(device, dtype), w.to(device, dtype), kwargs


def results(f, x, w, activation, kwargs, grad):
    """Logits and the gradients to input and weight."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    logits = f(x, w, activation, **kwargs)
    return logits.detach(), *torch.autograd.grad(logits, (x, w), grad.to(logits))


def check(*draws):
    """Values and gradients against the float64 reference, within the budget of the dtype.

    Each draw is (input, weight, activation, mixing arguments[, grad]). They must hold more than a few numbers: the
    eighth power of one product that cancels has no relative error to speak of. The budget in half precision is twice
    what plain PyTorch errs on the same draws.
    """
    outcomes = []
    for x, w, activation, kwargs, *rest in draws:
        double = {k: v.double() if k == "lam" and isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        exact = reference.patch_conv(x.double(), w.double(), activation, **double)
        grad = rest[0] if rest else torch.randn(exact.shape, device=x.device).to(x.dtype)
        outcomes.append(
            (
                results(mf.patch_conv, x, w, activation, kwargs, grad),
                results(reference.patch_conv, x, w, activation, kwargs, grad),
                results(reference.patch_conv, x.double(), w.double(), activation, double, grad.double()),
            )
        )
    for i, name in enumerate(("logits", "input grad", "weight grad")):
        mine, plain, true = ([outcome[which][i] for outcome in outcomes] for which in range(3))
        assert all(a.shape == b.shape and a.dtype == x.dtype for a, b in zip(mine, true, strict=True))
        budget = {torch.float32: 1e-5, torch.float64: 1e-13}.get(x.dtype) or 2 * error(plain, true)
        assert error(mine, true) <= budget, f"{name}: {error(mine, true):.1e} > {budget:.1e}"


def draws(shape, dtype, device, activation, *, gain=1, **options):
    """As many draws as make at least 64 logits."""
    count = max(1, 64 // (shape[0] * shape[3]))
    inputs = (make_inputs(shape, dtype, device, **options) for _ in range(count))
    return [(x, gain * w, activation, kwargs) for x, w, kwargs in inputs]


@pytest.mark.parametrize("mix", [None, "float", "0-d", "per-sample"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(backend, device, shape, dtype, mix):
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(ValueError, match=r"'triton' does not serve torch\.float64; use 'cpu' or 'reference'"):
            check(*draws(shape, dtype, device, POLY, mix=mix))
        return
    if interpreted(backend) and mix in ("float", "0-d") and (shape == DEGENERATE or dtype.itemsize == 2):
        pytest.skip("long in the interpreter")
    check(*draws(shape, dtype, device, POLY, mix=mix))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_accuracy_of_activations(backend, device, activation, dtype):
    gain = 1 if activation.polynomial.upper else 5
    check(*draws((7, 3, 12, 10, 5), dtype, device, activation, gain=gain, mix="per-sample"))


@pytest.mark.parametrize("degree", range(1, 17))
def test_accuracy_of_degrees(backend, device, degree):
    kinds = mf.PolyReLU(degree, 0.2), mf.PolyReLU(degree, 0.2, clamp=False), mf.PowerReLU(degree), mf.Power(degree)
    for activation in kinds:
        gain = 1 if activation.polynomial.upper else 10
        check(*draws((8, 2, 6, 8, 3), torch.float32, device, activation, gain=gain))


@pytest.mark.parametrize("mix", [None, "per-sample"])
@pytest.mark.parametrize("runs", ["x", "w", "xw"])
def test_accuracy_of_runs(backend, device, runs, mix):
    x, w, kwargs = make_inputs((9, 4, 10, 3, 5), torch.float32, device, runs=runs, mix=mix)
    check((x, w, POLY, kwargs))
    single = [x[r] if "x" in runs else x for r in range(3)], [w[r] if "w" in runs else w for r in range(3)]
    each = torch.stack([mf.patch_conv(a, b, POLY, **kwargs) for a, b in zip(*single, strict=True)])
    torch.testing.assert_close(mf.patch_conv(x, w, POLY, **kwargs), each)


@pytest.mark.parametrize("mix", [None, "per-sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", LARGE)
def test_accuracy_of_large_shapes(shape, dtype, mix):
    check(*draws(shape, dtype, "cpu", POLY, mix=mix))


@pytest.mark.parametrize("saved", [0, 5])
def test_accuracy_where_slopes_are_computed_again(monkeypatch, saved):
    shape = (11, 3, 5, 3, 4)
    monkeypatch.setattr(mf.ops.patch_conv, "SAVED_BYTES", saved * 3 * 12 * 4)
    check(*draws(shape, torch.float32, "cpu", POLY, mix="float"))


@pytest.mark.parametrize("capability", ["generic", "avx2", "avx512"])
def test_accuracy_of_each_instruction_set(capability, run_python):
    """In a process of its own, as the choice is made once; where the processor lacks a set, its best one runs."""
    run_python(
        "import sys, torch, mixfeat as mf; sys.path.insert(0, 'tests'); import test_patch_conv as t\n"
        "from mixfeat.kernels import cpu\n"
        f"torch.manual_seed({SEED})\n"
        f"assert cpu.capability() in ('{capability}', 'avx2', 'generic'), cpu.capability()\n"
        "for shape in t.SHAPES + t.LARGE[2:]:\n"
        "  for dtype in (torch.float32, torch.float64):\n"
        "    t.check(*t.draws(shape, dtype, 'cpu', t.POLY, mix='per-sample'))\n"
        "    t.check(*t.draws(shape, dtype, 'cpu', mf.Power(3)))\n",
        MIXFEAT_CPU_CAPABILITY=capability,
    )


@pytest.mark.parametrize("empty", range(5))
def test_empty_dimensions(backend, device, empty):
    """No samples, patches, features, classes or filters: sums over nothing are 0."""
    shape = [4, 3, 5, 2, 3]
    shape[empty] = 0
    x, w, _ = make_inputs(shape, torch.float32, device)
    x.requires_grad_(), w.requires_grad_()
    logits = mf.patch_conv(x, w, POLY)
    logits.sum().backward()
    assert logits.shape == (shape[0], shape[3])
    assert not logits.any()
    assert not x.grad.any()
    assert not w.grad.any()
    index = torch.zeros(shape[0], dtype=torch.int64, device=device)
    assert mf.patch_conv(x, w, POLY, index=index, lam=0.5).shape == logits.shape
    apart = [torch.stack([t, t], -1)[..., 0] for t in (x, w)]  # nothing, with strides of its own
    assert torch.equal(mf.patch_conv(*apart, POLY), logits)


def test_no_networks(backend, device):
    x, w = torch.zeros(0, 4, 3, 5, device=device), torch.zeros(0, 2, 3, 5, device=device, requires_grad=True)
    for input in (x, torch.zeros(4, 3, 5, device=device)):
        logits = mf.patch_conv(input, w, POLY)
        assert logits.shape == (0, 4, 2)
        logits.sum().backward()
    w = torch.ones(2, 3, 5, device=device, requires_grad=True)
    mf.patch_conv(x, w, POLY).sum().backward()
    assert not w.grad.any()


def test_strides(backend, device):
    """Transposed, sliced, expanded and zero-stride tensors, gradients included."""
    x, w, kwargs = make_inputs((6, 4, 10, 3, 4), torch.float32, device, mix="per-sample")
    layouts = {
        "transposed": (x.transpose(0, 2).contiguous().transpose(0, 2), w.transpose(0, 1).contiguous().transpose(0, 1)),
        "sliced": (x.repeat(2, 2, 2)[::2, ::2, 1::2], w.repeat(2, 2, 2)[1::2, ::2, ::2]),
        "offset": (torch.cat([x, x], 2)[..., 3:13], torch.cat([w, w])[2:5]),
        "expanded": (x[:1].expand(6, 4, 10), w[:, :1].expand(3, 4, 10)),
        "expanded features": (x[..., :1].expand(6, 4, 10), w[..., :1].expand(3, 4, 10)),
    }
    grads = {
        "ones": torch.ones((), device=device).expand(6, 3),
        "rows": torch.randn(3, device=device).expand(6, 3),
        "transposed": torch.randn(3, 6, device=device).t(),
    }
    kwargs["lam"] = torch.rand(12, device=device)[::2]
    kwargs["index"] = kwargs["index"].repeat(2).view(2, 6).t().contiguous()[:, 0]
    assert not kwargs["index"].is_contiguous()
    for input, weight in layouts.values():
        for grad in grads.values():
            check((input, weight, POLY, kwargs, grad))
    runs = x.expand(3, 6, 4, 10)
    check((runs, w, POLY, kwargs))


def test_poisoned_scratch(backend, device):
    """Nothing is read that was not written: all new memory starts as NaN."""
    torch.use_deterministic_algorithms(True)  # makes torch.empty fill, in C++ too
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        for shape in SHAPES:
            for mix in (None, "per-sample"):
                if shape != DEGENERATE:
                    check(*draws(shape, torch.float32, device, POLY, mix=mix))
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_is_mutated(backend, device):
    x, w, kwargs = make_inputs((6, 4, 10, 3, 4), torch.float32, device, mix="per-sample")
    before = copy.deepcopy((x, w, kwargs))
    results(mf.patch_conv, x, w, POLY, kwargs, torch.ones((), device=device).expand(6, 3))
    for a, b in zip((x, w, *kwargs.values()), (*before[:2], *before[2].values()), strict=True):
        assert torch.equal(a, b)


def test_nan_shows(backend, device):
    """A NaN in one sample makes its logits NaN and no others."""
    x, w, _ = make_inputs((40, 4, 10, 3, 4), torch.float32, device)
    for activation in ACTIVATIONS:
        x[3, 2, 1] = math.nan
        logits = mf.patch_conv(x, w, activation)
        assert logits[3].isnan().all()
        assert logits[torch.arange(40, device=device) != 3].isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by the interpreter's numpy, in padding
def test_infinity(backend, device):
    x = torch.full((2, 1, 1), math.inf, device=device)
    w = torch.tensor([[[1.0]], [[-1.0]]], device=device)
    assert torch.equal(mf.patch_conv(x, w, POLY), torch.tensor([[math.inf, 0.0]] * 2, device=device))


@pytest.mark.parametrize("index", [-1, 6, 2**40])
def test_index_out_of_range(backend, device, index):
    x, w, kwargs = make_inputs((6, 4, 10, 3, 4), torch.float32, device, mix="float")
    kwargs["index"][2] = index
    if device.type == "cpu":
        with pytest.raises(IndexError, match=rf"index must lie in \[0, 6\), got {index}"):
            mf.patch_conv(x, w, POLY, **kwargs)
    else:
        logits = mf.patch_conv(x, w.requires_grad_(), POLY, **kwargs)
        logits.sum().backward()
        torch.cuda.synchronize()
        assert logits[2].isnan().all()
        assert logits[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("runs", ["", "x", "w", "xw"])
@pytest.mark.parametrize("mix", [None, "per-sample"])
def test_gradcheck(mix, runs):
    x, w, kwargs = make_inputs((3, 2, 4, 2, 3), torch.float64, "cpu", runs=runs, mix=mix)
    for activation in (mf.PolyReLU(3, 0.1), mf.PowerReLU(3), mf.Power(4)):
        f = functools.partial(mf.patch_conv, activation=activation, **kwargs)
        assert torch.autograd.gradcheck(f, (x.requires_grad_(), w.requires_grad_()))
        assert torch.autograd.gradcheck(f, (x.detach(), w))
        assert torch.autograd.gradcheck(f, (x, w.detach()))


def test_differentiating_twice_raises(backend, device):
    x, w, _ = make_inputs((3, 2, 4, 2, 3), torch.float32, device)
    (grad,) = torch.autograd.grad(mf.patch_conv(x, w.requires_grad_(), POLY).sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()


@pytest.mark.parametrize("runs", ["", "x", "w", "xw"])
@pytest.mark.parametrize("mix", [None, "per-sample"])
def test_opcheck(backend, device, mix, runs):
    if interpreted(backend) and runs in ("x", "w"):
        pytest.skip("long in the interpreter")
    x, w, kwargs = make_inputs((5, 2, 4, 2, 3), torch.float32, device, runs=runs, mix=mix)
    index, lam = kwargs.get("index"), kwargs.get("lam")
    for requires_grad in (False, True):
        args = (x.requires_grad_(requires_grad), w.requires_grad_(requires_grad), index, lam, POLY.polynomial)
        opcheck(torch.ops.mixfeat.patch_conv.default, (*args, 0))
    x, w = x.detach(), w.detach()
    logits, slope = torch.ops.mixfeat.patch_conv(x, w, index, lam, POLY.polynomial, 3 if device.type == "cpu" else 0)
    for needs in ((True, True), (True, False), (False, True)):
        opcheck(
            torch.ops.mixfeat.patch_conv_backward.default,
            (torch.randn_like(logits), slope, x, w, index, lam, POLY.polynomial, *needs),
        )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mix", [None, "float", "per-sample"])
def test_compile(device, backend, mix, dynamic):
    if interpreted(backend) and dynamic:
        pytest.skip("long in the interpreter")
    torch._dynamo.reset()
    compiled = torch.compile(mf.patch_conv, fullgraph=True, dynamic=dynamic)
    for samples in (6, 9):
        x, w, kwargs = make_inputs((samples, 4, 10, 3, 4), torch.float32, device, mix=mix)
        grad = torch.randn(samples, 3, device=device)
        eager = results(mf.patch_conv, x, w, POLY, kwargs, grad)
        for a, b in zip(results(compiled, x, w, POLY, kwargs, grad), eager, strict=True):
            torch.testing.assert_close(a, b)


def test_compiled_training_step(device, backend):
    """The whole step in one graph, with a float lam that changes from step to step."""
    torch._dynamo.reset()
    model = mf.TwoLayerPatchCNN(3, 4, 10, POLY, device=device)
    twin = copy.deepcopy(model)
    x, _, kwargs = make_inputs((6, 4, 10, 3, 4), torch.float32, device, mix="float")
    target = torch.arange(6, device=device) % 3

    def loss(model, lam):
        return torch.nn.functional.cross_entropy(model(x, kwargs["index"], lam), target)

    compiled = torch.compile(loss, fullgraph=True)
    for lam in (0.5, 0.25, 0.1, 0.9):
        for f, m in ((loss, model), (compiled, twin)):
            m.zero_grad()
            f(m, lam).backward()
        torch.testing.assert_close(twin.weight.grad, model.weight.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, device, dtype):
    x, w, kwargs = make_inputs((6, 4, 10, 3, 4), torch.float32, device, mix="per-sample")
    w.requires_grad_()
    with torch.autocast(device.type, dtype):
        logits = mf.patch_conv(x, w, POLY, **kwargs)
        mixed = mf.patch_conv(x.to(dtype), w, POLY, **kwargs)  # dtypes may differ here
    assert logits.dtype == dtype
    assert torch.equal(logits, mf.patch_conv(x.to(dtype), w.to(dtype), POLY, **kwargs))
    assert torch.equal(logits, mixed)
    logits.sum().backward()
    assert w.grad.dtype == torch.float32
    if backend != "triton":
        with torch.autocast(device.type, dtype):  # as PyTorch's own operators, float64 is left alone
            assert mf.patch_conv(x.double(), w.double(), POLY).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_repeats_bit_for_bit_at_any_number_of_threads(dtype):
    before = torch.get_num_threads()
    x, w, kwargs = make_inputs((200, 12, 20, 10, 10), dtype, "cpu", mix="per-sample")
    grad = torch.randn(200, 10)
    try:
        seen = []
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            seen.append(results(mf.patch_conv, x, w, POLY, kwargs, grad))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_memory(run_python):
    """Forward and backward at (256,196,768,10,16) take at most input + weight + 64 MiB."""
    run_python(
        "import resource, torch, mixfeat as mf\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "w = torch.full((10, 16, 768), 1e-3, requires_grad=True)\n"
        "mf.patch_conv(torch.ones(2, 2, 768), w, mf.PolyReLU()).sum().backward()\n"  # code and threads
        "before = peak()\n"
        "x = torch.ones(256, 196, 768)\n"
        "mf.patch_conv(x, w, mf.PolyReLU()).sum().backward()\n"
        "used = peak() - before - x.nbytes - w.nbytes\n"
        "assert used <= 64 << 20, f'{used >> 20} MiB beyond input and weight'\n"
    )


@pytest.mark.gpu
def test_repeats_on_cuda_under_deterministic_algorithms():
    x, w, kwargs = make_inputs((300, 12, 20, 10, 10), torch.float32, "cuda", mix="per-sample")
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (results(mf.patch_conv, x, w, POLY, kwargs, torch.ones(300, 10).cuda()) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 16 << 30, reason="needs 16 GiB of memory on the GPU"
)
def test_more_than_2_31_elements_on_cuda():
    x = torch.ones(2**25 + 3, 4, 18, dtype=torch.bfloat16, device="cuda")
    x[-1] = 2
    w = torch.full((2, 2, 18), 0.01, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    logits = mf.patch_conv(x, w, mf.Identity())
    torch.testing.assert_close(logits[-1], 2 * logits[0])
    logits[-1].sum().backward()
    torch.testing.assert_close(w.grad, torch.full_like(w, 8))


def test_float64_on_cuda_is_the_references(monkeypatch):
    monkeypatch.setattr(mf.backends, "_default", lambda device_type: "triton")
    assert mf.backends.serving("cuda", torch.float64) == "reference"
    assert mf.backends.serving("cuda", torch.float32) == "triton"


X, W, INDEX = torch.zeros(4, 3, 5), torch.zeros(2, 3, 5), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((X, W, "relu"), {}, TypeError, "activation must be a mixfeat activation such as .*, got 'relu'"),
        (([1.0], W, POLY), {}, TypeError, "input must be a tensor, got list"),
        ((X, None, POLY), {}, TypeError, "weight must be a tensor, got NoneType"),
        ((X.long(), W.long(), POLY), {}, TypeError, "input must be float32, .*, got torch.int64"),
        ((X, W.int(), POLY), {}, TypeError, "weight must be float32, .*, got torch.int32"),
        ((X.to(torch.complex64), W, POLY), {}, TypeError, "input must be float32, .*, got torch.complex64"),
        ((X, W.double(), POLY), {}, TypeError, "weight must have input's dtype torch.float32, got torch.float64"),
        ((X[0], W, POLY), {}, ValueError, r"input must have shape \(N,P,D\) or \(R,N,P,D\), got \(3, 5\)"),
        ((X[None, None], W, POLY), {}, ValueError, r"input must have shape .*, got \(1, 1, 4, 3, 5\)"),
        ((X, W[0], POLY), {}, ValueError, r"weight must have shape \(C,M,D\) or \(R,C,M,D\), got \(3, 5\)"),
        (
            (X, W[..., :4], POLY),
            {},
            ValueError,
            r"weight must have input's patch dimension D = 5 .*, got .*\(2, 3, 4\)",
        ),
        ((X.expand(2, 4, 3, 5), W.expand(3, 2, 3, 5), POLY), {}, ValueError, "as many runs R as input, 2, got 3"),
        ((X, W.to("meta"), POLY), {}, ValueError, "weight must be on input's device cpu, got meta"),
        ((X, W, POLY), {"lam": 0.5}, ValueError, r"index is needed where lam is given \(lam = 0.5\)"),
        ((X, W, POLY), {"index": INDEX}, ValueError, "lam is needed where index is given"),
        ((X, W, POLY), {"index": INDEX, "lam": 1.5}, ValueError, r"lam must be in \[0, 1\], got 1.5"),
        ((X, W, POLY), {"index": INDEX, "lam": -0.1}, ValueError, r"lam must be in \[0, 1\], got -0.1"),
        ((X, W, POLY), {"index": INDEX, "lam": math.nan}, ValueError, r"lam must be in \[0, 1\], got nan"),
        ((X, W, POLY), {"index": INDEX, "lam": "half"}, TypeError, "lam must be a number or a tensor, got 'half'"),
        (
            (X, W, POLY),
            {"index": INDEX, "lam": INDEX},
            TypeError,
            "lam must be a floating-point tensor, got torch.int64",
        ),
        (
            (X, W, POLY),
            {"index": INDEX, "lam": torch.ones(3)},
            ValueError,
            r"lam must have shape \(\) or \(4,\), got \(3,\)",
        ),
        (
            (X, W, POLY),
            {"index": INDEX, "lam": torch.ones(4, device="meta")},
            ValueError,
            "lam must be on input's device",
        ),
        (
            (X, W, POLY),
            {"index": INDEX, "lam": torch.ones(4, requires_grad=True)},
            ValueError,
            "lam must not require grad",
        ),
        ((X, W, POLY), {"index": INDEX.int(), "lam": 0.5}, TypeError, "index must be an int64 tensor, got torch.int32"),
        ((X, W, POLY), {"index": [0, 1, 2, 3], "lam": 0.5}, TypeError, "index must be an int64 tensor, got list"),
        ((X, W, POLY), {"index": INDEX[:3], "lam": 0.5}, ValueError, r"index must have shape \(4,\), .*, got \(3,\)"),
        (
            (X, W, POLY),
            {"index": INDEX.to("meta"), "lam": 0.5},
            ValueError,
            "index must be on input's device cpu, got meta",
        ),
    ],
)
def test_refuses(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        mf.patch_conv(*args, **kwargs)
