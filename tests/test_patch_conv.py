import copy
import math

import pytest
import torch
from conftest import compiler
from table import problems

import mixfeat as mf

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


@pytest.mark.parametrize("mix", [None, "per-sample"])
@pytest.mark.parametrize("runs", ["x", "w", "xw"])
def test_runs_are_single_calls(backend, device, runs, mix):
    x, w, kwargs = make_inputs((9, 4, 10, 3, 5), torch.float32, device, runs=runs, mix=mix)
    single = [x[r] if "x" in runs else x for r in range(3)], [w[r] if "w" in runs else w for r in range(3)]
    each = torch.stack([mf.patch_conv(a, b, POLY, **kwargs) for a, b in zip(*single, strict=True)])
    torch.testing.assert_close(mf.patch_conv(x, w, POLY, **kwargs), each)


@pytest.mark.parametrize("saved", [0, 3])
def test_accuracy_where_slopes_are_computed_again(monkeypatch, saved):
    """Of all samples, or of those for which there is no room."""
    for problem in problems("main", backends=["cpu"], operators=["patch_conv"]):
        _, patches, _, classes, filters = problem.case.sizes
        room = saved * patches * classes * filters * problem.dtype.itemsize
        monkeypatch.setattr(mf.ops.patch_conv, "SAVED_BYTES", room)
        problem.hold(problem.draws())


def test_patches_with_weights_of_their_own(backend, device):
    """They are those of the mixed samples, runs and readout included; equal ones are those of the samples."""
    phi = mf.PolyReLU(3, 0.5)
    x, w = torch.randn(3, 5, 4, 8, device=device), torch.randn(3, 2, 3, 8, device=device)
    index, lam = torch.randint(5, (5,), device=device), torch.rand(5, 4, device=device)
    readout = torch.randn(2, 3, device=device)
    logits = mf.patch_conv(x, w, phi, index=index, lam=lam, readout=readout)
    mixed = torch.stack([mf.mixup(one, index, lam) for one in x])
    assert torch.equal(logits, mf.patch_conv(mixed, w, phi, readout=readout))
    patches = mf.patch_conv(x, w, phi, index=index, lam=lam[:, :1].expand(5, 4))
    torch.testing.assert_close(patches, mf.patch_conv(x, w, phi, index=index, lam=lam[:, 0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("runs", ["", "w", "xw"])
def test_slopes_of_long_patches_are_kept(backend, device, runs):
    """By a GPU, where the filters are no more than the entries of a patch."""
    x, w, kwargs = make_inputs((5, 3, 72, 3, 4), torch.float32, device, runs=runs, mix="per-sample")
    if backend == "triton":
        assert mf.ops.patch_conv._samples_to_save(x, w) == 5
        assert mf.ops.patch_conv._samples_to_save(x, w.repeat_interleave(10, -3)) == 0
    x, w = x.requires_grad_(), w.requires_grad_()
    logits = mf.patch_conv(x, w, POLY, **kwargs)
    upstream = torch.randn_like(logits)
    grads = torch.autograd.grad(logits, (x, w), upstream)
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    truth = mf.reference.patch_conv(*exact, POLY, index=kwargs["index"], lam=kwargs["lam"].double())
    true_grads = torch.autograd.grad(truth, exact, upstream.double())
    for value, true in zip((logits, *grads), (truth, *true_grads), strict=True):
        assert (value.double() - true).norm() <= 1e-5 * true.norm()


def test_no_networks(backend, device):
    x, w = torch.zeros(0, 4, 3, 5, device=device), torch.zeros(0, 2, 3, 5, device=device, requires_grad=True)
    for input in (x, torch.zeros(4, 3, 5, device=device)):
        logits = mf.patch_conv(input, w, POLY)
        assert logits.shape == (0, 4, 2)
        logits.sum().backward()
    w = torch.ones(2, 3, 5, device=device, requires_grad=True)
    mf.patch_conv(x, w, POLY).sum().backward()
    assert not w.grad.any()


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


def test_compiled_training_step(device, backend):
    """The whole step in one graph, with a float lam that changes from step to step."""
    torch._dynamo.reset()
    model = mf.TwoLayerPatchCNN(3, 4, 10, POLY, device=device)
    twin = copy.deepcopy(model)
    x, _, kwargs = make_inputs((6, 4, 10, 3, 4), torch.float32, device, mix="float")
    target = torch.arange(6, device=device) % 3

    def loss(model, lam):
        return torch.nn.functional.cross_entropy(model(x, kwargs["index"], lam), target)

    compiled = torch.compile(loss, fullgraph=True, backend=compiler(backend))
    for lam in (0.5, 0.25, 0.1, 0.9):
        for f, m in ((loss, model), (compiled, twin)):
            m.zero_grad()
            f(m, lam).backward()
        torch.testing.assert_close(twin.weight.grad, model.weight.grad)


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
            r"lam must have shape \(\), \(4,\) or \(4,3\), got \(3,\)",
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
