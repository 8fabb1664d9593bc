"""gradient_descent against loops of training steps, and against the arithmetic peak, the bare pairs and two cores."""

import functools

import pytest
import torch
import torch.nn.functional as F

import mixfeat as mf
from mixfeat.ops.pairwise_mixup_loss import pairwise_mixup_block

from . import baselines, harness
from .limits import network_work
from .shapes import NETWORKS, THEORY, YOURS, named
from .test_pairwise_mixup_loss import ACTIVATION, fastest, make_inputs, on_threads
from .timing import CUDA, compare, medians

SHAPE = NETWORKS.get(YOURS, THEORY)
#: With twelve patches, and as many networks as an H100 has multiprocessors, a step has been predicted.
SHAPES = {YOURS: SHAPE, "theory": SHAPE, "theory-12": SHAPE._replace(patches=12)}
STEPS, LR = 32, 1e-3


def operator_loop(x, w, y, lam):
    """Take the steps by mixfeat's operators and torch.optim.SGD."""
    weight = w.detach().clone().requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=LR)
    for _ in range(STEPS):
        if lam is None:
            logits = mf.patch_conv(x, weight, ACTIVATION)
            loss = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(w))) * len(w)
        else:
            loss = mf.pairwise_mixup_loss(x, weight, y, ACTIVATION, lam=lam).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weight.detach()


def plain_loop(x, w, y, lam, compile=lambda function: function):
    """Take the steps by one function of all networks, compiled or not."""

    def step(weight):
        (grad,) = torch.autograd.grad(baselines.batched_loss(x, weight, y, ACTIVATION, lam), weight)
        return grad

    gradient = compile(step)

    def run():
        weight = w.detach().clone().requires_grad_()
        for _ in range(STEPS):
            grad = gradient(weight)
            weight.detach().sub_(grad, alpha=LR)
        return weight.detach()

    return run


def trained_by(f, x, w, y, lam):
    """Train as ``mf.gradient_descent`` does; the networks."""
    return f(x, w.detach(), y, ACTIVATION, lam=lam, lr=LR, steps=STEPS)[0]


CASES = [
    pytest.param(name, objective, runs, id=f"{name}-{objective}-{runs}")
    for name in named("theory") for objective in ("midpoint", "erm") for runs in (2, 8)
] + [pytest.param("theory-12", "midpoint", 128, id="theory-12-midpoint-128")] * CUDA  # fmt: skip


@pytest.mark.parametrize(("name", "objective", "runs"), CASES)
def test_runs(bench, name, objective, runs):
    """Train networks for 32 steps in one call, against loops over steps of all networks at once."""
    shape, lam = SHAPES[name], None if objective == "erm" else 0.5
    x, w, y = make_inputs(shape, runs)
    autotuned = functools.partial(baselines.compiled, autotune=True)
    tuned = {"max-autotune": plain_loop(x, w, y, lam, autotuned)} if runs == 8 and not CUDA else {}
    contenders = {
        "mixfeat": functools.partial(trained_by, mf.gradient_descent, x, w, y, lam),
        "operators and SGD": lambda: operator_loop(x, w, y, lam),
        "torch.compile": plain_loop(x, w, y, lam, baselines.compiled),
        "eager": plain_loop(x, w, y, lam),
        **tuned,
        **{key: functools.partial(trained_by, f, x, w, y, lam) for key, f in baselines.AGAINST.items()},
    }
    harness.check(contenders, contenders["mixfeat"](), torch.float32)
    contenders |= {name: fastest(contenders[name]) for name in ("torch.compile", *tuned)}
    evaluations = shape.evaluations if lam is None else shape.pair_evaluations
    work = network_work(
        "training", torch.float32, products=runs * STEPS * shape.products, evaluations=runs * STEPS * evaluations,
        bytes=x.nbytes + 2 * w.nbytes,
    )  # fmt: skip
    title = "ERM" if lam is None else "Midpoint"
    case = harness.Case("gradient_descent", f"{name}, {title}, R={runs} {tuple(shape)}", f"{STEPS} steps")
    bench(case, contenders, work=work, pairwise=True, memory=False)


@pytest.mark.skipif(CUDA, reason="the CPU's kernel")
def test_one_core(bench):
    """Compare a step of one network on one core to the bare pairs, from pre-activations to their gradient."""
    x, w, y = make_inputs(SHAPE)
    s = torch.einsum("npd,cmd->npcm", x, w.detach())[None].contiguous()
    weights = [1 / SHAPE.samples**2]

    def pairs():
        for _ in range(STEPS):
            pairwise_mixup_block(s, None, y, None, [0.5], weights, ACTIVATION.polynomial, True)

    def train():
        mf.gradient_descent(x, w.detach(), y, ACTIVATION, lr=LR, steps=STEPS)

    times = compare({"steps": on_threads(train, 1), "their pairs": on_threads(pairs, 1)})
    typical = medians(times)

    def work():
        return network_work(
            "training", torch.float32, products=SHAPE.products, evaluations=SHAPE.pair_evaluations, bytes=1
        )

    limit = on_threads(work, 1)().limit
    figures = {
        "time of a step, us": typical["steps"] / STEPS * 1e6,
        "over the time of its pairs": typical["steps"] / typical["their pairs"],
        "of the arithmetic peak": limit.seconds * STEPS / typical["steps"],
    }
    case = harness.Case("gradient_descent", f"one core {tuple(SHAPE)}", f"{STEPS} steps")
    bench.record(case, times, figures=figures)


@pytest.mark.skipif(CUDA, reason="the CPU's threads")
@pytest.mark.parametrize("runs", [1, 5, 8])
def test_threads(bench, runs):
    """Compare all threads to one: networks that do not divide evenly among threads, and fewer networks than threads."""
    x, w, y = make_inputs(SHAPE, runs)

    def train():
        mf.gradient_descent(x, w.detach(), y, ACTIVATION, lr=LR, steps=8 * STEPS)

    threads = torch.get_num_threads()
    times = compare({"all threads": on_threads(train, threads), "one thread": on_threads(train, 1)})
    typical = medians(times)
    figures = {"threads": threads, "speedup over one thread": typical["one thread"] / typical["all threads"]}
    bench.record(harness.Case("gradient_descent", f"R={runs} {tuple(SHAPE)}", "threads"), times, figures=figures)
