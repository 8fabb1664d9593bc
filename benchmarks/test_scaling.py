"""Growth of time with each dimension and with threads: the exponent is the slope of a line through the logarithms."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import mixfeat as mf

from . import harness
from .results import GROWTH
from .timing import CUDA, DEVICE, compare, medians

ACTIVATION = mf.PolyReLU(8, 0.1)
FACTOR = 4 if CUDA else 1  # multiplies the number of samples


@dataclass(frozen=True)
class Growth:
    """Sizes of a step, and the values that each of them takes in turn while the others stay."""

    sizes: Mapping[str, int]
    values: Mapping[str, Sequence[int]]


NETWORK = Growth(
    {"N": 256, "P": 12, "D": 20, "C": 10, "M": 10},
    {"N": (128, 256, 512, 1024), "D": (16, 64, 256, 1024), "C": (5, 10, 20, 40, 80), "M": (5, 10, 20, 40)},
)
GROWTHS = {
    "patch_conv": NETWORK,
    "pairwise_mixup_loss": NETWORK,
    "mixup": Growth({"N": 128, "D": 3072}, {"N": (32, 128, 512, 2048), "D": (768, 3072, 12288, 49152)}),
    "mixup_cross_entropy": Growth({"N": 256, "C": 1000}, {"N": (64, 256, 1024, 4096), "C": (100, 1000, 10000, 100000)}),
}
THREADS = sorted({1, *(2**k for k in range(1, 10) if 2**k < torch.get_num_threads()), torch.get_num_threads()})


def step(suite: str, sizes: Mapping[str, int]) -> Callable[[], object]:
    """Run forward and backward of a suite's operator; only forward for mixup, since images have no gradient."""
    n = FACTOR * sizes["N"]
    if suite == "mixup":
        images = torch.rand(n, sizes["D"], device=DEVICE)
        index, lam = mf.sample_mixup(n, lam=0.3, device=DEVICE)
        return lambda: mf.mixup(images, index, lam)
    if suite == "mixup_cross_entropy":
        logits = torch.randn(n, sizes["C"], device=DEVICE, requires_grad=True)
        a, b = torch.randint(sizes["C"], (2, n), device=DEVICE)
        lam = torch.tensor(0.3, device=DEVICE)
        return lambda: torch.autograd.grad(mf.mixup_cross_entropy(logits, a, b, lam), logits)
    x = torch.randn(n, sizes["P"], sizes["D"], device=DEVICE)
    w = (
        torch.randn(sizes["C"], sizes["M"], sizes["D"], device=DEVICE) * (0.1 / math.sqrt(sizes["D"]))
    ).requires_grad_()
    if suite == "patch_conv":
        return lambda: torch.autograd.grad(mf.patch_conv(x, w, ACTIVATION).sum(), w)
    y = torch.arange(n, device=DEVICE) % sizes["C"]
    return lambda: torch.autograd.grad(mf.pairwise_mixup_loss(x, w, y, ACTIVATION), w)


def record(bench, suite, sizes, name, times):
    """Record how the times of a suite's steps, by the value that ``name`` takes, depend on it."""
    values, seconds = zip(*medians(times).items(), strict=True)
    exponent = float(np.polyfit(np.log(values), np.log(seconds), 1)[0])
    figures = {"exponent": exponent, name: list(values), "ms": [float(f"{1e3 * value:.3g}") for value in seconds]}
    case = ", ".join(f"{key}={FACTOR * value if key == 'N' else value}" for key, value in sizes.items() if key != name)
    named = {f"{name} = {value}": turns for value, turns in times.items()}
    bench.record(harness.Case(suite, case, f"{GROWTH}{name}"), named, figures=figures)


@pytest.mark.parametrize(("suite", "name"), [(suite, name) for suite in GROWTHS for name in GROWTHS[suite].values])
def test_growth(bench, suite, name):
    growth = GROWTHS[suite]
    factor = FACTOR if name == "N" else 1
    contenders = {factor * value: step(suite, {**growth.sizes, name: value}) for value in growth.values[name]}
    record(bench, suite, growth.sizes, name, compare(contenders))


@pytest.mark.skipif(CUDA or len(THREADS) == 1, reason="needs several threads of a CPU")
@pytest.mark.parametrize("suite", GROWTHS)
def test_threads(bench, suite):
    growth = GROWTHS[suite]
    sizes, calls = {**growth.sizes, "N": growth.values["N"][-2]}, 5
    run = step(suite, sizes)

    def run_on(threads):
        def run_repeatedly():
            torch.set_num_threads(threads)
            for _ in range(calls):  # the first call waits for threads to start
                run()

        return run_repeatedly

    try:
        times = compare({threads: run_on(threads) for threads in THREADS})
    finally:
        torch.set_num_threads(THREADS[-1])
    each = {threads: [turn / calls for turn in turns] for threads, turns in times.items()}
    record(bench, suite, sizes, "threads", each)
