"""What a user could write instead, in plain PyTorch: from the authors' way to the strongest formulation known.

Each function has the operator's signature, so that a benchmark can time any of them in its place.
"""

import torch
import torch.nn.functional as F
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


def pairwise_naive(input: Tensor, weight: Tensor, target: Tensor, activation: PolyReLU) -> Tensor:
    """Midpoint Mixup of all pairs as written: mix inputs, convolve N^2 samples, cross-entropy to both labels."""
    samples, classes = input.shape[0], weight.shape[0]
    mixed = (input[:, None] + input[None]) / 2
    logits = eager(mixed.flatten(0, 1), weight, activation).view(samples, samples, classes)
    one_hot = F.one_hot(target, classes).to(input.dtype)
    return F.cross_entropy(logits.flatten(0, 1), ((one_hot[:, None] + one_hot[None]) / 2).flatten(0, 1))


class PairwiseRows:
    """The best formulation known: convolve once, a few rows of pre-activations against all columns at a time.

    Each group of rows is differentiated by itself, so that no more than its activations are ever kept.
    """

    def __init__(self, rows: int = 8, mode: str | None = None, compile: bool = True) -> None:
        self.rows = rows
        self.loss = torch.compile(self._loss, mode=mode, dynamic=False) if compile else self._loss

    @staticmethod
    def _loss(rows: Tensor, columns: Tensor, row_label: Tensor, column_label: Tensor, activation: PolyReLU) -> Tensor:
        t = (rows[:, None] + columns[None]) * (0.5 / activation.rho)
        phi = _power(t.clamp(0, 1), activation.degree) * (1 / activation.degree) + (t - 1).clamp(min=0)
        logits = phi.sum(dim=(2, 4)) * activation.rho
        label = (row_label[:, None] + column_label[None]) / 2
        return -(label * logits.log_softmax(-1)).sum() / columns.shape[0] ** 2

    def __call__(
        self, input: Tensor, weight: Tensor, target: Tensor, activation: PolyReLU, backward: bool = True
    ) -> Tensor:
        """The loss; with ``backward`` its gradient goes to ``weight.grad``."""
        samples, patches, features = input.shape
        label = F.one_hot(target, weight.shape[0]).to(input.dtype)
        with torch.set_grad_enabled(backward):
            product = input.reshape(-1, features) @ weight.reshape(-1, features).t()
            s = product.view(samples, patches, *weight.shape[:2])
        columns = s.detach().requires_grad_(backward)
        total = torch.zeros((), device=input.device)
        for i in range(0, samples, self.rows):
            part = slice(i, i + self.rows)
            with torch.set_grad_enabled(backward):
                loss = self.loss(columns[part], columns, label[part], label, activation)
            if backward:
                loss.backward()
            total += loss.detach()
        if backward:
            s.backward(columns.grad)
        return total
