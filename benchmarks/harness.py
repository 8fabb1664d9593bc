"""Steps of a benchmark: make contenders, check their results, read their memory, record a row."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .limits import Work
from .results import describe, rates
from .timing import CUDA, Contender, Measurement

__all__ = ["Case", "check", "directed", "peak_bytes", "record"]

#: Largest relative error that still counts as rounding; beyond it a result is wrong.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Case:
    """Key of a row: the operator, the problem's name and shape, the direction, and the dtype."""

    suite: str
    name: str
    direction: str
    dtype: torch.dtype = torch.float32


def directed(direction: str, call: Callable[[], Tensor], wrt: Tensor, grad: Tensor | None = None) -> Contender:
    """Run ``call`` without gradients if ``direction`` is "forward", else followed by the gradient to ``wrt``."""
    if direction == "forward":
        return torch.no_grad()(call)
    return lambda: torch.autograd.grad(call(), wrt, grad)[0]


def check(contenders: Mapping[str, Contender], truth: Tensor, dtype: torch.dtype) -> None:
    """Fail if the result of a contender is wrong, so that no wrong result is timed."""
    for name, run in contenders.items():
        error = ((run().double() - truth.double()).norm() / truth.double().norm()).item()
        assert error <= TOLERANCE[dtype], f"{name} is off by {error:.2g}"


def peak_bytes(contenders: Mapping[str, Contender]) -> dict[str, int]:
    """Read the most memory that each contender has allocated at once, beyond what was allocated before its call."""
    return {name: _peak_on_gpu(run) if CUDA else _peak_on_cpu(run) for name, run in contenders.items()}


def _peak_on_gpu(run: Contender) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(run: Contender) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    allocated = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()  # negative when memory is freed
            peak = max(peak, allocated)
    return peak


def record(
    capsys: Any,
    case: Case,
    *,
    measured: Measurement | None = None,
    work: Work | None = None,
    memory: Mapping[str, int] | None = None,
    figures: Mapping[str, Any] | None = None,
) -> None:
    """Print a row of results, and append it to the JSON lines of ``MIXFEAT_BENCH_OUT``.

    Args:
        capsys: pytest's fixture, to print past its capture.
        case: key of the row.
        measured: times of ``"mixfeat"`` and of each baseline.
        work: amounts of work, and the time that they need at least.
        memory: peak bytes of each contender.
        figures: anything else that was found, by name.
    """
    row: dict[str, Any] = {
        "suite": case.suite,
        "case": case.name,
        "direction": case.direction,
        "dtype": str(case.dtype).removeprefix("torch."),
        "cache": ("cold" if CUDA else "warm") if measured else None,
        "graph": measured.graph if measured else None,
        "timings": {name: asdict(timing) for name, timing in measured.timings.items()} if measured else {},
        "also": measured.also if measured else {},
        "work": dict(work.amounts) if work else {},
        "limit": asdict(work.limit) if work and work.limit else None,
        "peak_bytes": dict(memory or {}),
        "figures": dict(figures or {}),
    }
    row["rates"] = rates(row)
    with capsys.disabled():
        print("\n" + describe(row))
    if "MIXFEAT_BENCH_OUT" in os.environ:
        with open(os.environ["MIXFEAT_BENCH_OUT"], "a") as file:
            file.write(json.dumps(row) + "\n")
