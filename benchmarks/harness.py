"""Fair timing on a noisy machine: contenders in turn, medians, ratios; and limits measured in the same run."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Contender = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender: quantiles over its turns."""

    p20: float
    p50: float
    p80: float


def compare(contenders: dict[str, Contender], *, seconds: float = 8.0, min_turns: int = 7) -> dict[str, Timing]:
    """Time contenders in turn, A B C A B C ..., for about ``seconds`` after two turns of warm-up."""
    for _ in range(2):
        for run in contenders.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(next(iter(times.values()))) < min_turns:
        for name, run in contenders.items():
            times[name].append(once(run))
    return {name: quantiles(values) for name, values in times.items()}


def once(run: Contender) -> float:
    """Seconds of one call, to the end of what it put on the device."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    run()
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) / 1e3


def quantiles(values: list[float]) -> Timing:
    if len(values) == 1:
        return Timing(*values * 3)
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return Timing(cuts[1], statistics.median(values), cuts[7])


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Multiply-adds a second of a large square matrix product: the limit of everything that is one."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    return n**3 / compare({"product": lambda: a @ b}, seconds=1)["product"].p20
