"""How time grows with each dimension, and shrinks with threads: the exponent is a line's slope in logarithms."""

import math

import numpy as np
import pytest
import torch

import mixfeat as mf

from . import harness
from .harness import CUDA, DEVICE

ACTIVATION = mf.PolyReLU(8, 0.1)
FACTOR = 4 if CUDA else 1  # of samples
BASE = {"N": 256, "P": 12, "D": 20, "C": 10, "M": 10}
NETWORK = {"N": (128, 256, 512, 1024), "D": (16, 64, 256, 1024), "C": (5, 10, 20, 40, 80), "M": (5, 10, 20, 40)}
#: of each suite the sizes of its steps, and the values that each takes in turn
GROWING = {
    "patch_conv": (BASE, NETWORK),
    "pairwise_mixup_loss": (BASE, NETWORK),
    "mixup": ({"N": 128, "D": 3072}, {"N": (32, 128, 512, 2048), "D": (768, 3072, 12288, 49152)}),
    "mixup_cross_entropy": ({"N": 256, "C": 1000}, {"N": (64, 256, 1024, 4096), "C": (100, 1000, 10000, 100000)}),
}
THREADS = sorted({1, *(2**k for k in range(1, 10) if 2**k < torch.get_num_threads()), torch.get_num_threads()})


def step(suite, sizes):
    """Forward and backward of a suite's operator, and of mixup forward: images have no gradient."""
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


def record(capsys, suite, sizes, name, values, seconds):
    exponent = float(np.polyfit(np.log(values), np.log(seconds), 1)[0])
    figures = {"exponent": exponent, name: values, "ms": [float(f"{1e3 * value:.3g}") for value in seconds]}
    case = ", ".join(f"{key}={FACTOR * value if key == 'N' else value}" for key, value in sizes.items() if key != name)
    harness.record(capsys, suite, case, f"growth with {name}", figures=figures)


@pytest.mark.parametrize(("suite", "name"), [(suite, name) for suite in GROWING for name in GROWING[suite][1]])
def test_growth(benchmark, capsys, suite, name):
    base, growing = GROWING[suite]
    contenders = {value: step(suite, {**base, name: value}) for value in growing[name]}
    timing = harness.compare(contenders)
    benchmark.pedantic(contenders[growing[name][0]], rounds=3)
    values = [FACTOR * value if name == "N" else value for value in contenders]
    record(capsys, suite, base, name, values, [timing[value].p50 for value in contenders])


@pytest.mark.skipif(CUDA or len(THREADS) == 1, reason="threads of the CPU")
@pytest.mark.parametrize("suite", GROWING)
def test_threads(benchmark, capsys, suite):
    base, growing = GROWING[suite]
    sizes, calls = {**base, "N": growing["N"][-2]}, 5
    run = step(suite, sizes)

    def several(threads):
        def run_on_threads():
            torch.set_num_threads(threads)
            for _ in range(calls):  # the first of them waits for threads to start
                run()

        return run_on_threads

    try:
        timing = harness.compare({threads: several(threads) for threads in THREADS})
        benchmark.pedantic(several(THREADS[-1]), rounds=3)
    finally:
        torch.set_num_threads(THREADS[-1])
    record(capsys, suite, sizes, "threads", THREADS, [timing[threads].p50 / calls for threads in THREADS])
