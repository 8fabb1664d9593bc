"""Activations: the polynomial ReLUs of the feature-learning literature, as small frozen dataclasses.

Each has a ``scale`` > 0 that multiplies it: 1/M makes the fixed second layer a mean. Kernels apply it once, outside
their loops.

A call applies the definition to a tensor, in differentiable PyTorch. Kernels see an activation only as a
:class:`~mixfeat.kernels.polynomial.Polynomial`, the family that holds them all.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from mixfeat import _checks
from mixfeat.kernels.polynomial import Polynomial

__all__ = ["Activation", "Identity", "LeakyReLU", "PolyReLU", "Power", "PowerReLU", "ReLU"]


@dataclass(frozen=True)
class Activation:
    """Base of all activations: frozen, hashable, comparable by value, callable on tensors of any floating dtype."""

    #: this activation as kernels see it
    polynomial: Polynomial = field(init=False, repr=False, compare=False)

    def __call__(self, z: Tensor) -> Tensor:
        """Apply the activation elementwise; differentiable."""
        return self.polynomial(z)

    def __repr__(self) -> str:
        """Show the fields, except optional ones at their default."""
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        options = {"scale": 1.0, "negative_slope": 0.0} if not isinstance(self, LeakyReLU) else {"scale": 1.0}
        listed = (f"{name}={value}" for name, value in shown.items() if options.get(name) != value)
        return f"{type(self).__name__}({', '.join(listed)})"

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, repr=False)
class PolyReLU(Activation):
    """Smoothed ReLU: a polynomial near zero, linear above ``rho`` (Chidambaram et al. 2023, section 3)::

        phi(z) = 0                                    z <= 0
                 z^degree / (degree rho^(degree-1))   0 < z < rho
                 z - (1 - 1/degree) rho               z >= rho

    Args:
        degree: the polynomial's degree, 1 to 16 (alpha in the paper).
        rho: threshold above which the activation is linear, > 0.
        clamp: phi(z) = 0 for z < 0; False extends the polynomial to z < 0, as in the authors' released code.
        scale: factor of phi, > 0.
        negative_slope: if not 0, phi(z) = negative_slope z for z <= 0, as in a leaky ReLU. It needs clamp=True, and
            on a GPU plain PyTorch evaluates it.

    Raises:
        TypeError, ValueError: a degree that is not an integer in 1..16, a rho or scale that is not finite and positive,
            a negative_slope that is not finite, or one with clamp=False.
    """

    degree: int = 8
    rho: float = 0.1
    clamp: bool = True
    scale: float = 1.0
    negative_slope: float = 0.0

    def __post_init__(self) -> None:
        self._set(degree=_checks.degree(self.degree), rho=_checks.positive("rho", self.rho))
        _checks.boolean("clamp", self.clamp)
        self._set(scale=_checks.positive("scale", self.scale))
        self._set(negative_slope=_checks.finite("negative_slope", self.negative_slope))
        if self.negative_slope and not self.clamp:
            raise ValueError(f"negative_slope must be 0 where clamp is False, got {self.negative_slope}")
        self._set(
            polynomial=Polynomial(
                self.degree, self.rho, self.rho * self.scale, self.clamp, upper=True, negative_slope=self.negative_slope
            )
        )


@dataclass(frozen=True, repr=False)
class PowerReLU(Activation):
    """``phi(z) = scale max(z, 0)^degree``, degree 1 to 16."""

    degree: int = 3
    scale: float = 1.0

    def __post_init__(self) -> None:
        self._set(degree=_checks.degree(self.degree), scale=_checks.positive("scale", self.scale))
        self._set(polynomial=Polynomial(self.degree, scale=self.scale * self.degree))


@dataclass(frozen=True, repr=False)
class Power(Activation):
    """``phi(z) = scale z^degree``, degree 1 to 16."""

    degree: int = 2
    scale: float = 1.0

    def __post_init__(self) -> None:
        self._set(degree=_checks.degree(self.degree), scale=_checks.positive("scale", self.scale))
        self._set(polynomial=Polynomial(self.degree, scale=self.scale * self.degree, lower=False))


@dataclass(frozen=True, repr=False)
class ReLU(Activation):
    """``phi(z) = scale max(z, 0)``, with derivative 0 at 0."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        self._set(scale=_checks.positive("scale", self.scale))
        self._set(polynomial=Polynomial(1, scale=self.scale))


@dataclass(frozen=True, repr=False)
class LeakyReLU(Activation):
    """``phi(z) = scale max(z, 0) + scale negative_slope min(z, 0)``; evaluated in plain PyTorch on a GPU."""

    negative_slope: float = 0.01
    scale: float = 1.0

    def __post_init__(self) -> None:
        self._set(negative_slope=_checks.finite("negative_slope", self.negative_slope))
        self._set(scale=_checks.positive("scale", self.scale))
        self._set(polynomial=Polynomial(1, scale=self.scale, negative_slope=self.negative_slope))


@dataclass(frozen=True, repr=False)
class Identity(Activation):
    """``phi(z) = scale z``."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        self._set(scale=_checks.positive("scale", self.scale))
        self._set(polynomial=Polynomial(1, scale=self.scale, lower=False))
