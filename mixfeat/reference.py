"""The operators in plain PyTorch: the definition that every kernel is held to, for any dtype and device.

Differentiable by autograd, readable as the formulas they stand for, and without any check of their arguments: those are
``mixfeat.functional``'s.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mixfeat.activations import Activation
from mixfeat.kernels.polynomial import Polynomial

__all__ = [
    "cross_entropy_rows", "gradient_descent", "mixup", "mixup_backward", "mixup_cross_entropy", "pairwise_mixup_block",
    "pairwise_mixup_loss", "patch_conv", "patch_conv_backward", "soft_target_cross_entropy",
]  # fmt: skip


def mixup(
    input: Tensor, index: Tensor, lam: float | Tensor, dim: int = 0, *, dtype: torch.dtype | None = None
) -> Tensor:
    """``lam_n x_n + (1 - lam_n) x_{index_n}``, samples n along ``dim``; ``lam`` a float, () or (N,).

    A tensor ``lam`` is not rounded to a half-precision input's dtype; the mixed samples are, or to ``dtype``.
    """
    if isinstance(lam, Tensor):
        lam = lam.view(-1, *[1] * (input.dim() - dim % input.dim() - 1))
    return (lam * input + (1 - lam) * input.index_select(dim, index)).to(dtype or input.dtype)


def mixup_backward(grad: Tensor, index: Tensor, lam: Tensor) -> Tensor:
    """Gradient of :func:`mixup` to input: ``dL/dx_i = lam_i grad_i + sum_{n: index_n = i} (1 - lam_n) grad_n``."""
    lam = lam.view(-1, *[1] * (grad.dim() - 1))
    return (lam * grad).index_add(0, index, (1 - lam) * grad)


def patch_conv(
    input: Tensor,
    weight: Tensor,
    activation: Activation | Polynomial,
    *,
    index: Tensor | None = None,
    lam: float | Tensor | None = None,
) -> Tensor:
    """Logits of the 2-layer patch-wise network: mix, convolve, activate, sum over patches and filters::

        z_n = lam_n x_n + (1 - lam_n) x_{index_n}
        g[n,c] = sum_{p,m} phi(<w[c,m], z[n,p]>)

    ``input`` (N,P,D) or (R,N,P,D), ``weight`` (C,M,D) or (R,C,M,D); result (N,C) or (R,N,C).
    """
    if index is not None:
        assert lam is not None
        input = mixup(input, index, lam, dim=-3)
    s = torch.einsum("...npd,...cmd->...npcm", input, weight)
    return activation(s).sum(dim=(-3, -1))


def patch_conv_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    activation: Polynomial,
    *,
    index: Tensor | None = None,
    lam: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`patch_conv` to input and weight, given ``grad`` = dL/dg, as formulas::

        E[n,p,c,m]  = dL/dg[n,c] phi'(s[n,p,c,m])
        dL/dw[c,m]  = sum_{n,p} E[n,p,c,m] z[n,p]
        dL/dz[n,p]  = sum_{c,m} E[n,p,c,m] w[c,m]
        dL/dx_i     = lam_i dL/dz_i + sum_{n: index_n = i} (1 - lam_n) dL/dz_n

    Returns (gradient to input, gradient to weight).
    """
    z = input if index is None or lam is None else mixup(input, index, lam, dim=-3)
    s = torch.einsum("...npd,...cmd->...npcm", z, weight)
    e = grad[..., :, None, :, None] * activation.slope(s)
    weight_grad = torch.einsum("...npcm,...npd->...cmd", e, z).sum_to_size(weight.shape)
    input_grad = torch.einsum("...npcm,...cmd->...npd", e, weight).sum_to_size(input.shape)
    if index is not None and lam is not None:
        lam = lam.to(input.dtype).view(-1, 1, 1)
        input_grad = (lam * input_grad).index_add(-3, index, (1 - lam) * input_grad)
    return input_grad, weight_grad


def pairwise_mixup_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    activation: Activation | Polynomial,
    *,
    lam: float | Sequence[float] = 0.5,
    lam_weight: Sequence[float] | None = None,
) -> Tensor:
    """Cross-entropy of all N^2 ordered pairs of samples, mixed and each convolved: the definition, as it stands::

        L = sum_k lam_weight_k 1/N^2 sum_{i,j} [lam_k CE(g(z_ij), y_i) + (1 - lam_k) CE(g(z_ij), y_j)]
        z_ij = lam_k x_i + (1 - lam_k) x_j

    ``input`` (N,P,D) or (R,N,P,D), ``weight`` (C,M,D) or (R,C,M,D), ``target`` (N,) or (R,N); result () or (R,).
    """
    num_samples = input.shape[-3]
    i, j = torch.cartesian_prod(*[torch.arange(num_samples, device=input.device)] * 2).unbind(1)
    loss = torch.zeros((), dtype=input.dtype, device=input.device)
    nodes = lam if isinstance(lam, Sequence) else [lam]
    for node, node_weight in zip(nodes, lam_weight or [1.0], strict=True):
        mixed = node * input[..., i, :, :] + (1 - node) * input[..., j, :, :]
        log_p = patch_conv(mixed, weight, activation).log_softmax(-1)
        first, second = (
            torch.take_along_dim(log_p, target[..., k, None].expand(*log_p.shape[:-1], 1), -1) for k in (i, j)
        )
        loss = loss - node_weight * (node * first + (1 - node) * second).squeeze(-1).mean(-1)
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
) -> tuple[Tensor, Tensor]:
    """Full-batch gradient descent on :func:`pairwise_mixup_loss`, or, with ``lam=None``, on the mean cross-entropy::

        v = momentum v + dL/dw + weight_decay w;  w = w - lr v

    ``input`` (N,P,D) or (R,N,P,D), ``weight`` (C,M,D) or (R,C,M,D), ``target`` (N,) or (R,N); ``lr`` a number, or of
    a shape that broadcasts with (R,steps). Returns the weight, with runs if input or weight has them, and the loss
    before each step, (steps,) or (R,steps).
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
                log_p = patch_conv(input, w, activation).log_softmax(-1)
                loss = -torch.take_along_dim(log_p, target[..., None].expand(*log_p.shape[:-1], 1), -1).mean((-2, -1))
            else:
                loss = pairwise_mixup_loss(input, w, target, activation, lam=lam, lam_weight=lam_weight)
            (grad,) = torch.autograd.grad(loss.sum(), w)  # the sum: no run influences another
        velocity = momentum * velocity + grad + weight_decay * weight
        weight = weight - rates[..., step, None, None, None] * velocity
        losses[..., step] = loss.detach()
    return weight, losses


def pairwise_mixup_block(
    row: Tensor,
    column: Tensor | None,
    row_target: Tensor,
    column_target: Tensor | None,
    lam: Sequence[float],
    lam_weight: Sequence[float],
    activation: Polynomial,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sum over pairs of a row sample and a column sample, and its gradients, from pre-activations, as formulas::

        t_ijpcm = lam row_ipcm + (1 - lam) column_jpcm;  g_ijc = sum_{p,m} phi(t_ijpcm)
        L       = sum_{i,j} lam_weight [lam CE(g_ij, y_i) + (1 - lam) CE(g_ij, y_j)], summed over the nodes lam
        D_ijc   = lam_weight (softmax(g_ij)_c - lam [c = y_i] - (1 - lam) [c = y_j])
        dL/drow_ipcm = lam sum_j D_ijc phi'(t_ijpcm);  dL/dcolumn_jpcm = (1 - lam) sum_i D_ijc phi'(t_ijpcm)

    ``row`` (R,N,P,C,M), ``column`` (R,N',P,C,M) or None for row itself; targets (N,) or (R,N). Returns the loss (R,)
    and both gradients, in float32, or float64 for float64; a few rows at a time, so in memory linear in N and N'. A
    target out of range makes them NaN.
    """
    dtype = torch.float64 if row.dtype == torch.float64 else torch.float32
    num_classes = row.shape[3]

    def prepare(s: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        target = target.expand(s.shape[:2])
        valid = (target >= 0) & (target < num_classes)
        s = s.to(dtype).where(valid[:, :, None, None, None], torch.nan)
        return s, F.one_hot(target.where(valid, 0), num_classes).to(dtype)

    rows, row_label = prepare(row, row_target)
    columns, column_label = (
        (rows, row_label) if column is None or column_target is None else prepare(column, column_target)
    )
    loss = rows.new_zeros(rows.shape[0])
    row_grad = torch.zeros_like(rows)
    column_grad = row_grad if column is None else torch.zeros_like(columns)
    step = max(1, 2**24 // max(1, columns.numel()))
    for node, weight in zip(lam, lam_weight, strict=True):
        for part in torch.arange(rows.shape[1], device=row.device).split(step):
            t = node * rows[:, part, None] + (1 - node) * columns[:, None]
            log_p = activation(t).sum(dim=(3, 5)).log_softmax(-1)
            label = node * row_label[:, part, None] + (1 - node) * column_label[:, None]
            loss -= weight * (label * log_p).sum(dim=(1, 2, 3))
            if need_grad:
                d = weight * (log_p.exp() - label)
                e = d[:, :, :, None, :, None] * activation.slope(t)
                row_grad.index_add_(1, part, node * e.sum(2))
                column_grad += (1 - node) * e.sum(1)
    if not need_grad:
        return loss, None, None
    return loss, row_grad, None if column is None else column_grad


def mixup_cross_entropy(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: float | Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """``lam CE(input, target_a) + (1 - lam) CE(input, target_b)``; a mean is over the targets that are not ignored.

    ``input`` (N,C), targets (N,), ``lam`` a float, () or (N,); result () or, without reduction, (N,).
    """
    loss = torch.zeros((), dtype=input.dtype, device=input.device)
    for target, share in ((target_a, lam), (target_b, 1 - lam)):
        rows = share * F.cross_entropy(
            input, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
        )
        loss = loss + (rows if reduction == "none" else rows.sum() / _count(target, ignore_index, reduction))
    return loss


def _count(target: Tensor, ignore_index: int, reduction: str) -> Tensor | int:
    return (target != ignore_index).sum() if reduction == "mean" else 1


def soft_target_cross_entropy(
    input: Tensor, target: Tensor, *, label_smoothing: float = 0.0, reduction: str = "mean"
) -> Tensor:
    """``- sum_c t_nc log softmax(input_n)_c``, t the smoothed target; ``input`` and ``target`` (N,C)."""
    return F.cross_entropy(input, target, label_smoothing=label_smoothing, reduction=reduction)


def cross_entropy_rows(
    input: Tensor, label: Tensor, need_grad: bool, *, sparse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Loss (N,) of each row, and its gradient to ``input``, given what each class counts for::

        loss_n  = - sum_c label_nc log softmax(x_n)_c
        grad_nc = softmax(x_n)_c sum_k label_nk - label_nc

    ``input`` and ``label`` (N,C). A row whose label is 0 throughout has loss 0 and gradient 0, whatever its logits.
    With ``sparse`` a class whose label is 0 adds nothing to the loss, even where its logit is minus infinity.
    """
    log_p = input.log_softmax(1)
    total = label.sum(1, keepdim=True)
    counts = total != 0
    terms = (label * log_p).where(label != 0, 0) if sparse else label * log_p
    loss = -terms.where(counts, 0).sum(1)
    return loss, (total * log_p.exp() - label).where(counts, 0) if need_grad else None
