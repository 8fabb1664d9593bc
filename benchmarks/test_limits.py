"""The machine's limits at large sizes: the roofs of the plots. Other rows have limits at the size of their work."""

import torch

from . import harness, limits
from .timing import CUDA


def test_limits(bench):
    figures = {"bytes/s of copies": limits.copy_rates((4 << 30) if CUDA else (512 << 20))["old"]}
    for dtype in (torch.float32, torch.bfloat16):
        figures[f"FLOP/s of {str(dtype).removeprefix('torch.')} products"] = 2 * limits.matrix_rate(dtype)
    for name, rate in limits.activation_rates().items():
        figures[f"FLOP/s of activations {name}"] = limits.FLOP[name] * rate
    times = {f"10^9 {name.replace('/s', '')}": [1e9 / rate] for name, rate in figures.items()}
    bench.record(harness.Case("limits", "of this machine", "measured alone"), times, figures=figures)
