"""The one family of activations that kernels evaluate; every activation of :mod:`mixfeat.activations` is a member."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MAX_DEGREE", "Polynomial"]

MAX_DEGREE = 16


class Polynomial(NamedTuple):
    """The family of all activations, in the form that kernels evaluate.

    With ``t = z / threshold`` and ``u = t``, clamped to at least 0 if ``lower`` and to at most 1 if ``upper``::

        phi(z)  = scale * (u^degree / degree + max(t - 1, 0) [if upper] + negative_slope * min(t, 0))
        phi'(z) = scale / threshold * (u^(degree - 1) + negative_slope [t <= 0])

    With ``degree == 1`` and ``lower`` the power ``u^0`` is the step ``[t > 0]``. A negative slope needs ``lower``; CPU
    kernels evaluate it, those of other backends do not.
    """

    degree: int
    threshold: float = 1.0
    scale: float = 1.0
    lower: bool = True
    upper: bool = False
    negative_slope: float = 0.0

    @classmethod
    def of(cls, fields: Sequence[float]) -> "Polynomial":
        """Return the polynomial with these fields; a PyTorch operator takes it as a list of numbers."""
        if isinstance(fields, Polynomial):
            return fields
        degree, threshold, scale, lower, upper, negative_slope = fields
        return cls(int(degree), threshold, scale, bool(lower), bool(upper), negative_slope)

    def __call__(self, z: Tensor) -> Tensor:
        """Compute phi(z), elementwise and differentiable."""
        t = z if self.threshold == 1 else z / self.threshold
        u = t.clamp(max=1) if self.upper else t  # keeps the branch that `where` drops finite, and so its gradient
        if self.lower:
            u = torch.relu(u)
        phi = self.scale / self.degree * u**self.degree
        if self.upper:
            phi = torch.where(t < 1, phi, self.scale * (t - (1 - 1 / self.degree)))
        return torch.where(t > 0, phi, self.scale * self.negative_slope * t) if self.negative_slope else phi

    def slope(self, z: Tensor) -> Tensor:
        """Compute phi'(z), elementwise."""
        t = z if self.threshold == 1 else z / self.threshold
        u = t.clamp(min=0 if self.lower else None, max=1 if self.upper else torch.inf)
        power = (t > 0).to(z.dtype) if self.lower and self.degree == 1 else _power(u, self.degree - 1)
        if self.negative_slope:
            power = torch.where(t > 0, power, self.negative_slope)
        return self.scale / self.threshold * power

    def curvature(self, z: Tensor) -> Tensor:
        """Compute phi''(z), elementwise; 0 where it jumps."""
        t = z if self.threshold == 1 else z / self.threshold
        u = -F.threshold(-t, -1.0, 0.0) if self.upper else t  # 0 from 1 on; several times as fast as `where`
        u = u.clamp(min=0) if self.lower else u
        curvature = self.scale / self.threshold**2 * (self.degree - 1) * _power(u, max(0, self.degree - 2))
        if self.degree == 2:  # 0^0
            curvature = curvature.where(t > 0, 0) if self.lower else curvature
            curvature = curvature.where(t < 1, 0) if self.upper else curvature
        return curvature


def _power(u: Tensor, exponent: int) -> Tensor:
    """Compute u^exponent by repeated squaring, several times as fast as PyTorch's ``pow`` on a CPU."""
    power = None
    while exponent:
        if exponent & 1:
            power = u if power is None else power * u
        exponent >>= 1
        if exponent:
            u = u * u
    return torch.ones_like(u) if power is None else power
