"""The machine's limits at large sizes: the roofs of the plots. Other rows have limits at the size of their work."""

import torch

from . import harness, limits
from .timing import CUDA


def test_limits(bench):
    figures = {"copies, GB/s": limits.copy_rates((4 << 30) if CUDA else (512 << 20))["old"] / 1e9}
    for dtype in (torch.float32, torch.bfloat16):
        figures[f"{str(dtype).removeprefix('torch.')} products, GFLOP/s"] = 2 * limits.matrix_rate(dtype) / 1e9
    for name, rate in limits.activation_rates().items():
        figures[f"activations {name}, GFLOP/s"] = limits.FLOP[name] * rate / 1e9
    times = {f"10^9 {name.removesuffix('/s')}": [1 / rate] for name, rate in figures.items()}
    bench.record(harness.Case("limits", "of this machine", "measured alone"), times, figures=figures)
