"""What this machine can do at most: the roofs of the plots. Rows have limits of their own, for work of their size."""

import torch

from . import harness
from .harness import CUDA


def test_limits(benchmark, capsys):
    figures = {"bytes/s of copies": harness.copy_rates((4 << 30) if CUDA else (512 << 20))["old"]}
    for dtype in (torch.float32, torch.bfloat16):
        figures[f"FLOP/s of {str(dtype).removeprefix('torch.')} products"] = 2 * harness.matrix_rate(dtype)
    for name, rate in harness.activation_rates().items():
        figures[f"FLOP/s of activations {name}"] = harness.FLOP[name] * rate
    benchmark.pedantic(lambda: harness.matrix_rate(torch.float32), rounds=1)
    harness.record(capsys, "limits", "of this machine", "measured alone", figures=figures)
