"""Parametrise tests over the table of operators: ``@over("main")`` gives a test a ``problem`` to solve.

A test's id names the operator, the backend, sizes and options, and the dtype:
``pairwise_mixup_loss-cpu-N33xP5xD20xC10xM4-nodes=1-bfloat16``.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import mixfeat as mf
from mixfeat.operators import DTYPES, OPERATORS, Arguments, Case, Draw, Operator, Results, relative_error

BACKENDS = ("cpu", "triton", "reference")


@dataclass(frozen=True)
class Problem:
    """A call of an operator on a backend in one dtype."""

    operator: Operator
    backend: str
    case: Case
    dtype: torch.dtype
    generator: torch.Generator

    def __str__(self) -> str:
        return f"{self.operator}-{self.backend}-{self.case}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def device(self) -> str:
        """The type of device that the backend serves."""
        return "cuda" if self.backend == "triton" and torch.cuda.is_available() else "cpu"

    def draws(self, lay_out: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Iterable[Draw]:
        """Draw as many arguments and upstream gradients as it takes to compare errors."""
        return self.operator.draws(self.case, self.dtype, self.device, self.generator, lay_out)

    def draw(self, lay_out: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Draw:
        """Draw arguments and an upstream gradient."""
        return next(iter(self.draws(lay_out)))

    def results(self, arguments: Arguments, upstream: Tensor | None = None) -> Results:
        """The operator's value and gradients."""
        return self.operator.results(self.operator.function, arguments, upstream)

    def hold(self, draws: Iterable[Draw]) -> None:
        """Hold values and gradients to the definition in float64, within the budget of the dtype."""
        draws = list(draws)
        found = [self.results(draw.arguments, draw.upstream) for draw in draws]
        for output in self.operator.outputs:
            mine, truth = [results[output] for results in found], [draw.truth[output] for draw in draws]
            dtype = self.operator.result_dtype(output, self.dtype)
            assert all(result.dtype == dtype and result.shape == t.shape for result, t in zip(mine, truth, strict=True))
            plain = relative_error([draw.plain[output] for draw in draws], truth) if self.dtype.itemsize == 2 else 0.0
            error, budget = relative_error(mine, truth), self.operator.budget(self.dtype, plain)
            assert error <= budget, f"{output}: {error:.1e} > {budget:.1e}"


def problems(
    cases: str,
    dtypes: Iterable[str] = ("float32",),
    backends: Iterable[str] = BACKENDS,
    *,
    operators: Iterable[str] = OPERATORS,
    interpreted: str | None = None,
    seed: int = 0,
) -> list[Problem]:
    """List problems over these fields of the table.

    Args:
        cases: the fields of :class:`mixfeat.operators.Operator`, separated by spaces.
        dtypes, backends: Triton gets no float64.
        operators: their names.
        interpreted: the fields in Triton's interpreter, which takes long. By default the same. There, only the field
            ``interpreted`` is run in other dtypes than float32 and for composed operators, and each value of an option
            once.
        seed: of the generator of each problem.
    """
    found = {}
    for name, backend in itertools.product(operators, backends):
        operator = OPERATORS[name]
        in_interpreter = backend == "triton" and mf.backends.interpreted()
        for field in (interpreted if in_interpreter and interpreted is not None else cases).split():
            few = in_interpreter and field != "interpreted"
            if few and operator.composed:
                continue
            chosen = _each_option_once(getattr(operator, field)) if few else getattr(operator, field)
            for case, dtype in itertools.product(chosen, ("float32",) if few else dtypes):
                if not (backend == "triton" and dtype == "float64"):
                    generator = torch.Generator().manual_seed(seed)
                    problem = Problem(operator, backend, case, DTYPES[dtype], generator)
                    found.setdefault(str(problem), problem)
    return list(found.values())


def _each_option_once(cases: Iterable[Case]) -> Iterable[Case]:
    """Leave out cases whose options all have values that they have in earlier cases, at the same sizes or others."""
    seen: set[tuple[str, str]] = set()
    for case in cases:
        options = {(name, str(value)) for name, value in case.options.items()}
        if not options or not options <= seen:
            yield case
        seen |= options


def over(cases: str, dtypes: Iterable[str] = ("float32",), backends: Iterable[str] = BACKENDS, **options):
    """Parametrise a test over :func:`problems`; each problem's backend is in force during the test."""
    parameters = [
        pytest.param(problem, id=str(problem), marks=[pytest.mark.triton] * (problem.backend == "triton"))
        for problem in problems(cases, dtypes, backends, **options)
    ]
    return pytest.mark.parametrize("problem", parameters, indirect=True)


# places in memory: the same numbers, or one number of a dimension throughout

Layout = Callable[[Tensor], Tensor]


def _room(tensor: Tensor, *shape: int) -> Tensor:
    """Memory full of what must not be read: NaN, or a number that no index may be."""
    return tensor.new_full(shape, math.nan if tensor.is_floating_point() else -(2**62))


def _with_gaps(tensor: Tensor) -> Tensor:
    return _room(tensor, *tensor.shape, 2)[..., 0].copy_(tensor)


def _rows_apart(tensor: Tensor) -> Tensor:
    return _room(tensor, tensor.shape[0], 2, *tensor.shape[1:])[:, 1].copy_(tensor) if tensor.dim() else tensor


def _at_an_offset(tensor: Tensor) -> Tensor:
    return _room(tensor, tensor.numel() + 3)[3:].view(tensor.shape).copy_(tensor)


def _transposed(tensor: Tensor) -> Tensor:
    """The dimensions in memory in reverse."""
    order = range(tensor.dim() - 1, -1, -1)
    return tensor.permute(*order).contiguous().permute(*order) if tensor.dim() else tensor


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _real_part(tensor: Tensor) -> Tensor:
    """Of a conjugate, which PyTorch forms when it is read."""
    return torch.complex(tensor, tensor).conj().real if tensor.dtype in (torch.float32, torch.float64) else tensor


def _one_sample(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor) if tensor.dim() else tensor


def _one_column(tensor: Tensor) -> Tensor:
    return tensor[..., :1].expand_as(tensor) if tensor.dim() else tensor


LAYOUTS = {
    "gaps": _with_gaps, "rows apart": _rows_apart, "offset": _at_an_offset, "transposed": _transposed,
    "channels_last": _channels_last, "real part": _real_part, "one sample": _one_sample, "one column": _one_column,
}  # fmt: skip
