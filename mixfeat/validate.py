"""``mixfeat check``: compare every operator on every backend that runs here with the reference in float64.

The error of values and gradients is ||result - truth|| / ||truth||. float32 and float64 have fixed budgets. The budget
of half precision is twice the error of the reference in that dtype on the same inputs.
"""

import itertools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixfeat import backends
from mixfeat.activations import Activation
from mixfeat.operators import DTYPES, OPERATORS, Case, Operator, deterministic, relative_error, same_bits

__all__ = ["DTYPES", "OPERATORS", "Outcome", "check", "checks"]


@dataclass(frozen=True)
class Outcome:
    """The result of :func:`check`.

    Attributes:
        worst: for each output (value and gradients), the case whose error is the largest share of its budget: error,
            plain PyTorch's error, budget and shape.
        repeats: whether a second call gave the same bits.
        failures: one line for each failure.
    """

    operator: str
    backend: str
    dtype: str
    cases: int
    worst: dict[str, dict[str, Any]]
    repeats: bool
    failures: list[str]
    seconds: float

    @property
    def passed(self) -> bool:
        """Return whether every output of every case was within its budget, and repeated."""
        return not self.failures


def checks(
    backend_names: Sequence[str], operators: Iterable[str] = OPERATORS, dtypes: Iterable[str] = DTYPES
) -> list[tuple[str, str, str]]:
    """List each (operator, backend, dtype) that :func:`check` can run: "cuda" is Triton but for what it trains."""
    return [
        (operator, backend, dtype)
        for operator in operators
        for backend in backend_names
        for dtype in dtypes
        if not (backend in ("cuda", "triton") and dtype == "float64")
        if not (backend == "cuda" and not OPERATORS[operator].composed)
    ]


def check(
    operator: str,
    backend: str,
    dtype: str,
    *,
    seed: int = 0,
    quick: bool = False,
    shape: tuple[int, int, int, int, int] | None = None,
    activation: Activation | None = None,
    seconds: float = 0.0,
) -> Outcome:
    """Run one operator on one backend in one dtype, over all its shapes.

    Args:
        operator: a key of ``OPERATORS``.
        backend: "cpu", "triton" (on the GPU, else in the interpreter) or "reference" (on the GPU if there is one).
        dtype: a key of ``DTYPES``.
        seed: seed of the inputs.
        quick: skip the larger shapes.
        shape: a problem (N,P,D,C,M) that replaces the default shapes: see :meth:`Operator.problem`.
        activation: an activation that replaces the default ones.
        seconds: time to repeat with new inputs, 0 for one pass.

    Raises:
        ValueError: a backend that is unavailable here.
    """
    entry, data_type = OPERATORS[operator], DTYPES[dtype]
    gpu = torch.cuda.is_available() and backend != "cpu"
    interpreted = backend == "triton" and not gpu
    cases = entry.interpreted if interpreted else entry.quick if quick else entry.quick + entry.full
    if shape:
        cases = entry.problem(shape)
    if activation:
        cases = entry.of_activation(cases, activation)
    generator = torch.Generator().manual_seed(seed)
    worst: dict[str, dict[str, Any]] = {}
    failures: list[str] = []
    repeats, count, start = True, 0, time.perf_counter()
    with backends.backend(backend), deterministic():
        for case in itertools.cycle(cases):
            if count >= len(cases) and (failures or time.perf_counter() - start >= seconds):
                break
            count += 1
            try:
                found, again = _errors(entry, case, data_type, "cuda" if gpu else "cpu", generator)
            except Exception as trouble:  # a kernel that raises is a failure too
                reason = (str(trouble).strip() or "no message").splitlines()[0]
                failures.append(f"{case}: {type(trouble).__name__}: {reason}")
                continue
            repeats = repeats and again
            for name, (error, plain) in found.items():
                budget = entry.budget(data_type, plain)
                excess = error / budget if budget else math.inf if error else 0.0
                if not error <= budget:
                    failures.append(f"{case}: {name}: error {error:.2e} exceeds its budget {budget:.2e}")
                if name not in worst or not excess <= worst[name]["of budget"]:
                    worst[name] = {
                        "error": error, "plain": plain, "budget": budget, "of budget": excess, "shape": str(case)
                    }  # fmt: skip
        if not repeats:
            failures.append("a second call gave other bits")
    took = time.perf_counter() - start
    return Outcome(operator, backend, dtype, count, worst, repeats, failures, took)


def _errors(
    entry: Operator, case: Case, dtype: torch.dtype, device: str, generator: torch.Generator
) -> tuple[dict[str, tuple[float, float]], bool]:
    """Return each output's error (the worse of contiguous and strided inputs), plain PyTorch's, and if ours repeats."""
    draws = list(entry.draws(case, dtype, device, generator))
    ours, strided, again = (
        [
            entry.results(entry.function, {n: lay_out(v) for n, v in draw.arguments.items()}, lay_out(draw.upstream))
            for draw in draws
        ]
        for lay_out in (_unchanged, _strided, _unchanged)
    )
    plain = [draw.plain for draw in draws]

    def error(results: list[dict[str, Tensor]], name: str) -> float:
        return relative_error([result[name] for result in results], [draw.truth[name] for draw in draws])

    errors = {name: (max(error(ours, name), error(strided, name)), error(plain, name)) for name in entry.outputs}
    return errors, all(map(same_bits, ours, again))


def _unchanged(value: Any) -> Any:
    return value


def _strided(value: Any) -> Any:
    """Return a strided copy, with gaps between the elements."""
    return torch.stack([value, value], -1)[..., 0] if isinstance(value, Tensor) else value
