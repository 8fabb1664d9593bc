"""How time grows with each dimension: a line through the logarithms, whose slope is the exponent."""

import math

import numpy as np
import pytest
import torch

import mixfeat as mf

from . import harness
from .harness import CUDA, DEVICE

ACTIVATION = mf.PolyReLU(8, 0.1)
FACTOR = 4 if CUDA else 1
BASE = {"N": 256, "P": 12, "D": 20, "C": 10, "M": 10}
GROWING = {"N": (128, 256, 512, 1024), "D": (16, 64, 256, 1024), "C": (5, 10, 20, 40, 80), "M": (5, 10, 20, 40)}


def problem(sizes):
    n, p, d, c, m = sizes.values()
    x = torch.randn(FACTOR * n, p, d, device=DEVICE)
    w = (torch.randn(c, m, d, device=DEVICE) * (0.1 / math.sqrt(d))).requires_grad_()
    return x, w, torch.arange(FACTOR * n, device=DEVICE) % c


def steps(sizes):
    x, w, y = problem(sizes)
    return {
        "patch_conv": lambda: mf.patch_conv(x, w, ACTIVATION).sum().backward(),
        "pairwise_mixup_loss": lambda: mf.pairwise_mixup_loss(x, w, y, ACTIVATION).backward(),
    }


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize("suite", ["patch_conv", "pairwise_mixup_loss"])
def test_growth(benchmark, capsys, suite, name):
    values = GROWING[name]
    contenders = {str(value): steps({**BASE, name: value})[suite] for value in values}
    timing = harness.compare(contenders, share=0.5)
    benchmark.pedantic(contenders[str(values[0])], rounds=3)
    seconds = [timing[str(value)].p50 for value in values]
    exponent = float(np.polyfit(np.log(values), np.log(seconds), 1)[0])
    sizes = [FACTOR * value if name == "N" else value for value in values]
    figures = {"exponent": exponent, name: sizes, "ms": [float(f"{1e3 * value:.3g}") for value in seconds]}
    harness.record(capsys, suite, "paper", f"growth with {name}", figures=figures)
