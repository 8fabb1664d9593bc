"""What a user could write instead, in plain PyTorch: from the authors' way to the strongest formulation known.

Each function has the operator's signature, so that a benchmark can time any of them in its place.
"""

from collections.abc import Callable
from typing import Any

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


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of it for the shapes at hand, with the most tuning on a GPU."""
    mode = "max-autotune-no-cudagraphs" if torch.cuda.is_available() else None
    return torch.compile(function, mode=mode, dynamic=False)


def pairwise_naive(input: Tensor, weight: Tensor, target: Tensor, activation: PolyReLU) -> Tensor:
    """Midpoint Mixup of all pairs as written: mix inputs, convolve N^2 samples, cross-entropy to both labels."""
    samples, classes = input.shape[0], weight.shape[0]
    mixed = (input[:, None] + input[None]) / 2
    logits = eager(mixed.flatten(0, 1), weight, activation).view(samples, samples, classes)
    one_hot = F.one_hot(target, classes).to(input.dtype)
    return F.cross_entropy(logits.flatten(0, 1), ((one_hot[:, None] + one_hot[None]) / 2).flatten(0, 1))


class PairwiseRows:
    """The best formulation known: convolve once, some rows of pre-activations against all columns at a time.

    The gradient is written out, in the pass of the loss: so no more than the activations of these rows is ever kept,
    and the compiler sees both directions at once. (With autograd, torch.compile takes 1.7 times as long on a CPU.)
    """

    def __init__(self, rows: int = 16, compile: bool = True) -> None:
        self.rows = rows
        self.loss, self.gradient = self._loss, self._gradient
        if compile:
            self.loss, self.gradient = compiled(self._loss), compiled(self._gradient)

    @staticmethod
    def _logits(t: Tensor, activation: PolyReLU) -> Tensor:
        phi = _power(t.clamp(0, 1), activation.degree) * (1 / activation.degree) + (t - 1).clamp(min=0)
        return phi.sum(dim=(2, 4)) * activation.rho

    @classmethod
    def _loss(cls, rows: Tensor, columns: Tensor, row_label: Tensor, label: Tensor, activation: PolyReLU) -> Tensor:
        logits = cls._logits((rows[:, None] + columns[None]) * (0.5 / activation.rho), activation)
        return -((row_label[:, None] + label[None]) / 2 * logits.log_softmax(-1)).sum()

    @classmethod
    def _gradient(
        cls, rows: Tensor, columns: Tensor, row_label: Tensor, label: Tensor, activation: PolyReLU, column_grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        t = (rows[:, None] + columns[None]) * (0.5 / activation.rho)
        log_p = cls._logits(t, activation).log_softmax(-1)
        mixed = (row_label[:, None] + label[None]) / 2
        d = log_p.exp() - mixed
        e = d[:, :, None, :, None] * _power(t.clamp(0, 1), activation.degree - 1)
        column_grad += e.sum(0)
        return -(mixed * log_p).sum(), e.sum(1)

    def __call__(
        self, input: Tensor, weight: Tensor, target: Tensor, activation: PolyReLU, backward: bool = True
    ) -> Tensor:
        """The loss, or, with ``backward``, its gradient to ``weight``."""
        samples, patches, features = input.shape
        label = F.one_hot(target, weight.shape[0]).to(input.dtype)
        with torch.no_grad():
            x, w = input.reshape(-1, features), weight.reshape(-1, features)
            s = (x @ w.t()).view(samples, patches, *weight.shape[:2])
            loss = torch.zeros((), device=input.device)
            row_grads, column_grad = [], torch.zeros_like(s)
            for i in range(0, samples, self.rows):
                part = slice(i, i + self.rows)
                if backward:
                    share, row_grad = self.gradient(s[part], s, label[part], label, activation, column_grad)
                    row_grads.append(row_grad)
                else:
                    share = self.loss(s[part], s, label[part], label, activation)
                loss += share
            if backward:
                grad = (torch.cat(row_grads) + column_grad) * (0.5 / samples**2)
                return (grad.view(x.shape[0], -1).t() @ x).view_as(weight)
            return loss / samples**2


def mixup(input: Tensor, index: Tensor, lam: Tensor) -> Tensor:
    """As users write it."""
    return lam * input + (1 - lam) * input[index]


def mixup_lerp(input: Tensor, index: Tensor, lam: Tensor) -> Tensor:
    """In two passes, the fewest that eager PyTorch offers."""
    return torch.lerp(input[index], input, lam)


def mixup_timm(input: Tensor, index: Tensor, lam: Tensor) -> Tensor:
    """timm's way: in the input's own memory, with the batch reversed, whatever ``index`` says."""
    return input.mul_(lam).add_(input.flip(0).mul_(1 - lam))


def mixup_torchvision(input: Tensor, index: Tensor, lam: Tensor) -> Tensor:
    """torchvision's way: with the sample before, whatever ``index`` says."""
    return input.roll(1, 0).mul_(1 - lam).add_(input.mul(lam))


def dense_cross_entropy(input: Tensor, target_a: Tensor, target_b: Tensor, lam: Tensor) -> Tensor:
    """The loss of timm and torchvision: dense targets are mixed, then compared."""
    a, b = (F.one_hot(target, input.shape[1]).to(input.dtype) for target in (target_a, target_b))
    return F.cross_entropy(input, lam * a + (1 - lam) * b)


def soft_cross_entropy_timm(input: Tensor, target: Tensor) -> Tensor:
    """timm's SoftTargetCrossEntropy."""
    return torch.sum(-target * F.log_softmax(input, dim=-1), dim=-1).mean()


def two_cross_entropies(input: Tensor, target_a: Tensor, target_b: Tensor, lam: Tensor) -> Tensor:
    """The loss of the authors' code and of mixup-cifar10."""
    return lam * F.cross_entropy(input, target_a) + (1 - lam) * F.cross_entropy(input, target_b)
