import copy
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import compiler, error, interpreted

import mixfeat as mf
from mixfeat import reference
from mixfeat.ops import fallback
from mixfeat.ops.pairwise_mixup_loss import merged_nodes, pairwise_mixup_block

POLY = mf.PolyReLU(8, 0.1)
ACTIVATIONS = [
    POLY,
    mf.PolyReLU(1, 0.3),
    mf.PolyReLU(5, 0.2, clamp=False),
    mf.PolyReLU(16, 0.5),
    mf.PowerReLU(3),
    mf.Power(2),
    mf.ReLU(),
    mf.Identity(),
    mf.LeakyReLU(0.2),
    mf.PolyReLU(6, 0.2, negative_slope=-0.5),
]
NODES = {
    "midpoint": {},
    "lam": {"lam": 0.3},
    "zero": {"lam": 0.0},
    "uniform": dict(zip(("lam", "lam_weight"), mf.beta_quadrature(1.0, 3), strict=True)),
    "any": {"lam": torch.tensor([0.1, 0.5, 0.7]), "lam_weight": torch.tensor([0.25, 0.25, 0.5])},
}


def make_inputs(shape, dtype, device, *, runs=""):
    """Random arguments; pre-activations are of the order of the threshold. runs: which of "x", "w", "y" have R = 3."""
    samples, patches, features, classes, filters = shape
    x = torch.randn(*[3] * ("x" in runs), samples, patches, features, dtype=torch.float64)
    w = torch.randn(*[3] * ("w" in runs), classes, filters, features, dtype=torch.float64) * 0.1 / math.sqrt(features)
    y = torch.randint(classes, (*[3] * ("y" in runs), samples), device=device)
    return x.to(device, dtype), w.to(device, dtype), y


def results(f, x, w, y, activation, kwargs, grad=None):
    """The loss and the gradients to input and weight."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    loss = f(x, w, y, activation, **kwargs)
    return loss.detach(), *torch.autograd.grad(loss, (x, w), torch.ones_like(loss) if grad is None else grad.to(loss))


def test_loss_of_many_samples_is_summed_exactly():
    """Within 1e-6 of float64 at N = 2048: sums over 4 million pairs do not lose what their terms have."""
    x, w, y = make_inputs((2048, 2, 5, 4, 4), torch.float32, "cpu")
    loss = mf.pairwise_mixup_loss(x, w, y, POLY)
    exact = mf.pairwise_mixup_loss(x.double(), w.double(), y, POLY)
    assert abs(loss.item() / exact.item() - 1) <= 1e-6


def skipping(activation, dtype):
    """Pre-activations whose blocks are all zero, all on the line, mixed, and by class either."""
    rho = activation.polynomial.threshold
    samples, classes = 40, 4
    y = torch.arange(samples) % classes
    sign = torch.where(torch.arange(classes) == y[:, None], 1.0, -1.0)[:, None, :, None]
    for shift in (-3.0, 3.0, sign * 3, torch.randn(1, 3, classes, 9) * 3):
        s = (rho * (torch.randn(2, samples, 3, classes, 9) + shift)).to(dtype)
        for lam, weight in (([0.5], [1.0]), ([0.2, 0.5], [0.4, 0.6])):
            for column, column_target in ((None, None), (s[:, ::2] * 0.9, y[::2])):
                arguments = (y, column_target, lam, weight, activation.polynomial, True)
                mine = pairwise_mixup_block(s, column, *arguments)
                true = fallback.pairwise_mixup_block(
                    s.double(), None if column is None else column.double(), *arguments
                )[:3]
                for a, b in zip(mine, true, strict=True):
                    if b is not None:
                        assert error([a], [b]) <= (1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_skipping_is_exact(activation, dtype):
    skipping(activation, dtype)


def check_instruction_set():
    for activation in ACTIVATIONS:
        skipping(activation, torch.float32)


@pytest.mark.parametrize(
    "activation", [mf.ReLU(), mf.LeakyReLU(0.1), mf.PolyReLU(1, 0.5), mf.PolyReLU(3, 0.5)], ids=repr
)
def test_slope_at_a_corner(backend, device, activation):
    """Patches of pre-activation 0 beside positive ones: the slope is that on the left, as PyTorch has it."""
    x, w, y = torch.rand(9, 4, 5), torch.rand(3, 4, 5), torch.randint(3, (9,), device=device)
    w[..., 4] = 0
    x[:2] = torch.tensor([0.0, 0, 0, 0, 1])
    arguments = [t.to(device).requires_grad_() for t in (x, w)]
    exact = [t.to(device, torch.float64).requires_grad_() for t in (x, w)]
    found = torch.autograd.grad(mf.pairwise_mixup_loss(*arguments, y, activation), arguments)
    expected = torch.autograd.grad(reference.pairwise_mixup_loss(*exact, y, activation), exact)
    assert all(error([a], [b]) <= 1e-5 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("runs", ["", "w", "w and readout"])
@pytest.mark.parametrize("activation", [POLY, mf.PolyReLU(4, 0.01), mf.Power(3), mf.Identity()], ids=repr)
def test_signs_as_readout(activation, runs, dtype):
    """They are folded into the kernels' loops. Vectors hold filters of either sign, or of both, or are half full."""
    for shape in [(9, 12, 20, 3, 10), (17, 5, 3, 4, 7), (7, 1, 2, 3, 1), (5, 3, 4, 2, 16)]:
        x, w, y = make_inputs(shape, torch.float64, "cpu", runs=runs)
        for share in (0.0, 0.3, 1.0):
            drawn = torch.rand(*[3] * ("readout" in runs), *shape[-2:], dtype=torch.float64)
            readout = torch.where(drawn < share, -0.3, 0.3)
            nodes = NODES["any"] if share == 0.3 else {}
            options = {"readout": readout, **nodes}
            found = results(mf.pairwise_mixup_loss, x.to(dtype), w.to(dtype), y, activation, options)
            options.update((name, value.tolist()) for name, value in nodes.items())
            truth = results(reference.pairwise_mixup_loss, x, w, y, activation, options)
            for result, true in zip(found, truth, strict=True):
                assert error([result], [true]) <= (1e-13 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("need_grad", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(7, 5), (1, 40), (33, 2), (3, 0), (0, 4)])
def test_blocks_of_rows_and_columns(backend, device, rows, columns, need_grad):
    """Rows and columns of different samples, numbers and targets; weights of any sum."""
    if interpreted(backend) and max(rows, columns) > 7:
        pytest.skip("long in the interpreter; tests of the kernels have more")
    row, column = (torch.randn(2, n, 3, 4, 5, device=device) * 0.1 for n in (rows, columns))
    row_target, column_target = (torch.randint(4, (2, n), device=device) for n in (rows, columns))
    arguments = (row_target, column_target, [0.3, 0.5], [0.01, 0.002], POLY.polynomial, need_grad)
    mine = pairwise_mixup_block(row, column, *arguments)
    true = fallback.pairwise_mixup_block(row.double(), column.double(), *arguments)[:3]
    for a, b in zip(mine, true, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert a.shape == b.shape
            assert error([a], [b]) <= 1e-5


def test_a_problem_is_the_sum_of_its_blocks(backend, device):
    """What sharding relies on: blocks on the diagonal, and each pair of different blocks both ways."""
    s = torch.randn(1, 20, 3, 4, 5, device=device) * 0.1
    y = torch.randint(4, (20,), device=device)
    tail = ([0.3], [1 / 400], POLY.polynomial, True)
    whole, grad, _ = pairwise_mixup_block(s, None, y, None, *tail)
    total, parts = 0, torch.zeros_like(grad)
    cuts = (slice(0, 7), slice(7, 8), slice(8, 20))
    for a in cuts:
        for b in cuts:
            same = a == b
            loss, rows, columns = pairwise_mixup_block(
                s[:, a], None if same else s[:, b], y[a], None if same else y[b], *tail
            )
            total = total + loss
            parts[:, a] += rows
            if not same:
                parts[:, b] += columns
    assert error([total], [whole.double()]) <= 1e-6
    assert error([parts], [grad.double()]) <= 1e-5


def test_strided_pre_activations(backend, device):
    y = torch.randint(3, (6, 2), device=device)[:, 0]
    s = torch.randn(3, 4, 5, 6, 2, device=device).permute(4, 3, 2, 0, 1) * 0.1  # strided filters
    mine = pairwise_mixup_block(s, None, y, None, [0.5], [1.0], POLY.polynomial, True)
    true = fallback.pairwise_mixup_block(s.double(), None, y, None, [0.5], [1.0], POLY.polynomial, True)
    assert error(mine[:2], true[:2]) <= 1e-5


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_what_is_not_finite_shows(backend, device, activation, value):
    """In one sample among several blocks; no crash, and in the middle of zero and of linear blocks too."""
    if interpreted(backend) and activation != POLY:
        pytest.skip("long in the interpreter; tests of the kernels have more")
    for shift in (-1, 0, 1):
        s = torch.randn(2, 20, 3, 4, 5, device=device) * 0.1 + shift
        s[1, 7] = value
        y = torch.randint(4, (20,), device=device)
        loss, grad, _ = pairwise_mixup_block(s, None, y, None, [0.5], [1 / 400], activation.polynomial, True)
        expected = fallback.pairwise_mixup_block(s, None, y, None, [0.5], [1 / 400], activation.polynomial, True)[0]
        assert loss[0].isfinite()
        assert grad[0].isfinite().all()
        assert loss[1].isfinite() <= expected[1].isfinite()


@pytest.mark.parametrize("target", [-1, 3, 2**40])
def test_target_out_of_range(backend, device, target):
    x, w, y = make_inputs((6, 4, 10, 3, 4), torch.float32, device)
    y[2] = target
    if device.type == "cpu":
        with pytest.raises(IndexError, match=rf"target must lie in \[0, 3\), got {target}"):
            mf.pairwise_mixup_loss(x, w, y, POLY)
    else:
        assert mf.pairwise_mixup_loss(x, w, y, POLY).isnan()


def test_compiled_training_step(device, backend):
    """The module in one graph; and a float lam that changes from step to step."""
    torch._dynamo.reset()
    model = mf.TwoLayerPatchCNN(3, 4, 10, POLY, num_runs=2, device=device)
    twin = copy.deepcopy(model)
    x, _, y = make_inputs((6, 4, 10, 3, 4), torch.float32, device)

    module = mf.PairwiseMixupLoss(*mf.beta_quadrature(1.0, 3))

    def loss(model, lam):
        if lam is None:
            return module(model, x, y).sum()
        return mf.pairwise_mixup_loss(x, model.weight, y, POLY, lam=lam).sum()

    compiled = torch.compile(loss, fullgraph=True, backend=compiler(backend))
    for lam in (0.5, 0.25) if interpreted(backend) else (0.5, 0.25, 0.9, None):
        for f, m in ((loss, model), (compiled, twin)):
            m.zero_grad()
            f(m, lam).backward()
        torch.testing.assert_close(twin.weight.grad, model.weight.grad)


@pytest.mark.parametrize("runs", ["", "xwy"])
@pytest.mark.parametrize("nodes", ["midpoint", "any"])
def test_repeats_bit_for_bit_at_any_number_of_threads(nodes, runs):
    before = torch.get_num_threads()
    x, w, y = make_inputs((120, 12, 20, 10, 10), torch.float32, "cpu", runs=runs)
    s = torch.randn(3 if runs else 1, 120, 12, 10, 10) * 0.1
    lam, weight = ([0.5], [1.0]) if nodes == "midpoint" else map(torch.Tensor.tolist, NODES[nodes].values())
    try:
        seen = []
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            loss, grad, _ = pairwise_mixup_block(s, None, y, None, lam, weight, POLY.polynomial, True)
            seen.append((loss, grad))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))
    first, second = (results(mf.pairwise_mixup_loss, x, w, y, POLY, NODES[nodes]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_is_linear_in_the_samples(run_python):
    """A step at N = 2,000 takes a few times its pre-activations' 9.6 MB; the pairs' logits alone would be 160 MB."""
    run_python(
        "import resource, torch, mixfeat as mf\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "def step(n):\n"
        "  x, w = torch.ones(n, 12, 4), torch.full((10, 10, 4), 1e-2, requires_grad=True)\n"
        "  mf.pairwise_mixup_loss(x, w, torch.arange(n) % 10, mf.PolyReLU()).backward()\n"
        "step(10)\n"
        "before = peak()\n"
        "step(2000)\n"
        "used = peak() - before\n"
        "assert used <= 8 * 9_600_000, f'{used >> 20} MiB'\n"
    )


@pytest.mark.gpu
def test_cuda_graph_of_a_training_step():
    """A whole step, captured and replayed, does what eager steps do."""
    x, w, y = make_inputs((50, 12, 20, 10, 5), torch.float32, "cuda", runs="w")
    eager, captured = w.clone().requires_grad_(), w.clone().requires_grad_()

    def step(weight):
        (grad,) = torch.autograd.grad(mf.pairwise_mixup_loss(x, weight, y, POLY).sum(), weight)
        with torch.no_grad():
            weight.sub_(grad, alpha=1.0)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(captured)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured)
    with torch.no_grad():
        captured.copy_(w)
    for _ in range(5):
        step(eager)
        graph.replay()
    torch.testing.assert_close(captured, eager)


class TestBetaQuadrature:
    @pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5, 1, 2, 10, 1e4])
    @pytest.mark.parametrize("num_nodes", [1, 2, 3, 8, 33])
    def test_is_exact_for_polynomials(self, alpha, num_nodes):
        """E lam^n of Beta(alpha, alpha) is prod_{i<n} (alpha + i) / (2 alpha + i)."""
        lam, weight = mf.beta_quadrature(alpha, num_nodes)
        assert lam.dtype == weight.dtype == torch.float64
        moment = 1.0
        for n in range(2 * num_nodes):
            assert (weight * lam**n).sum().item() == pytest.approx(moment, rel=1e-12)
            moment *= (alpha + n) / (2 * alpha + n)

    def test_uniform_is_gauss_legendre(self):
        nodes, weights = np.polynomial.legendre.leggauss(7)
        lam, weight = mf.beta_quadrature(1.0, 7)
        np.testing.assert_allclose(lam, (1 + nodes) / 2, atol=1e-15)
        np.testing.assert_allclose(weight, weights / 2, atol=1e-15)

    @pytest.mark.parametrize("alpha", [1e-6, 0.3, 1, 7.5, 1e8])
    def test_is_symmetric(self, alpha):
        lam, weight = mf.beta_quadrature(alpha, 9)
        assert torch.equal(weight, weight.flip(0))
        assert lam[4] == 0.5
        assert ((lam >= 0) & (lam <= 1)).all()
        torch.testing.assert_close(lam + lam.flip(0), torch.ones_like(lam), atol=1e-15, rtol=0)
        assert weight.ge(0).all()
        assert weight.sum().item() == pytest.approx(1, abs=1e-15)

    def test_dtype_and_device(self):
        lam, weight = mf.beta_quadrature(1, 2, dtype=torch.float32, device="meta")
        assert lam.dtype == weight.dtype == torch.float32
        assert lam.device.type == weight.device.type == "meta"

    @pytest.mark.parametrize(
        ("args", "kwargs", "error", "message"),
        [
            ((0, 3), {}, ValueError, r"alpha must be finite and positive, got 0 .*lam=0\.5"),
            ((-1.0, 3), {}, ValueError, "alpha must be finite and positive, got -1.0"),
            ((math.inf, 3), {}, ValueError, "alpha must be finite and positive, got inf"),
            ((math.nan, 3), {}, ValueError, "alpha must be finite and positive, got nan"),
            (("1", 3), {}, TypeError, "alpha must be a number, got '1'"),
            ((1.0, 0), {}, ValueError, "num_nodes must be at least 1, got 0"),
            ((1.0, 2.0), {}, TypeError, "num_nodes must be an integer, got 2.0"),
            ((1.0, 2), {"dtype": torch.int64}, TypeError, "dtype must be a floating-point dtype, got torch.int64"),
        ],
    )
    def test_refuses(self, args, kwargs, error, message):
        with pytest.raises(error, match=message):
            mf.beta_quadrature(*args, **kwargs)


def test_mirrored_nodes_share_their_work():
    """8 nodes of a symmetric rule are 4, each visiting all ordered pairs; an odd rule has the midpoint besides."""
    for count, expected in ((8, 4), (9, 5), (1, 1)):
        assert len(merged_nodes(*mf.beta_quadrature(0.3, count), torch.float64)) == expected
        single = mf.beta_quadrature(0.3, count, dtype=torch.float32)
        assert len(merged_nodes(*single, torch.float32)) == expected
    assert len(merged_nodes(*(t.bfloat16() for t in mf.beta_quadrature(0.3, 8)), torch.float32)) == 8  # apart by 1e-3
    assert len(merged_nodes(*mf.beta_quadrature(0.3, 8, dtype=torch.float32), torch.float64)) > 4  # apart by 1e-8


class TestModule:
    def test_is_the_function(self, backend, device):
        x, _, y = make_inputs((6, 4, 10, 3, 4), torch.float32, device)
        model = mf.TwoLayerPatchCNN(3, 4, 10, POLY, num_runs=2, device=device)
        for kwargs in [NODES["any"]] if interpreted(backend) else NODES.values():
            module = mf.PairwiseMixupLoss(**kwargs).to(device)
            assert torch.equal(module(model, x, y), mf.pairwise_mixup_loss(x, model.weight, y, POLY, **kwargs))

    def test_pickles_and_says_what_it_is(self):
        module = mf.PairwiseMixupLoss(*mf.beta_quadrature(1.0, 2))
        twin = pickle.loads(pickle.dumps(module))
        assert torch.equal(twin.lam, module.lam)
        assert repr(mf.PairwiseMixupLoss()) == "PairwiseMixupLoss(lam=[0.5], lam_weight=[1.0])"

    def test_refuses(self):
        with pytest.raises(ValueError, match="lam must be in"):
            mf.PairwiseMixupLoss(1.5)
        with pytest.raises(ValueError, match="lam_weight must sum to 1"):
            mf.PairwiseMixupLoss(torch.tensor([0.5]), torch.tensor([0.9]))
        with pytest.raises(TypeError, match="model must be a TwoLayerPatchCNN"):
            mf.PairwiseMixupLoss()(torch.nn.Linear(2, 2), torch.zeros(1, 1, 2), torch.zeros(1, dtype=torch.int64))


X, W, Y = torch.zeros(4, 3, 5), torch.zeros(2, 3, 5), torch.zeros(4, dtype=torch.int64)
HALF, ONE = torch.tensor([0.5]), torch.ones(1)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((X, W, Y, "relu"), {}, TypeError, "activation must be a mixfeat activation such as .*, got 'relu'"),
        (([1.0], W, Y, POLY), {}, TypeError, "input must be a tensor, got list"),
        ((X, W.double(), Y, POLY), {}, TypeError, "weight must have input's dtype torch.float32, got torch.float64"),
        ((X, W[..., :4], Y, POLY), {}, ValueError, "weight must have input's patch dimension D = 5"),
        ((X, W[:1], Y, POLY), {}, ValueError, r"weight must have at least 2 classes .*, got shape \(1, 3, 5\)"),
        ((X, W, [0, 1, 0, 1], POLY), {}, TypeError, "target must be an int64 tensor of classes, got list"),
        ((X, W, Y.int(), POLY), {}, TypeError, "target must be an int64 tensor of classes, got torch.int32"),
        ((X, W, Y.float(), POLY), {}, TypeError, "target must be an int64 tensor of classes, got torch.float32"),
        ((X, W, Y[:3], POLY), {}, ValueError, r"target must have shape \(4,\), .*, got \(3,\)"),
        ((X, W.expand(3, 2, 3, 5), Y.expand(2, 4), POLY), {}, ValueError, r"target must have shape \(4,\) or \(3, 4\)"),
        ((X, W, Y.to("meta"), POLY), {}, ValueError, "target must be on input's device cpu, got meta"),
        ((X, W, Y + 2, POLY), {}, IndexError, r"target must lie in \[0, 2\), got 2"),
        ((X, W, Y - 1, POLY), {}, IndexError, r"target must lie in \[0, 2\), got -1"),
        ((X, W, Y, POLY), {"lam": 1.5}, ValueError, r"lam must be in \[0, 1\], got 1.5"),
        ((X, W, Y, POLY), {"lam": math.nan}, ValueError, r"lam must be in \[0, 1\], got nan"),
        ((X, W, Y, POLY), {"lam": "half"}, TypeError, "lam must be a number, or a tensor of nodes .*, got 'half'"),
        ((X, W, Y, POLY), {"lam": HALF}, ValueError, "lam_weight is needed where lam is a tensor of nodes"),
        ((X, W, Y, POLY), {"lam_weight": ONE}, ValueError, r"lam must be a tensor of nodes \(K,\) where lam_weight is"),
        ((X, W, Y, POLY), {"lam": HALF, "lam_weight": ONE * 0.9}, ValueError, "lam_weight must sum to 1, got"),
        ((X, W, Y, POLY), {"lam": HALF, "lam_weight": ONE * math.nan}, ValueError, "lam_weight must sum to 1, got"),
        ((X, W, Y, POLY), {"lam": HALF * 3, "lam_weight": ONE}, ValueError, r"lam must be in \[0, 1\], got \[1.5\]"),
        ((X, W, Y, POLY), {"lam": HALF[:0], "lam_weight": ONE[:0]}, ValueError, "lam must be a tensor of nodes"),
        ((X, W, Y, POLY), {"lam": HALF, "lam_weight": torch.ones(2)}, ValueError, r"lam_weight must have lam's shape"),
        ((X, W, Y, POLY), {"lam": HALF, "lam_weight": [1.0]}, TypeError, "lam_weight must be a floating-point tensor"),
        ((X, W, Y, POLY), {"lam": Y[:1], "lam_weight": ONE}, TypeError, "lam must be a floating-point tensor, got"),
        ((X, W, Y, POLY), {"lam": HALF.to("meta"), "lam_weight": ONE}, ValueError, "lam must be on the CPU"),
        (
            (X, W, Y, POLY),
            {"lam": HALF.clone().requires_grad_(), "lam_weight": ONE},
            ValueError,
            "lam must not require grad",
        ),
    ],
)  # fmt: skip
def test_refuses(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        mf.pairwise_mixup_loss(*args, **kwargs)
