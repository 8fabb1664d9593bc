import math

import pytest
import torch
import torch.nn.functional as F
from conftest import error, interpreted

import mixfeat as mf
from mixfeat import ops, reference

POLY = mf.PolyReLU(8, 0.1)
# (N, P, D, C, M): odd, degenerate, one class per vector, several blocks of samples
SHAPES = [(7, 3, 5, 3, 4), (1, 1, 1, 2, 1), (2, 1, 20, 2, 20), (35, 1, 4, 2, 3), (50, 2, 20, 10, 5), (18, 17, 3, 4, 2)]
OBJECTIVES = {
    "erm": {"lam": None},
    "midpoint": {},
    "lam": {"lam": 0.3},
    "uniform": dict(zip(("lam", "lam_weight"), mf.beta_quadrature(1.0, 3), strict=True)),
    "any": {"lam": torch.tensor([0.1, 0.5, 0.7]), "lam_weight": torch.tensor([0.25, 0.25, 0.5])},
}
DESCENT = {"lr": 0.05, "steps": 12, "momentum": 0.5, "weight_decay": 0.01}


def make_inputs(shape, dtype=torch.float32, *, runs="", device="cpu"):
    """Random arguments; pre-activations are of the order of the threshold. runs: which of "x", "w", "y" have R = 3."""
    samples, patches, patch_dim, classes, filters = shape
    x = torch.randn(*[3] * ("x" in runs), samples, patches, patch_dim, dtype=torch.float64)
    w = torch.randn(*[3] * ("w" in runs), classes, filters, patch_dim, dtype=torch.float64) * 0.1 / math.sqrt(patch_dim)
    y = torch.randint(classes, (*[3] * ("y" in runs), samples), device=device)
    return x.to(device, dtype), w.to(device, dtype), y


def by_sgd(x, w, y, activation, *, lr, steps, momentum=0.0, weight_decay=0.0, **nodes):
    """Train by a loop of the public operators and torch.optim.SGD, every run with a step size of its own."""
    runs = x.shape[:-3] or w.shape[:-3]
    weights = [v.clone().requires_grad_() for v in (w.expand(*runs, *w.shape[-3:]) if runs else w[None])]
    rates = torch.as_tensor(lr, dtype=torch.float64)
    if rates.dim() == 1:
        rates = rates[:, None] if rates.shape == runs else rates
    rates = rates.expand(len(weights), steps)
    optimizer = torch.optim.SGD(
        [{"params": [v]} for v in weights], lr=1.0, momentum=momentum, weight_decay=weight_decay
    )
    losses = []
    for step in range(steps):
        weight = torch.stack(weights) if runs else weights[0]
        if nodes.get("lam", 0.5) is None:
            logits = mf.patch_conv(x, weight, activation)
            target = y.expand(logits.shape[:-1])
            loss = (
                F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none").view(target.shape).mean(-1)
            )
        else:
            loss = mf.pairwise_mixup_loss(x, weight, y, activation, **nodes)
        optimizer.zero_grad()
        loss.sum().backward()
        for group, rate in zip(optimizer.param_groups, rates[:, step].tolist(), strict=True):
            group["lr"] = rate
        optimizer.step()
        losses.append(loss.detach())
    trained = torch.stack([v.detach() for v in weights])
    return (trained if runs else trained[0]), torch.stack(losses, -1)


def check(x, w, y, activation=POLY, **options):
    """Compare with the loop in float64.

    Losses and weights have the budget of values. The change of the weight has that of gradients, plus what storing the
    weight after each step rounds off.
    """
    options = {**DESCENT, **options}
    weight, loss = mf.gradient_descent(x, w, y, activation, **options)
    with mf.backend("reference"):
        true_weight, true_loss = by_sgd(x.double(), w.double(), y, activation, **options)
    assert (weight.dtype, weight.shape, loss.shape) == (w.dtype, true_weight.shape, true_loss.shape)
    assert loss.dtype == torch.promote_types(w.dtype, torch.float32)
    budget = 1e-13 if w.dtype == torch.float64 else 1e-5
    assert error([loss], [true_loss]) <= budget
    assert error([weight], [true_weight]) <= budget
    change, true_change = weight.double() - w.double(), true_weight - w.double()
    rounding = options["steps"] * torch.finfo(w.dtype).eps / 2 * true_weight.norm() / true_change.norm().clamp(1e-300)
    assert error([change], [true_change]) <= budget + rounding


@pytest.fixture(autouse=True)
def _few_threads(one_thread):
    pass


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(backend, device, shape, dtype, objective):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("triton does not serve float64")
    if interpreted(backend) and (shape != SHAPES[0] or objective not in ("erm", "midpoint")):
        pytest.skip("long in the interpreter")
    check(*make_inputs(shape, dtype, device=device), **OBJECTIVES[objective])


@pytest.mark.parametrize(
    "lr", [0.1, torch.tensor(0.1), torch.linspace(0, 0.2, 12), torch.tensor([0.0, 0.05, 0.1]), torch.rand(3, 12) / 10]
)
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"weight_decay": 0.1}, {"momentum": 0.9, "weight_decay": 0.1}]
)
def test_step_sizes_momentum_and_decay(lr, options):
    plain = {"momentum": 0.0, "weight_decay": 0.0}
    check(*make_inputs((7, 3, 6, 3, 4), runs="w"), lr=lr, **{**plain, **options})


def test_step_sizes_with_both_dimensions():
    """Where R = steps the shape tells which is meant."""
    x, w, y = make_inputs((5, 2, 3, 2, 2), runs="w")
    lr = torch.rand(3)
    for shape in ((3, 1), (1, 3)):
        rates = lr.view(shape).expand(3, 3)
        for a, b in zip(
            mf.gradient_descent(x, w, y, POLY, lr=lr.view(shape), steps=3),
            mf.gradient_descent(x, w, y, POLY, lr=rates, steps=3),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_reference_is_the_loop():
    x, w, y = make_inputs((6, 2, 4, 3, 2), torch.float64, runs="wy")
    for lam in (None, 0.3):
        formula = reference.gradient_descent(x, w, y, POLY, lam=lam, **DESCENT)
        for a, b in zip(formula, by_sgd(x, w, y, POLY, lam=lam, **DESCENT), strict=True):
            assert error([a], [b]) <= 1e-13


@pytest.mark.parametrize("objective", ["erm", "midpoint"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_trained_in_float32(backend, device, dtype, objective):
    if interpreted(backend):
        pytest.skip("long in the interpreter")
    x, w, y = make_inputs((7, 3, 6, 3, 4), dtype, device=device)
    weight, loss = mf.gradient_descent(x, w, y, POLY, **DESCENT, **OBJECTIVES[objective])
    wide, wide_loss = mf.gradient_descent(x.float(), w.float(), y, POLY, **DESCENT, **OBJECTIVES[objective])
    assert (weight.dtype, loss.dtype) == (dtype, torch.float32)
    assert torch.equal(weight, wide.to(dtype))
    assert torch.equal(loss, wide_loss)


def test_autocast_leaves_the_weight_in_its_dtype():
    x, w, y = make_inputs((7, 3, 6, 3, 4))
    expected = mf.gradient_descent(x.bfloat16().float(), w, y, POLY, **DESCENT)
    with torch.autocast("cpu"):
        results = mf.gradient_descent(x.bfloat16(), w, y, POLY, **DESCENT)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_steps(backend, device, objective):
    x, w, y = make_inputs((7, 3, 6, 3, 4), runs="w", device=device)
    weight, loss = mf.gradient_descent(x, w, y, POLY, lr=0.1, steps=0, momentum=0.5, **OBJECTIVES[objective])
    assert torch.equal(weight, w)
    assert weight.data_ptr() != w.data_ptr()
    assert loss.shape == (3, 0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_samples(backend, device, objective):
    """As the loss of no pairs the cross-entropy of no samples is 0: only decay changes the weight."""
    x, w, y = make_inputs((0, 3, 6, 3, 4), device=device)
    weight, loss = mf.gradient_descent(x, w, y, POLY, lr=0.5, steps=2, weight_decay=0.5, **OBJECTIVES[objective])
    assert torch.equal(loss, torch.zeros(2, device=device))
    torch.testing.assert_close(weight, w * 0.75**2)


def test_no_runs(backend, device):
    x, w, y = make_inputs((7, 3, 6, 3, 4), device=device)
    weight, loss = mf.gradient_descent(x, w.expand(0, 3, 4, 6), y, POLY, lr=0.1, steps=2, lam=None)
    assert (weight.shape, loss.shape) == ((0, 3, 4, 6), (0, 2))


@pytest.mark.parametrize("objective", ["erm", "midpoint", "any"])
@pytest.mark.parametrize("runs", ["", "w", "xwy"])
def test_repeats_bit_for_bit_at_any_number_of_threads(objective, runs):
    arguments = make_inputs((50, 3, 6, 3, 4), runs=runs)
    results = []
    for threads in (1, 2, 3, 7, 2):
        torch.set_num_threads(threads)
        results.append(mf.gradient_descent(*arguments, POLY, lr=0.1, steps=20, momentum=0.5, **OBJECTIVES[objective]))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_threads_share_a_large_network():
    """Few networks of much work are divided among the threads, with the same bits."""
    arguments = make_inputs((96, 12, 16, 10, 20))
    one = mf.gradient_descent(*arguments, POLY, lr=0.1, steps=2, lam=0.3)
    torch.set_num_threads(4)
    four = mf.gradient_descent(*arguments, POLY, lr=0.1, steps=2, lam=0.3)
    assert all(torch.equal(a, b) for a, b in zip(one, four, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("objective", ["erm", "midpoint", "any"])
def test_a_run_in_pieces_is_the_unbroken_run(objective, dtype):
    """Bit for bit: without momentum by the public function, with it by the operator that hands on its buffer."""
    x, w, y = make_inputs((20, 3, 6, 3, 4), dtype, runs="w")
    lr = torch.rand(15)
    whole = mf.gradient_descent(x, w, y, POLY, lr=lr, steps=15, weight_decay=0.1, **OBJECTIVES[objective])
    weight, losses = w, []
    for part in lr.split([4, 1, 10]):
        options = {"lr": part, "steps": len(part), "weight_decay": 0.1}
        weight, loss = mf.gradient_descent(x, weight, y, POLY, **options, **OBJECTIVES[objective])
        losses.append(loss)
    assert torch.equal(weight, whole[0])
    assert torch.equal(torch.cat(losses, 1), whole[1])

    lam, lam_weight = OBJECTIVES[objective].get("lam", torch.tensor([0.5])), OBJECTIVES[objective].get("lam_weight")
    if lam is not None and lam_weight is None:
        lam_weight = torch.ones(1)
    fixed = (x, y, lam, lam_weight, POLY.polynomial, lr.double()[None])

    def run(weight, first, last, buffer):
        x, y, *nodes, lr = fixed
        options = (lr[:, first:last], last - first, 0.9, 0.1, buffer)
        return ops.gradient_descent.gradient_descent(x, weight, y, *nodes, *options)

    whole = run(w, 0, 15, None)
    weight, buffer, losses = w, None, []
    for first, last in ((0, 4), (4, 5), (5, 15)):
        weight, loss, buffer = run(weight, first, last, buffer)
        losses.append(loss)
    for a, b in zip((weight, torch.cat(losses, 1), buffer), whole, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("objective", ["erm", "midpoint", "any"])
@pytest.mark.parametrize("start", [1e20, math.inf, math.nan])
def test_a_network_that_leaves_the_finite_numbers_shows_it_and_disturbs_no_other(backend, device, objective, start):
    if interpreted(backend):
        pytest.skip("long in the interpreter")
    x, w, y = make_inputs((10, 3, 6, 3, 4), runs="w", device=device)
    options = {"lr": 0.1, "steps": 6, **OBJECTIVES[objective]}
    alone = mf.gradient_descent(x, w, y, mf.PowerReLU(8), **options)
    bad = w.clone()
    bad[1] = start * bad[1].abs()
    weight, loss = mf.gradient_descent(x, bad, y, mf.PowerReLU(8), **options)
    assert not loss[1].isfinite().any()
    for a, b in ((weight, alone[0]), (loss, alone[1])):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
        assert b.isfinite().all()


def test_is_not_differentiable():
    x, w, y = make_inputs((5, 2, 3, 2, 2))
    for arguments in ((x.clone().requires_grad_(), w, y), (x, torch.nn.Parameter(w), y)):
        for result in mf.gradient_descent(*arguments, POLY, lr=0.1, steps=2):
            with pytest.raises(
                RuntimeError, match="gradient_descent is not differentiable: detach its input and weight"
            ):
                result.sum().backward()
    with torch.no_grad():
        weight, loss = mf.gradient_descent(x, torch.nn.Parameter(w), y, POLY, lr=0.1, steps=2)
    assert not weight.requires_grad
    assert not loss.requires_grad
    with pytest.raises(NotImplementedError, match="gradient_descent has no forward-mode derivative"):
        torch.func.jvp(lambda w: mf.gradient_descent(x, w, y, POLY, lr=0.1, steps=2)[1], (w,), (w,))


@pytest.mark.gpu
@pytest.mark.parametrize("objective", ["erm", "midpoint", "any"])
def test_loop_in_a_cuda_graph(objective):
    """Neither waits for the device nor differs from the steps one by one."""
    arguments = make_inputs((20, 3, 16, 3, 4), runs="w", device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        options = {"momentum": 0.5, "weight_decay": 0.1, **OBJECTIVES[objective]}
        mf.gradient_descent(*arguments, POLY, lr=0.1, steps=30, **options)
        torch.cuda.set_sync_debug_mode("error")
        weight, loss = mf.gradient_descent(*arguments, POLY, lr=0.1, steps=30, **options)
        torch.cuda.set_sync_debug_mode("default")
        expected = by_sgd(*arguments, POLY, lr=0.1, steps=30, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    for a, b in zip((weight, loss), expected, strict=True):
        assert error([a], [b]) <= 1e-5


X, W, Y = make_inputs((4, 2, 3, 2, 2))
W3 = W.expand(3, 2, 2, 3)


@pytest.mark.parametrize(
    ("args", "kwargs", "kind", "message"),
    [
        ((X.numpy(), W, Y, POLY), {}, TypeError, "input must be a tensor, got ndarray"),
        ((X, W.double(), Y, POLY), {}, TypeError, r"weight must have input's dtype torch\.float32, got torch\.float64"),
        ((X, W[:1], Y, POLY), {}, ValueError, r"weight must have at least 2 classes \(C\) for a cross-entropy"),
        ((X, W, Y[:3], POLY), {}, ValueError, r"target must have shape \(4,\), one class for each sample, got \(3,\)"),
        ((X, W, Y + 2, POLY), {}, IndexError, r"target must lie in \[0, 2\), got"),
        ((X, W, Y + 2, POLY), {"lam": None}, IndexError, r"target must lie in \[0, 2\), got"),
        ((X, W, Y, "relu"), {}, TypeError, "activation must be a mixfeat activation such as"),
        ((X, W, Y, POLY), {"lam": 1.5}, ValueError, r"lam must be in \[0, 1\], got 1\.5"),
        ((X, W, Y, POLY), {"lam": None, "lam_weight": torch.ones(1)}, TypeError, "lam must be a number, or a tensor"),
        ((X, W, Y, POLY), {"lr": -0.1}, ValueError, r"lr must be at least 0, got -0\.1"),
        ((X, W, Y, POLY), {"lr": math.nan}, ValueError, "lr must be finite, got nan"),
        ((X, W, Y, POLY), {"lr": math.inf}, ValueError, "lr must be finite, got inf"),
        ((X, W, Y, POLY), {"lr": "1"}, TypeError, "lr must be a number, got '1'"),
        (
            (X, W, Y, POLY),
            {"lr": torch.tensor([0.1, -1.0])},
            ValueError,
            r"lr must be finite and at least 0, got -1\.0",
        ),
        (
            (X, W, Y, POLY),
            {"lr": torch.tensor([0.1, math.inf])},
            ValueError,
            "lr must be finite and at least 0, got inf",
        ),
        ((X, W, Y, POLY), {"lr": torch.tensor([math.nan, 1])}, ValueError, "lr must be finite and at least 0, got nan"),
        (
            (X, W, Y, POLY),
            {"lr": torch.ones(3)},
            ValueError,
            r"lr must be a number or have shape \(2,\) for the steps, got",
        ),
        ((X, W3, Y, POLY), {"lr": torch.ones(4)}, ValueError, r"\(3,\) for the runs, \(3,2\) for both, got \(4,\)"),
        (
            (X, W3, Y, POLY),
            {"lr": torch.ones(3), "steps": 3},
            ValueError,
            r"lr of shape \(3,\) is ambiguous where R = st",
        ),
        ((X, W, Y, POLY), {"lr": torch.ones(2, dtype=torch.int64)}, TypeError, "lr must be a floating-point tensor"),
        ((X, W, Y, POLY), {"lr": torch.ones(2, requires_grad=True)}, ValueError, "lr must not require grad"),
        ((X, W, Y, POLY), {"lam": None, "label_lam": 0.5}, ValueError, "label_lam needs pairs .* lam=None .*, got 0.5"),
        ((X, W, Y, POLY), {"lam": None, "pairs": "distinct"}, ValueError, "pairs needs pairs .*, got 'distinct'"),
        ((X, W, Y, POLY), {"pairs": "some"}, ValueError, 'pairs must be "all", "distinct" or .*, got \'some\''),
        ((X, W, Y, POLY), {"label_lam": 1.5}, ValueError, r"label_lam must be in \[0, 1\], got 1.5"),
        (
            (X, W, Y, POLY),
            {"label_lam": torch.tensor(1.5), "steps": 0},
            ValueError,
            r"label_lam must be in \[0, 1\], got \[1.5\]",
        ),
        ((X, W, Y, POLY), {"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\], got -0.1"),
        ((X, W, Y, POLY), {"steps": -1}, ValueError, "steps must be at least 0, got -1"),
        ((X, W, Y, POLY), {"steps": 2.0}, TypeError, r"steps must be an integer, got 2\.0"),
        ((X, W, Y, POLY), {"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1\.0"),
        ((X, W, Y, POLY), {"momentum": -0.1}, ValueError, r"momentum must be in \[0, 1\), got -0\.1"),
        ((X, W, Y, POLY), {"momentum": math.nan}, ValueError, r"momentum must be in \[0, 1\), got nan"),
        ((X, W, Y, POLY), {"weight_decay": -1}, ValueError, "weight_decay must be at least 0, got -1"),
        ((X, W, Y, POLY), {"weight_decay": math.inf}, ValueError, "weight_decay must be finite, got inf"),
    ],
)
def test_refuses(args, kwargs, kind, message):
    with pytest.raises(kind, match=message):
        mf.gradient_descent(*args, **{"lr": 0.1, "steps": 2, **kwargs})


def test_out_of_memory_is_an_error():
    """Petabytes of losses: the arguments stay as they are."""
    before = W.clone()
    with pytest.raises(RuntimeError):
        mf.gradient_descent(X, W, Y, POLY, lr=0.1, steps=2**50)
    assert torch.equal(W, before)
