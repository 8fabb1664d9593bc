"""Baselines in plain PyTorch, from the authors' code to the strongest formulation known.

Each function has the signature of its operator, so that a benchmark can time it in the operator's place.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixfeat.activations import PolyReLU, Power

#: A user's contender, by its name: ``--against`` puts it here.
AGAINST: dict[str, Callable[..., Any]] = {}


def naive(input: Tensor, weight: Tensor, activation: PolyReLU) -> Tensor:
    """Follow the authors' released code: convolve over patches laid side by side, then apply masks and pow."""
    num_classes, filters, patch_dim = weight.shape
    samples, patches, _ = input.shape
    image = input.reshape(samples, 1, patches * patch_dim)
    s = torch.conv1d(image, weight.reshape(-1, 1, patch_dim), stride=patch_dim).view(
        samples, num_classes, filters, patches
    )
    rho, degree = activation.rho, activation.degree
    poly = s**degree / (degree * rho ** (degree - 1))
    s = torch.where(s <= 0, torch.zeros_like(s), torch.where(s < rho, poly, s - (1 - 1 / degree) * rho))
    return s.sum(dim=(2, 3))


def eager(input: Tensor, weight: Tensor, activation: PolyReLU) -> Tensor:
    """Use one matrix product, repeated squaring for the power, and clamps in place of masks."""
    num_classes, filters, patch_dim = weight.shape
    samples, patches, _ = input.shape
    t = input.reshape(-1, patch_dim) @ weight.reshape(-1, patch_dim).t() * (1 / activation.rho)
    u = t.clamp(0, 1)
    power = _power(u, activation.degree)
    s = power * (activation.rho / activation.degree) + (t - 1).clamp(min=0) * activation.rho
    return s.view(samples, patches, num_classes, filters).sum(dim=(1, 3))


def _power(u: Tensor, exponent: int) -> Tensor:
    if exponent == 1:
        return u
    half = _power(u, exponent // 2)
    return half * half * u if exponent % 2 else half * half


def compiled(function: Callable[..., Any], *, autotune: bool = torch.cuda.is_available()) -> Callable[..., Any]:
    """Compile for static shapes; ``autotune`` (the default on a GPU) with every option."""
    return torch.compile(function, mode="max-autotune-no-cudagraphs" if autotune else None, dynamic=False)


def pairwise_naive(input: Tensor, weight: Tensor, target: Tensor, activation: PolyReLU) -> Tensor:
    """Follow the definition of the midpoint loss: mix inputs, convolve N^2 samples, compare with both labels."""
    samples, classes = input.shape[0], weight.shape[0]
    mixed = (input[:, None] + input[None]) / 2
    logits = eager(mixed.flatten(0, 1), weight, activation).view(samples, samples, classes)
    one_hot = F.one_hot(target, classes).to(input.dtype)
    return F.cross_entropy(logits.flatten(0, 1), ((one_hot[:, None] + one_hot[None]) / 2).flatten(0, 1))


class PairwiseRows:
    """The best formulation known: convolve once, then pair a few rows of pre-activations with all columns at a time.

    The gradient is written out and computed together with the loss. So only the activations of these rows are in memory
    at once, and the compiler sees both directions. (With autograd, torch.compile takes 1.7 times as long on a CPU.)

    Args:
        rows: number of rows at a time.
        compile: whether to compile the work on one block of rows.
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
        """Return the loss or, with ``backward``, its gradient to ``weight``."""
        samples, patches, patch_dim = input.shape
        label = F.one_hot(target, weight.shape[0]).to(input.dtype)
        with torch.no_grad():
            x, w = input.reshape(-1, patch_dim), weight.reshape(-1, patch_dim)
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


def pairwise_binomial(input: Tensor, weight: Tensor, target: Tensor, activation: Power) -> Tensor:
    """Expand the power of a sum: the logits of all pairs are one matrix product for each class.

    Of Power(q) alone: sum_r (s_ir + s_jr)^q = sum_k binom(q, k) <s_i^k, s_j^(q-k)>. At lam = 1/2 logits are symmetric
    in i and j, so that the labels of j are compared where those of i are.
    """
    samples, degree = input.shape[0], activation.degree
    s = torch.einsum("npd,cmd->cnpm", input, weight).flatten(2)
    powers = [torch.ones_like(s)]
    for _ in range(degree):
        powers.append(powers[-1] * s)
    left = torch.cat([math.comb(degree, k) / 2**degree * powers[k] for k in range(degree + 1)], -1)
    right = torch.cat(powers[::-1], -1)
    log_p = (left @ right.transpose(1, 2)).log_softmax(0)
    return -log_p[target, torch.arange(samples, device=input.device)].mean()


def batched_loss(input: Tensor, weight: Tensor, target: Tensor, activation: PolyReLU, lam: float | None) -> Tensor:
    """Sum the losses of R networks (R,C,M,D) in one formula, which a compiler can fuse; ``lam`` None: without pairs."""
    s = torch.einsum("npd,rcmd->rncpm", input, weight).flatten(-2)
    rho, degree = activation.rho, activation.degree
    t = s / rho if lam is None else lam / rho * s[:, :, None] + (1 - lam) / rho * s[:, None]
    logits = (rho * (_power(t.clamp(0, 1), degree) / degree + (t - 1).clamp(min=0))).sum(-1)
    log_p = logits.log_softmax(-1)
    label = F.one_hot(target, weight.shape[1]).to(log_p)
    if lam is not None:
        label = lam * label[:, None] + (1 - lam) * label[None]
    return -(label * log_p).sum(-1).flatten(1).mean(1).sum()


def mixup(input: Tensor, index: Tensor, lam: Tensor) -> Tensor:
    """Mix as most users write it."""
    return lam * input + (1 - lam) * input[index]


def mixup_lerp(input: Tensor, index: Tensor, lam: Tensor) -> Tensor:
    """Mix in place into the gathered partners: one allocation and two passes, the fewest that eager PyTorch offers."""
    partners = input[index]
    return partners.lerp_(input, lam.to(input.dtype))


def mixup_of_bytes(input: Tensor, index: Tensor, lam: Tensor) -> Tensor:
    """Mix bytes in place into the partners, gathered as bytes and converted."""
    return input[index].float().lerp_(input.float(), lam)


def cutmix(input: Tensor, index: Tensor, box: Tensor) -> Tensor:
    """Cut and paste as timm does, into a copy; reading the box waits for the device."""
    y0, y1, x0, x1 = box.tolist()
    output = input.clone()
    output[:, :, y0:y1, x0:x1] = input[index, :, y0:y1, x0:x1]
    return output


def cutmix_where(input: Tensor, index: Tensor, box: Tensor) -> Tensor:
    """Select by a mask, which a compiler makes one pass over memory."""
    y0, y1, x0, x1 = box.unbind()
    y, x = (torch.arange(size, device=input.device) for size in input.shape[-2:])
    inside = ((y >= y0) & (y < y1))[:, None] & (x >= x0) & (x < x1)
    return torch.where(inside, input[index], input)


def dense_binary_cross_entropy(input: Tensor, target_a: Tensor, target_b: Tensor, lam: Tensor) -> Tensor:
    """Compute the loss as timm does: binary cross-entropy to mixed dense targets."""
    a, b = (F.one_hot(target, input.shape[1]).to(input.dtype) for target in (target_a, target_b))
    return F.binary_cross_entropy_with_logits(input, lam * a + (1 - lam) * b)


def sparse_binary_cross_entropy(input: Tensor, target_a: Tensor, target_b: Tensor, lam: Tensor) -> Tensor:
    """Compute it without a dense target: the loss to all zeros, less the logits of both labels."""
    labels = lam * input.gather(1, target_a[:, None]) + (1 - lam) * input.gather(1, target_b[:, None])
    return (F.softplus(input.float()).sum() - labels.sum()) / input.numel()


def dense_cross_entropy(input: Tensor, target_a: Tensor, target_b: Tensor, lam: Tensor) -> Tensor:
    """Compute the loss as timm and torchvision do: cross-entropy to mixed dense targets."""
    a, b = (F.one_hot(target, input.shape[1]).to(input.dtype) for target in (target_a, target_b))
    return F.cross_entropy(input, lam * a + (1 - lam) * b)


def logsumexp_cross_entropy(input: Tensor, target_a: Tensor, target_b: Tensor, lam: Tensor) -> Tensor:
    """Compute the loss from one logsumexp and the logits of both labels, with no log-probabilities in memory."""
    labels = lam * input.gather(1, target_a[:, None]) + (1 - lam) * input.gather(1, target_b[:, None])
    return input.logsumexp(1).mean() - labels.mean()


def logsumexp_soft_cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    """Compute the loss of dense targets from one logsumexp."""
    return (input.logsumexp(1) * target.sum(1) - (input * target).sum(1)).mean()


def two_cross_entropies(input: Tensor, target_a: Tensor, target_b: Tensor, lam: Tensor) -> Tensor:
    """Compute the loss as the authors' code and mixup-cifar10 do."""
    return lam * F.cross_entropy(input, target_a) + (1 - lam) * F.cross_entropy(input, target_b)
