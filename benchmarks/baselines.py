"""What a user could write instead, in plain PyTorch: from the authors' way to the strongest formulation known.

Each function has the operator's signature, so that a benchmark can time any of them in its place.
"""

import torch
from torch import Tensor

from mixfeat.activations import PolyReLU


def naive(input: Tensor, weight: Tensor, activation: PolyReLU) -> Tensor:
    """As the authors' released code goes about it: a convolution over patches laid side by side, then masks and pow."""
    num_classes, filters, features = weight.shape
    samples, patches, _ = input.shape
    image = input.reshape(samples, 1, patches * features)
    s = torch.conv1d(image, weight.reshape(-1, 1, features), stride=features).view(
        samples, num_classes, filters, patches
    )
    rho, degree = activation.rho, activation.degree
    curve = s**degree / (degree * rho ** (degree - 1))
    s = torch.where(s <= 0, torch.zeros_like(s), torch.where(s < rho, curve, s - (1 - 1 / degree) * rho))
    return s.sum(dim=(2, 3))


def eager(input: Tensor, weight: Tensor, activation: PolyReLU) -> Tensor:
    """One matrix product, the power by repeated squaring, clamps instead of masks."""
    num_classes, filters, features = weight.shape
    samples, patches, _ = input.shape
    t = input.reshape(-1, features) @ weight.reshape(-1, features).t() * (1 / activation.rho)
    u = t.clamp(0, 1)
    power = _power(u, activation.degree)
    s = power * (activation.rho / activation.degree) + (t - 1).clamp(min=0) * activation.rho
    return s.view(samples, patches, num_classes, filters).sum(dim=(1, 3))


def _power(u: Tensor, exponent: int) -> Tensor:
    if exponent == 1:
        return u
    half = _power(u, exponent // 2)
    return half * half * u if exponent % 2 else half * half


def compiled(mode: str | None = None):
    """torch.compile of :func:`eager`."""
    return torch.compile(eager, mode=mode)
