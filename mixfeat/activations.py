"""Activations: the polynomial ReLUs of the feature-learning literature, as small frozen values.

Calling one applies its definition to a tensor (plain PyTorch, differentiable). Every kernel sees an activation only as
a :class:`Polynomial`, the one family that holds them all.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["MAX_DEGREE", "Activation", "Identity", "PolyReLU", "Polynomial", "Power", "PowerReLU", "ReLU"]

MAX_DEGREE = 16


class Polynomial(NamedTuple):
    """The family of all activations here, in the form that kernels evaluate.

    With ``t = z / threshold`` and ``u = t``, raised to at least 0 if ``lower`` and cut to at most 1 if ``upper``::

        phi(z)  = scale * (u^degree / degree + max(t - 1, 0) [if upper])
        phi'(z) = scale / threshold * u^(degree - 1)

    where for ``degree == 1`` and ``lower`` the power ``u^0`` is the step ``[t > 0]``.
    """

    degree: int
    threshold: float = 1.0
    scale: float = 1.0
    lower: bool = True
    upper: bool = False

    @classmethod
    def of(cls, fields: Sequence[float]) -> "Polynomial":
        """From its fields as numbers, the form in which operators of PyTorch take it."""
        degree, threshold, scale, lower, upper = fields
        return cls(int(degree), threshold, scale, bool(lower), bool(upper))

    def __call__(self, z: Tensor) -> Tensor:
        """phi(z), elementwise and differentiable."""
        t = z if self.threshold == 1 else z / self.threshold
        u = t.clamp(max=1) if self.upper else t  # keeps the branch that `where` drops finite, and so its gradient
        if self.lower:
            u = torch.relu(u)
        curve = self.scale / self.degree * u**self.degree
        return torch.where(t < 1, curve, self.scale * (t - (1 - 1 / self.degree))) if self.upper else curve

    def derivative(self, z: Tensor) -> Tensor:
        """phi'(z), elementwise."""
        t = z if self.threshold == 1 else z / self.threshold
        u = t.clamp(min=0 if self.lower else None, max=1 if self.upper else torch.inf)
        power = (t > 0).to(z.dtype) if self.lower and self.degree == 1 else u ** (self.degree - 1)
        return self.scale / self.threshold * power


@dataclass(frozen=True)
class Activation:
    """Base of all activations: frozen, hashable, comparable by value, callable on tensors of any floating dtype."""

    #: this activation as kernels see it
    polynomial: Polynomial = field(init=False, repr=False, compare=False)

    def __call__(self, z: Tensor) -> Tensor:
        """Apply the activation elementwise; differentiable."""
        return self.polynomial(z)

    def _set(self, **fields: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class PolyReLU(Activation):
    """Smoothed ReLU: a polynomial near zero, linear above ``rho`` (Chidambaram et al. 2023, section 3)::

        phi(z) = 0                                    z <= 0
                 z^degree / (degree rho^(degree-1))   0 < z < rho
                 z - (1 - 1/degree) rho               z >= rho

    Args:
        degree: the polynomial's degree, 1 to 16 (alpha in the paper).
        rho: threshold above which the activation is linear, > 0.
        clamp: with False the polynomial also serves z < 0, as in the authors' released code.

    Raises:
        TypeError, ValueError: for a degree that is no integer in 1..16 or a rho that is not finite and positive.
    """

    degree: int = 8
    rho: float = 0.1
    clamp: bool = True

    def __post_init__(self) -> None:
        self._set(degree=_degree(self.degree), rho=_positive("rho", self.rho))
        if not isinstance(self.clamp, bool):
            raise TypeError(f"clamp must be a bool, got {self.clamp!r}")
        self._set(polynomial=Polynomial(self.degree, self.rho, self.rho, lower=self.clamp, upper=True))


@dataclass(frozen=True)
class PowerReLU(Activation):
    """``phi(z) = max(z, 0)^degree``, degree 1 to 16."""

    degree: int = 3

    def __post_init__(self) -> None:
        self._set(degree=_degree(self.degree))
        self._set(polynomial=Polynomial(self.degree, scale=float(self.degree)))


@dataclass(frozen=True)
class Power(Activation):
    """``phi(z) = z^degree``, degree 1 to 16."""

    degree: int = 2

    def __post_init__(self) -> None:
        self._set(degree=_degree(self.degree))
        self._set(polynomial=Polynomial(self.degree, scale=float(self.degree), lower=False))


@dataclass(frozen=True)
class ReLU(Activation):
    """``phi(z) = max(z, 0)``, with derivative 0 at 0."""

    def __post_init__(self) -> None:
        self._set(polynomial=Polynomial(1))


@dataclass(frozen=True)
class Identity(Activation):
    """``phi(z) = z``."""

    def __post_init__(self) -> None:
        self._set(polynomial=Polynomial(1, lower=False))


def _degree(value: Any) -> int:
    try:
        degree = operator.index(value)
    except TypeError:
        raise TypeError(f"degree must be an integer, got {value!r}") from None
    if isinstance(value, bool):
        raise TypeError(f"degree must be an integer, got {value!r}")
    if not 1 <= degree <= MAX_DEGREE:
        raise ValueError(f"degree must be between 1 and {MAX_DEGREE}, got {degree}")
    return degree


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be finite and positive, got {value}")
    return number
