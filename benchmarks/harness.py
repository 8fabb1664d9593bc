"""Steps of a benchmark: make contenders, check their results, time them in turn, record each by pytest-benchmark."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mixfeat.operators import OPERATORS

from . import predicted
from .limits import Work
from .timing import CUDA, Contender, measure, medians

__all__ = ["CLOCK", "Bench", "Case", "check", "directed", "peak_bytes", "truth"]

#: Largest relative error that still counts as rounding; beyond it a result is wrong.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Case:
    """A timed case: the operator, the problem's name and shape, the direction, and the dtype."""

    suite: str
    name: str
    direction: str
    dtype: torch.dtype = torch.float32


def directed(direction: str, call: Callable[[], Tensor], wrt: Tensor, grad: Tensor | None = None) -> Contender:
    """Run ``call`` without gradients if ``direction`` is "forward", else followed by the gradient to ``wrt``."""
    if direction == "forward":
        return torch.no_grad()(call)
    return lambda: torch.autograd.grad(call(), wrt, grad)[0]


def truth(case: Case, wrt: str, grad: Tensor | None = None, **arguments: Any) -> Tensor:
    """Compute in float64, by the operator's definition, its value or its gradient to the argument ``wrt``."""
    exact = {
        name: value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    exact[wrt].requires_grad_()
    call = functools.partial(OPERATORS[case.suite].formula, **exact)
    return directed(case.direction, call, exact[wrt], None if grad is None else grad.double())()


def check(contenders: Mapping[str, Contender], truth: Tensor, dtype: torch.dtype) -> None:
    """Fail if the result of a contender is wrong, so that no wrong result is timed."""
    for name, run in contenders.items():
        error = ((run().double() - truth.double()).norm() / truth.double().norm()).item()
        assert error <= TOLERANCE[dtype], f"{name} is off by {error:.2g}"


def peak_bytes(contenders: Mapping[str, Contender]) -> dict[str, int]:
    """Read the most memory that each contender has allocated at once, beyond what was allocated before its call."""
    return {name: _peak_on_gpu(run) if CUDA else peak_on_cpu(run) for name, run in contenders.items()}


def _peak_on_gpu(run: Contender) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(run: Contender) -> int:
    """Read the most memory that a call has allocated at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        run()
    allocated = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()  # negative when memory is freed
            peak = max(peak, allocated)
    return peak


class _Clock:
    """A clock that pytest-benchmark reads: a call of :meth:`pass_by` takes the next of the seconds it was given."""

    def __init__(self) -> None:
        self.now = 0.0
        self.turns: Iterator[float] = iter([])

    def __call__(self) -> float:
        return self.now

    def replay(self, turns: Sequence[float]) -> None:
        self.turns = iter(turns)

    def start(self) -> None:
        self.now = 0.0  # so that no turn is rounded by those before

    def pass_by(self) -> None:
        self.now = next(self.turns)


#: The timer of all benchmarks, which ``conftest.py`` gives them. Contenders have taken turns before it runs.
CLOCK = _Clock()


class Bench:
    """Times the contenders of a case, and gives each a row of pytest-benchmark's: the case is the rows' group.

    Attributes:
        rows: the recorded rows of pytest-benchmark's JSON; empty under ``--benchmark-disable``.
    """

    def __init__(self, benchmark: BenchmarkFixture) -> None:
        self._benchmark = benchmark
        self.rows: list[dict[str, Any]] = []

    def __call__(
        self,
        case: Case,
        contenders: Mapping[str, Contender],
        *,
        work: Work | None = None,
        share: float = 1.0,
        pairwise: bool = False,
        memory: bool = True,
        figures: Callable[[dict[str, float]], Mapping[str, Any]] | None = None,
        missing: Mapping[str, str] | None = None,
    ) -> None:
        """Time ``contenders`` in turn, and record them.

        Args:
            case: the case of the contenders.
            contenders: functions to call; the first is ``"mixfeat"``.
            work: amounts of work, and the time that they need at least.
            share: multiplies the seconds per case.
            pairwise: meet mixfeat one by one, not all in turn.
            memory: measure the peak of memory too.
            figures: other results by name, given the medians.
            missing: contenders that cannot run here, and why.
        """
        measured = measure(contenders, share=share, pairwise=pairwise)
        each: dict[str, dict[str, Any]] = {
            name: {"also": {mode: times[name] for mode, times in measured.also.items() if name in times}}
            for name in contenders
        }
        if memory:
            for name, peak in peak_bytes(contenders).items():
                each[name]["peak_bytes"] = peak
        self.record(
            case, measured.times, each=each, figures=figures(medians(measured.times)) if figures else {},
            cache="cold" if CUDA else "warm", graph=measured.graph, missing=dict(missing or {}),
            work=dict(work.amounts) if work else {}, limit=asdict(work.limit) if work and work.limit else None,
        )  # fmt: skip

    def record(
        self,
        case: Case,
        times: Mapping[str, Sequence[float]],
        *,
        each: Mapping[str, Mapping[str, Any]] | None = None,
        **shared: Any,
    ) -> None:
        """Record the seconds of each contender's turns.

        Args:
            case: the case of the contenders.
            times: seconds, by contender; ratios are to the first.
            each: more of a contender, by its name.
            shared: more of the case: work, limit, figures.
        """
        expected = predicted.of(self._benchmark.fullname, torch.cuda.get_device_name() if CUDA else "CPU")
        if expected:
            shared |= {"predicted_us": list(expected.mixfeat)}
        dtype = str(case.dtype).removeprefix("torch.")
        params = {"suite": case.suite, "case": case.name, "direction": case.direction, "dtype": dtype}
        typical = medians(times)
        first = next(iter(times))
        rows = [self._benchmark, *(copy.copy(self._benchmark) for _ in range(len(times) - 1))]  # a row is used once
        for row, (name, turns) in zip(rows, times.items(), strict=True):
            row.group = " ".join(params.values())
            row.name, row.param, row.params = name, name, params | {"contender": name}
            row.fullname = f"{row.group}: {name}"
            row.extra_info = {"ratio": typical[name] / typical[first]} | dict((each or {}).get(name, {}))
            row.extra_info |= shared if name == first else {}
            CLOCK.replay(turns)
            row.pedantic(CLOCK.pass_by, setup=CLOCK.start, rounds=len(turns))
            self.rows += [row.stats.as_dict(include_data=False)] if row.stats else []
