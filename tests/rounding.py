"""How far rounding may put a result off: a running error analysis, in float64, along with the value itself.

A formula written with :class:`Approximate` numbers yields a bound for every element of its result. Unlike a relative
error of the whole it says something of a single number that cancels, and of one right beside a step of the activation.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

#: half the distance from 1 to the next number
UNIT = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


class Approximate:
    """Numbers, and for each how far it may be off.

    Args:
        value: what the numbers are.
        unit: relative rounding error of an operation.
        sums: that of adding two numbers inside a sum, which kernels form in float32 at least.
        error: how far the numbers may be off already.
    """

    def __init__(self, value: Tensor, unit: float, sums: float, error: Tensor | None = None) -> None:
        self.value, self.unit, self.sums = value.double(), unit, sums
        self.error = torch.zeros_like(self.value) if error is None else error

    def _of(self, value: Tensor, error: Tensor, operations: float = 2) -> "Approximate":
        return Approximate(value, self.unit, self.sums, error + operations * self.unit * value.abs())

    def __add__(self, other: "Approximate") -> "Approximate":
        return self._of(self.value + other.value, self.error + other.error)

    def __mul__(self, other: "Approximate | Tensor | float") -> "Approximate":
        if not isinstance(other, Approximate):
            return self._of(self.value * other, (self.error * other).abs())
        a, b = self.value.abs(), other.value.abs()
        return self._of(self.value * other.value, self.error * (b + other.error) + a * other.error)

    def minus(self, other: Tensor) -> "Approximate":
        """The difference to exact numbers."""
        return self._of(self.value - other, self.error, 1)

    def moved(self, f: Callable[[Tensor], Tensor]) -> "Approximate":
        """The same numbers elsewhere: indexed, expanded, permuted."""
        return Approximate(f(self.value), self.unit, self.sums, f(self.error))

    def sum(self, *dims: int) -> "Approximate":
        """In any order of the terms."""
        terms = math.prod(self.value.shape[d] for d in dims)
        rounding = terms * self.sums * self.value.abs().sum(dims)
        return self._of(self.value.sum(dims), self.error.sum(dims) + rounding)

    def einsum(self, equation: str, other: "Approximate") -> "Approximate":
        """A sum of products, in any order of the terms."""
        factors, result = equation.split("->")
        sizes = dict(zip(factors.replace(",", ""), (*self.value.shape, *other.value.shape), strict=True))
        terms = math.prod(size for letter, size in sizes.items() if letter not in result)
        a, b = self.value.abs(), other.value.abs()
        error = torch.einsum(equation, self.error, b + other.error) + torch.einsum(equation, a, other.error)
        rounding = (terms * self.sums + 2 * self.unit) * torch.einsum(equation, a, b)
        return self._of(torch.einsum(equation, self.value, other.value), error + rounding)

    def through(self, f: Callable[[Tensor], Tensor], operations: float = 4) -> "Approximate":
        """Of a function that is monotone to either side of 0, steps included."""
        value = f(self.value)
        ends = (f(self.value + sign * self.error) - value for sign in (-1, 1))
        return self._of(value, torch.stack([end.abs() for end in ends]).amax(0), operations)

    def log_softmax(self) -> "Approximate":
        """Over the last dimension; its exponential function errs by some units."""
        value, (size, largest) = self.value.log_softmax(-1), (self.value.shape[-1], self.value.abs().amax(-1, True))
        rounding = size * self.sums + 16 * self.unit * (1 + largest)
        return self._of(value, self.error + self.error.amax(-1, keepdim=True) + rounding)

    def exp_of_negative(self) -> "Approximate":
        """The exponential function of what is at most 0; where it leaves float32's normal numbers it may be 0."""
        result = self.through(lambda value: value.clamp(max=0).exp(), 8)
        result.error += 2 * torch.finfo(torch.float32).smallest_normal
        return result

    def rounded(self, dtype: torch.dtype) -> "Approximate":
        """As it is returned; a number too small for the dtype may be lost."""
        lost = 2 * torch.finfo(dtype).smallest_normal
        return Approximate(self.value, self.unit, self.sums, self.error + 2 * UNIT[dtype] * self.value.abs() + lost)


def assert_within(name: str, result: Tensor, truth: Tensor, bound: Tensor) -> None:
    """Every element is within its bound of the truth, infinite only beyond the dtype's range, and NaN where that is."""
    assert result.shape == truth.shape == bound.shape, f"{name}: {result.shape}, {truth.shape}, {bound.shape}"
    off = (result.double() - truth).abs()
    # bounds are of numbers of any size; those beyond the dtype's range round to infinity
    overflows = result.isinf() & (truth * result.sign() + bound > torch.finfo(result.dtype).max)
    wrong = ~((off <= bound) | overflows | (result.isnan() & truth.isnan()))
    if wrong.any():
        worst = (off / bound).nan_to_num(torch.inf).where(wrong, 0).argmax()
        a, b, c = (t.flatten()[worst].item() for t in (result, truth, bound))
        raise AssertionError(f"{name}: {int(wrong.sum())} of {wrong.numel()} off, worst {a!r}, not {b!r} ± {c:.1e}")
