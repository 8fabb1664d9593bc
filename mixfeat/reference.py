"""The operators in plain PyTorch: the definition that every kernel is held to, for any dtype and device.

They are differentiable by autograd, read like their formulas, and check no arguments; ``mixfeat.functional`` does.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixfeat.activations import Activation
from mixfeat.kernels.polynomial import Polynomial

__all__ = [
    "cutmix", "gradient_descent", "mixup", "mixup_binary_cross_entropy", "mixup_cross_entropy", "pairwise_mixup_loss",
    "patch_conv", "soft_target_cross_entropy",
]  # fmt: skip


def mixup(
    input: Tensor, index: Tensor, lam: float | Tensor, dim: int = 0, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Compute ``lam_n x_n + (1 - lam_n) x_{index_n}``, samples n along ``dim``; ``lam`` a float, (), (N,) or (N,P).

    The second dimension of (N,P) is the one after ``dim``: each patch has its own weight.

    A tensor ``lam`` is not rounded to a half-precision input's dtype. The result is rounded to it, or to ``dtype``.
    """
    if isinstance(lam, Tensor):
        lam = across(lam, input, dim)
    return (lam * input + (1 - lam) * input.index_select(dim, index)).to(dtype or input.dtype)


def across(lam: Tensor, samples: Tensor, dim: int) -> Tensor:
    """Reshape weights (), (N,) or (N,P) to broadcast over samples along ``dim``."""
    after = samples.dim() - dim % samples.dim() - max(1, lam.dim())
    return lam.reshape(*(lam.shape or (1,)), *[1] * after)


def cutmix(input: Tensor, index: Tensor, box: Tensor) -> Tensor:
    """Paste x_{index_n} inside the box of x_n; ``input`` (N,ch,H,W), ``box`` (4,) or (N,4): y0, y1, x0, x1."""
    return torch.where(in_box(input, box), input[index], input)


def in_box(input: Tensor, box: Tensor) -> Tensor:
    """Return the mask of the pixels of images (N,ch,H,W) in a box: (H,W), or (N,1,H,W) with a box for each image."""
    y0, y1, x0, x1 = box[..., None, None].unbind(-3) if box.dim() == 1 else box[:, :, None, None, None].unbind(1)
    y, x = (torch.arange(size, device=input.device) for size in input.shape[-2:])
    return (y[:, None] >= y0) & (y[:, None] < y1) & (x >= x0) & (x < x1)


def patch_conv(
    input: Tensor,
    weight: Tensor,
    activation: Activation | Polynomial,
    *,
    index: Tensor | None = None,
    lam: float | Tensor | None = None,
    readout: Tensor | None = None,
) -> Tensor:
    """Compute the logits of the 2-layer patch-wise network: mix, convolve, activate, sum over patches and filters::

        z_n = lam_n x_n + (1 - lam_n) x_{index_n}
        g[n,c] = sum_{p,m} readout[c,m] phi(<w[c,m], z[n,p]>)

    ``input`` is (N,P,D) or (R,N,P,D), ``weight`` (C,M,D) or (R,C,M,D), ``readout`` (C,M) or (R,C,M), None for ones. The
    result is (N,C) or (R,N,C).
    """
    if index is not None:
        assert lam is not None
        input = mixup(input, index, lam, dim=-3)
    s = torch.einsum("...npd,...cmd->...npcm", input, weight)
    sums = activation(s).sum(dim=-3)
    return sums.sum(-1) if readout is None else (sums * readout[..., None, :, :]).sum(-1)


def pairwise_mixup_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    activation: Activation | Polynomial,
    *,
    lam: float | Sequence[float] = 0.5,
    lam_weight: Sequence[float] | None = None,
    label_lam: float | Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    pairs: str = "all",
    readout: Tensor | None = None,
    partner: Tensor | None = None,
    partner_target: Tensor | None = None,
) -> Tensor:
    """Compute the mean cross-entropy of all N^2 ordered pairs of samples, each mixed and convolved by itself::

        L = sum_k lam_weight_k mean_{i,j} [l_k CE(g(z_ij), y_i) + (1 - l_k) CE(g(z_ij), y_j)],  l = label_lam, or lam
        z_ij = lam_k x_i + (1 - lam_k) x_j

    ``input`` is (N,P,D) or (R,N,P,D), ``weight`` (C,M,D) or (R,C,M,D), ``target`` (N,) or (R,N). The result is () or
    (R,). With ``partner`` and ``partner_target`` the second sample of a pair is one of the partners. ``pairs`` selects
    the pairs of the mean: "all", "distinct" (i != j) or "different_class" (y_i != y_j). The mean over no pairs is 0.
    """
    other, other_target = (input, target) if partner is None or partner_target is None else (partner, partner_target)
    rows, columns = (torch.arange(t.shape[-3], device=t.device) for t in (input, other))
    i, j = torch.cartesian_prod(rows, columns).unbind(1)
    first, second = target[..., i], other_target[..., j]
    counts = {"all": first == first, "distinct": (i != j).expand_as(first), "different_class": first != second}[pairs]
    loss = torch.zeros((), dtype=input.dtype, device=input.device)
    nodes = lam if isinstance(lam, Sequence) else [lam]
    labels = nodes if label_lam is None else label_lam if isinstance(label_lam, Sequence) else [label_lam] * len(nodes)
    for node, node_weight, label in zip(nodes, lam_weight or [1.0], labels, strict=True):
        mixed = node * input[..., i, :, :] + (1 - node) * other[..., j, :, :]
        log_p = patch_conv(mixed, weight, activation, readout=readout).log_softmax(-1)
        of_first, of_second = (
            torch.take_along_dim(log_p, y[..., None].expand(*log_p.shape[:-1], 1), -1).squeeze(-1)
            for y in (first, second)
        )
        ce = -(1 - label_smoothing) * (label * of_first + (1 - label) * of_second) - label_smoothing * log_p.mean(-1)
        loss = loss + node_weight * ce.where(counts, 0).sum(-1) / counts.sum(-1).clamp(min=1)
    return loss


def gradient_descent(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    activation: Activation | Polynomial,
    *,
    lam: float | Sequence[float] | None = 0.5,
    lam_weight: Sequence[float] | None = None,
    lr: float | Tensor,
    steps: int,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    label_smoothing: float = 0.0,
    readout: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Descend on :func:`pairwise_mixup_loss`, or, with ``lam=None``, on the mean cross-entropy, over the full batch::

        v = momentum v + dL/dw + weight_decay w;  w = w - lr v

    ``input`` is (N,P,D) or (R,N,P,D), ``weight`` (C,M,D) or (R,C,M,D), ``target`` (N,) or (R,N). ``lr`` is a number or
    broadcasts with (R,steps). Return the weight, with runs if input or weight has them, and the loss before each step,
    (steps,) or (R,steps). ``options`` are passed to the loss.
    """
    runs = input.shape[:-3] or weight.shape[:-3]
    weight = weight.expand(*runs, *weight.shape[-3:]).clone()
    rates = torch.as_tensor(lr, dtype=weight.dtype, device=weight.device).expand(*runs, steps)
    velocity = torch.zeros_like(weight)
    losses = weight.new_zeros(*runs, steps)
    for step in range(steps):
        w = weight.detach().requires_grad_()
        with torch.enable_grad():
            if lam is None:
                log_p = patch_conv(input, w, activation, readout=readout).log_softmax(-1)
                own = torch.take_along_dim(log_p, target[..., None].expand(*log_p.shape[:-1], 1), -1)
                loss = -((1 - label_smoothing) * own + label_smoothing * log_p.mean(-1, keepdim=True)).mean((-2, -1))
            else:
                loss = pairwise_mixup_loss(
                    input, w, target, activation, lam=lam, lam_weight=lam_weight, label_smoothing=label_smoothing,
                    readout=readout, **options,
                )  # fmt: skip
            (grad,) = torch.autograd.grad(loss.sum(), w)  # no run influences another
        velocity = momentum * velocity + grad + weight_decay * weight
        weight = weight - rates[..., step, None, None, None] * velocity
        losses[..., step] = loss.detach()
    return weight, losses


def mixup_cross_entropy(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: float | Tensor,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute ``lam CE(input, target_a) + (1 - lam) CE(input, target_b)``; a mean is over targets not ignored.

    Each target that is not ignored adds ``lse_square_scale logsumexp(input_n)^2`` to its cross-entropy. ``input`` is
    (N,C), targets are (N,), ``lam`` is a float, () or (N,), ``weight`` (C,). The result is () or, without reduction,
    (N,); ``return_lse`` also returns the logsumexp (N,).
    """
    loss = torch.zeros((), dtype=input.dtype, device=input.device)
    lse = input.logsumexp(1) if lse_square_scale or return_lse else loss
    for target, share in ((target_a, lam), (target_b, 1 - lam)):
        rows = share * F.cross_entropy(
            input, target, weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
        )
        loss = loss + (rows if reduction == "none" else rows.sum() / _count(target, weight, ignore_index, reduction))
        if lse_square_scale:
            rows = (share * lse_square_scale * lse.square()).where(target != ignore_index, 0)
            loss = loss + (rows if reduction == "none" else rows.sum() / _count(target, None, ignore_index, reduction))
    return (loss, lse) if return_lse else loss


def _count(target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str) -> Tensor | int:
    if reduction != "mean":
        return 1
    counts = target != ignore_index
    return counts.sum() if weight is None else weight[target.where(counts, 0)].where(counts, 0).sum()


def mixup_binary_cross_entropy(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: float | Tensor,
    *,
    label_smoothing: float = 0.0,
    threshold: float | None = None,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute the sigmoid cross-entropy to the mixed labels, smoothed and, with a threshold, made 0 or 1.

    ``input`` is (N,C), targets are (N,), ``lam`` is a float, () or (N,), ``pos_weight`` (C,). The result is () or,
    without reduction, (N,C).
    """
    dtype = torch.promote_types(input.dtype, torch.float32)
    q = mixed_labels(target_a, target_b, lam, input.shape[1], label_smoothing, threshold, dtype).to(input.dtype)
    weight = None if pos_weight is None else pos_weight.to(input.dtype)
    return F.binary_cross_entropy_with_logits(input, q, pos_weight=weight, reduction=reduction)


def mixed_labels(
    target_a: Tensor, target_b: Tensor, lam: float | Tensor, num_classes: int, label_smoothing: float,
    threshold: float | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Compute ``(1 - eps) (lam [c = a] + (1 - lam) [c = b]) + eps / C``, (N,C), or if it exceeds the threshold."""
    share = lam[:, None] if isinstance(lam, Tensor) and lam.dim() else lam
    classes = torch.arange(num_classes, device=target_a.device)
    one_hot_a, one_hot_b = ((target[:, None] == classes).to(dtype) for target in (target_a, target_b))
    q = share * one_hot_a + (1 - share) * one_hot_b
    q = (1 - label_smoothing) * q + label_smoothing / num_classes
    return q if threshold is None else (q > threshold).to(q.dtype)


def soft_target_cross_entropy(
    input: Tensor, target: Tensor, *, label_smoothing: float = 0.0, reduction: str = "mean"
) -> Tensor:
    """Compute ``- sum_c t_nc log softmax(input_n)_c``, t the smoothed target; ``input`` and ``target`` (N,C)."""
    return F.cross_entropy(input, target, label_smoothing=label_smoothing, reduction=reduction)
