"""patch_conv and a training step of its network against what a user could write; the overhead of a call."""

import functools
import math
import statistics
import time
from collections.abc import Callable

import pytest
import torch

import mixfeat as mf

from . import baselines, harness
from .limits import Work, network_work
from .shapes import FORWARD, NETWORKS, cases, named
from .timing import CUDA, DEVICE

ACTIVATION = mf.PolyReLU(8, 0.1)


def make_inputs(name, dtype):
    samples, patches, patch_dim, classes, filters = NETWORKS[name]
    x = torch.randn(samples, patches, patch_dim, device=DEVICE).to(dtype)
    w = (torch.randn(classes, filters, patch_dim, device=DEVICE) * (0.1 / math.sqrt(patch_dim))).to(dtype)
    return x, w.requires_grad_()


def formulas():
    return {
        "mixfeat": mf.patch_conv,
        "torch.compile": baselines.compiled(baselines.eager),
        "best eager": baselines.eager,
        "naive": baselines.naive,
        **baselines.AGAINST,
    }


#: Shapes that are also timed in bfloat16. On a CPU Inductor then tunes its matrix products, which takes long.
TUNED = named("paper-10", "image", "patches")
#: A network is trained: only a few cases are timed without the gradient.
CASES = cases(NETWORKS, TUNED, ("forward + backward",)) + cases(FORWARD, FORWARD[:2], ("forward",))


@pytest.mark.parametrize(("name", "dtype", "direction"), CASES)
def test_operator(bench, name, dtype, direction):
    shape = NETWORKS[name]
    x, w = make_inputs(name, dtype)
    functions = formulas()
    if not CUDA and direction != "forward" and name in TUNED:
        functions["max-autotune"] = baselines.compiled(baselines.eager, autotune=True)
    grad = torch.randn(shape.samples, shape.classes, device=DEVICE).to(dtype)
    contenders = {
        key: harness.directed(direction, functools.partial(f, x, w, ACTIVATION), w, grad)
        for key, f in functions.items()
    }
    case = harness.Case("patch_conv", f"{name} {tuple(shape)}", direction, dtype)
    truth = harness.truth(case, "weight", grad, input=x, weight=w, activation=ACTIVATION)
    harness.check(contenders, truth, dtype)
    bytes = (x.nbytes + w.nbytes + grad.nbytes) * (1 + (direction != "forward"))
    work = network_work(direction, dtype, products=shape.products, evaluations=shape.evaluations, bytes=bytes)
    bench(case, contenders, work=work)


@pytest.mark.parametrize("name", named("paper-10", "image"))
def test_training_step(bench, name):
    """Time a step on a batch mixed within itself: mix, convolve, compare with both labels, update."""
    shape = NETWORKS[name]
    x, w = make_inputs(name, torch.float32)
    y = torch.arange(shape.samples, device=DEVICE) % shape.classes
    index, lam = mf.sample_mixup(shape.samples, lam=0.3, device=DEVICE)

    def ours(w):
        return mf.mixup_cross_entropy(mf.patch_conv(x, w, ACTIVATION, index=index, lam=lam), y, y[index], lam)

    def theirs(f, w):
        mixed = baselines.mixup(x, index, lam)
        return baselines.two_cross_entropies(f(mixed, w, ACTIVATION), y, y[index], lam)

    losses: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "mixfeat": ours,
        "torch.compile": baselines.compiled(functools.partial(theirs, baselines.eager)),
        "best eager": functools.partial(theirs, baselines.eager),
        "naive": functools.partial(theirs, baselines.naive),
        **{key: functools.partial(theirs, f) for key, f in baselines.AGAINST.items()},
    }

    def step(loss):
        (grad,) = torch.autograd.grad(loss(w), w)
        with torch.no_grad():
            w.sub_(grad, alpha=1e-6)

    gradients = {key: harness.directed("training step", functools.partial(loss, w), w) for key, loss in losses.items()}
    harness.check(gradients, gradients["best eager"](), torch.float32)
    contenders = {key: functools.partial(step, loss) for key, loss in losses.items()}
    case = harness.Case("patch_conv", f"{name} {tuple(shape)}", "training step")
    bench(case, contenders, work=Work({"evaluations": shape.evaluations}))


@pytest.mark.skipif(CUDA, reason="launches on a GPU are asynchronous")
def test_host_overhead(bench):
    """Time one call with autograd on tiny tensors, and subtract the C++ call that it ends in."""
    x, w = torch.randn(2, 3, 4), torch.randn(2, 2, 4, requires_grad=True)
    detached = w.detach()
    with mf.backend("cpu"):  # loads the library
        mf.patch_conv(x, w, ACTIVATION)
    native = torch.ops.mixfeat_cpu.patch_conv.default

    def loop(run, calls=50):
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - begin) / calls

    contenders = {
        "call": lambda: mf.patch_conv(x, w, ACTIVATION),
        "native": lambda: native(x, detached, None, None, tuple(ACTIVATION.polynomial), 2),
    }
    turns = [{key: loop(run) for key, run in contenders.items()} for _ in range(400)]
    figures = {
        "C++, us": 1e6 * statistics.median(turn["native"] for turn in turns),
        "Python and autograd, us": 1e6 * statistics.median(turn["call"] - turn["native"] for turn in turns),
    }
    times = {key: [turn[key] for turn in turns] for key in contenders}
    bench.record(harness.Case("patch_conv", "tiny", "one call, forward"), times, figures=figures)
