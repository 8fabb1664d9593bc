"""Derivatives of every kind: twice, forward, batched, and by the transforms of torch.func."""

import functools
import importlib

import pytest
import torch
from conftest import error
from torch.autograd import gradcheck, gradgradcheck

import mixfeat as mf
from mixfeat import reference
from mixfeat.benchmarks.harness import peak_on_cpu

PHI = mf.PolyReLU(4, 1.3)
NODES = torch.tensor([0.2, 0.9]), torch.tensor([0.25, 0.75])
INDEX, LAM = torch.tensor([1, 1, 0, 3]), torch.tensor([0.3, 0.0, 1.0, 0.6], dtype=torch.float64)
TARGET, PARTNER = torch.tensor([0, 1, 2, 1]), torch.tensor([1, 4, 2, 0])
SOFT = torch.tensor([[0.2, 0.5, 0.0, 0.0, 0.3]] * 4, dtype=torch.float64)

#: by name: the call, from a module of operators and its differentiated tensors, and which of these it takes
CASES = {
    "patch_conv": (lambda f, x, w: f.patch_conv(x, w, PHI), "xw"),
    "patch_conv-mixed": (lambda f, x, w: f.patch_conv(x, w, PHI, index=INDEX, lam=LAM), "xw"),
    "patch_conv-runs": (lambda f, x, w: f.patch_conv(x, w[None].expand(2, -1, -1, -1), PHI), "xw"),
    "pairwise_mixup_loss": (lambda f, x, w: f.pairwise_mixup_loss(x, w, TARGET, PHI), "xw"),
    "pairwise_mixup_loss-nodes": (
        lambda f, x, w: f.pairwise_mixup_loss(x, w, TARGET, PHI, **nodes(f)), "xw"
    ),
    "mixup": (lambda f, x: f.mixup(x, INDEX, LAM), "x"),
    "mixup_cross_entropy": (
        lambda f, g: f.mixup_cross_entropy(g, TARGET, PARTNER, LAM, label_smoothing=0.1), "g"
    ),
    "mixup_cross_entropy-none": (
        lambda f, g: f.mixup_cross_entropy(g, TARGET, PARTNER, LAM, ignore_index=1, reduction="none"), "g"
    ),
    "mixup_cross_entropy-lse": (
        lambda f, g: torch.stack([
            part.sum() for part in f.mixup_cross_entropy(
                g, TARGET, PARTNER, LAM, label_smoothing=0.1, lse_square_scale=0.2, return_lse=True
            )
        ]), "g"
    ),
    "soft_target_cross_entropy": (lambda f, g: f.soft_target_cross_entropy(g, SOFT, label_smoothing=0.1), "g"),
}  # fmt: skip


def nodes(f):
    return dict(zip(("lam", "lam_weight"), (t.tolist() if f is reference else t for t in NODES), strict=True))


def inputs(letters):
    shapes = {"x": (4, 2, 3), "w": (3, 2, 3), "g": (4, 5)}
    return tuple(torch.randn(shapes[letter], dtype=torch.float64, requires_grad=True) for letter in letters)


@pytest.fixture(params=CASES)
def case(request):
    call, letters = CASES[request.param]
    return call, inputs(letters)


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    """Triton has no float64; what it differentiates twice is the same plain PyTorch."""
    with mf.backend(request.param):
        yield request.param


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # a batch of gradients is a loop
def test_gradcheck(backend, case):
    """Backward, forward, batched and twice, against finite differences."""
    call, tensors = case
    assert gradcheck(lambda *t: call(mf, *t), tensors, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(lambda *t: call(mf, *t), tensors, fast_mode=True)  # along random directions
    for place, one in enumerate(tensors if len(tensors) > 1 else ()):  # with the others constant
        others = [t.detach() for t in tensors]
        assert gradgradcheck(
            lambda t, at=place, rest=others: call(mf, *rest[:at], t, *rest[at + 1 :]), one, fast_mode=True
        )


@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "hessian", "jvp", "vjp"])
def test_transforms(backend, case, transform):
    """The transforms of torch.func, against the same ones of the definition."""
    call, tensors = case
    tensors = tuple(t.detach() for t in tensors)
    upstream = torch.randn_like(call(reference, *tensors))

    def result(f):
        def scalar(*t):
            return (call(f, *t) * upstream).sum()

        match transform:
            case "grad" | "hessian":
                return getattr(torch.func, transform)(scalar, tuple(range(len(tensors))))(*tensors)
            case "jvp":
                return torch.func.jvp(lambda *t: call(f, *t), tensors, tuple(torch.ones_like(t) for t in tensors))
            case "vjp":
                return torch.func.vjp(lambda *t: call(f, *t), *tensors)[1](upstream)
            case _:
                return getattr(torch.func, transform)(lambda *t: call(f, *t))(*tensors)

    torch.testing.assert_close(result(mf), result(reference))


#: by name: the call, the shapes of its tensors, and the dimension of each that is batched
BATCHES = {
    "patch_conv-weight": (lambda f, x, w: f.patch_conv(x, w, PHI), [(4, 2, 3), (3, 2, 3)], (None, 1)),
    "patch_conv-both": (
        lambda f, x, w: f.patch_conv(x, w, PHI, index=INDEX, lam=LAM), [(4, 2, 3), (3, 2, 3)], (0, 3)
    ),
    "patch_conv-runs": (lambda f, x, w: f.patch_conv(x, w, PHI), [(4, 2, 3), (2, 3, 2, 3)], (0, None)),
    "pairwise_mixup_loss-weight": (
        lambda f, x, w: f.pairwise_mixup_loss(x, w, TARGET, PHI), [(4, 2, 3), (3, 2, 3)], (None, 0)
    ),
    "pairwise_mixup_loss-runs": (
        lambda f, x, w: f.pairwise_mixup_loss(x, w, TARGET, PHI), [(2, 4, 2, 3), (3, 2, 3)], (None, 0)
    ),
    "pairwise_mixup_loss-readout": (
        lambda f, x, w, a: f.pairwise_mixup_loss(x, w, TARGET, PHI, readout=a, **nodes(f)),
        [(4, 2, 3), (3, 2, 3), (3, 2)], (None, None, 2),
    ),
    "mixup": (lambda f, x: f.mixup(x, INDEX, LAM), [(4, 2, 3)], (2,)),
}  # fmt: skip


@pytest.fixture(params=BATCHES)
def batch(request):
    """A call, and its tensors with batches of five in them."""
    call, shapes, dims = BATCHES[request.param]
    shapes = [
        shape if dim is None else (*shape[:dim], 5, *shape[dim:]) for shape, dim in zip(shapes, dims, strict=True)
    ]
    return call, dims, [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_vmap_is_one_call_of_the_kernel(backend, batch, monkeypatch):
    """Values and gradients are those of the definition, and so is a vmap of a vmap."""
    call, dims, tensors = batch
    expected = torch.func.vmap(lambda *t: call(reference, *t), dims)(*tensors)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, tensors, upstream)

    def unused(*args):
        raise AssertionError("the definition was called")

    for name in ("patch_conv", "pairwise_mixup_loss", "mixup"):
        operator = getattr(importlib.import_module(f"mixfeat.ops.{name}"), f"_{name}")
        monkeypatch.setattr(operator, "_definition", unused)
    found = torch.func.vmap(lambda *t: call(mf, *t), dims)(*tensors)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, tensors, upstream), gradients)
    twice = torch.func.vmap(torch.func.vmap(lambda *t: call(mf, *t), dims))(*(torch.stack([t, -t]) for t in tensors))
    torch.testing.assert_close(twice[0], expected)


def test_vmap_of_what_has_no_runs(backend):
    """Partners and lam of their own for each call of the batch."""
    x, w = inputs("xw")
    index, lam = torch.stack([INDEX, INDEX.flip(0)]), torch.stack([LAM, 1 - LAM])
    for f in (lambda f, i, lam: f.patch_conv(x, w, PHI, index=i, lam=lam), lambda f, i, lam: f.mixup(x, i, lam)):
        found, expected = (torch.func.vmap(functools.partial(f, module))(index, lam) for module in (mf, reference))
        torch.testing.assert_close(found, expected)
        for result in zip(*(torch.autograd.grad(y.square().sum(), x) for y in (found, expected)), strict=True):
            torch.testing.assert_close(*result)


def test_gradients_of_each_sample(backend):
    x, w = (t.detach() for t in inputs("xw"))

    def loss(f, w, x, y):
        return f.mixup_cross_entropy(f.patch_conv(x[None], w, PHI), y[None], y[None], 0.4)

    def each(f):
        return torch.func.vmap(torch.func.grad(lambda w, x, y: loss(f, w, x, y)), (None, 0, 0))(w, x, TARGET)

    torch.testing.assert_close(each(mf), each(reference))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_hessian_vector_products(name, dtype):
    """In float32 within the budget of a gradient, in bfloat16 within twice the error of plain PyTorch."""
    call, letters = CASES[name]

    def product(f, tensors):
        grads = torch.autograd.grad(call(f, *tensors).double().square().sum(), tensors, create_graph=True)
        inner = sum((g.double() * t.detach().double()).sum() for g, t in zip(grads, tensors, strict=True))
        return torch.autograd.grad(inner, tensors)

    draws = [tuple(t.detach().to(dtype).requires_grad_() for t in inputs(letters)) for _ in range(16)]
    mine = [product(mf, tensors) for tensors in draws]
    plain = [product(reference, tensors) for tensors in draws]
    truth = [product(reference, tuple(t.detach().double().requires_grad_() for t in tensors)) for tensors in draws]
    for ours, theirs, true in zip(*(zip(*products, strict=True) for products in (mine, plain, truth)), strict=True):
        assert all(t.dtype == dtype for t in ours)
        assert error(ours, true) <= (1e-5 if dtype == torch.float32 else 2 * error(theirs, true))


def test_memory_of_a_second_derivative_is_linear_in_the_samples():
    """The pairs' activations are computed again, a few rows at a time."""
    n, p, c, m = 512, 4, 3, 4
    x, w = torch.randn(n, p, 5), torch.randn(c, m, 5, requires_grad=True)
    y = torch.randint(c, (n,))

    def differentiate_twice():
        loss = mf.pairwise_mixup_loss(x, w, y, PHI)
        (grad,) = torch.autograd.grad(loss, w, create_graph=True)
        grad.square().sum().backward()

    pairs = 4 * n * n * p * c * m
    assert peak_on_cpu(differentiate_twice) < 12 * min(pairs, 4 * 2**24)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_flops_are_counted(backend, compiled):
    """The matrix products' FLOPs: of patch_conv as PyTorch counts its definition's, of pairs those of N samples."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(call, *tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        with FlopCounterMode(display=False) as counter:
            call(*leaves).sum().backward()
        return counter.get_total_flops()

    x, w = (t.detach() for t in inputs("xw"))
    runs = torch.randn(5, *w.shape, dtype=w.dtype)
    for weights in (w, runs):
        torch._dynamo.reset()
        functions = [lambda x, w: mf.patch_conv(x, w, PHI), lambda x, w: mf.pairwise_mixup_loss(x, w, TARGET, PHI)]
        conv, pairs = map(torch.compile, functions) if compiled else functions
        products = 2 * x.numel() * weights.numel() // x.shape[-1]
        assert (
            count(conv, x, weights) == count(lambda x, w: reference.patch_conv(x, w, PHI), x, weights) == 3 * products
        )
        assert count(pairs, x, weights) == 3 * products
    with FlopCounterMode(display=False) as counter:
        mf.gradient_descent(x, w, TARGET, PHI, lr=0.1, steps=7)
        mf.mixup(x, INDEX, LAM)
    assert counter.get_total_flops() == 7 * 4 * x.numel() * w.numel() // x.shape[-1]
