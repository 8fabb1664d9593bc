"""Activations: the polynomial ReLUs of the feature-learning literature, as small frozen values.

Calling one applies its definition to a tensor (plain PyTorch, differentiable). Every kernel sees an activation only as
a :class:`~mixfeat.kernels.polynomial.Polynomial`, the one family that holds them all.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mixfeat import _checks
from mixfeat.kernels.polynomial import Polynomial

__all__ = ["Activation", "Identity", "PolyReLU", "Power", "PowerReLU", "ReLU"]


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
        self._set(degree=_checks.degree(self.degree), rho=_checks.positive("rho", self.rho))
        _checks.boolean("clamp", self.clamp)
        self._set(polynomial=Polynomial(self.degree, self.rho, self.rho, lower=self.clamp, upper=True))


@dataclass(frozen=True)
class PowerReLU(Activation):
    """``phi(z) = max(z, 0)^degree``, degree 1 to 16."""

    degree: int = 3

    def __post_init__(self) -> None:
        self._set(degree=_checks.degree(self.degree))
        self._set(polynomial=Polynomial(self.degree, scale=float(self.degree)))


@dataclass(frozen=True)
class Power(Activation):
    """``phi(z) = z^degree``, degree 1 to 16."""

    degree: int = 2

    def __post_init__(self) -> None:
        self._set(degree=_checks.degree(self.degree))
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
