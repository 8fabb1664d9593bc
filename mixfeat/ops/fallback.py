"""The operators' forward and backward passes in plain PyTorch, where no kernel serves.

Forward is :mod:`mixfeat.reference`; what autograd would derive from it is written out here, in less memory. A target
or partner out of range, which only a CPU tensor tells without waiting, gives NaN.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mixfeat import reference
from mixfeat._checks import accumulation
from mixfeat.kernels.polynomial import Polynomial

__all__ = [
    "cross_entropy_rows", "mixup", "mixup_backward", "mixup_labels", "pairwise_mixup_block", "patch_conv",
    "patch_conv_backward",
]  # fmt: skip


def _existing(index: Tensor, lam: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Replace partners that do not exist by the first sample, with a weight of NaN."""
    if index.device.type == "cpu":
        return index, lam
    exists = (index >= 0) & (index < samples)
    return index.where(exists, 0), lam.where(exists, torch.nan)


def mixup(input: Tensor, index: Tensor, lam: Tensor, dtype: torch.dtype) -> Tensor:
    """Mix samples (N, ...) in lam's dtype, and round to ``dtype``."""
    index, lam = _existing(index, lam, input.shape[0])
    return reference.mixup(input.to(lam.dtype), index, lam, dtype=dtype)


def mixup_backward(grad: Tensor, index: Tensor, lam: Tensor) -> Tensor:
    """Gradient of :func:`mixup` to input: ``dL/dx_i = lam_i grad_i + sum_{n: index_n = i} (1 - lam_n) grad_n``."""
    index, lam = _existing(index, lam, grad.shape[0])
    return _spread(grad.to(lam.dtype), index, lam, 0).to(grad.dtype)


def _spread(grad: Tensor, index: Tensor, lam: Tensor, dim: int) -> Tensor:
    """Give each sample along ``dim`` its own share of the mixed samples' gradient, and its partner the rest."""
    lam = lam.to(grad.dtype).view(-1, *[1] * (grad.dim() - 1 - dim % grad.dim()))
    return (lam * grad).index_add(dim, index, (1 - lam) * grad)


def patch_conv(
    input: Tensor, weight: Tensor, index: Tensor | None, lam: Tensor | None, polynomial: Polynomial
) -> Tensor:
    """Logits (N,C) or (R,N,C)."""
    if index is not None and lam is not None:
        index, lam = _existing(index, lam, input.shape[-3])
    return reference.patch_conv(input, weight, polynomial, index=index, lam=lam)


def patch_conv_backward(
    grad: Tensor, input: Tensor, weight: Tensor, index: Tensor | None, lam: Tensor | None, polynomial: Polynomial
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`patch_conv` to input and weight, given ``grad`` = dL/dg, all of one dtype::

    E[n,p,c,m]  = dL/dg[n,c] phi'(s[n,p,c,m])
    dL/dw[c,m]  = sum_{n,p} E[n,p,c,m] z[n,p]
    dL/dz[n,p]  = sum_{c,m} E[n,p,c,m] w[c,m]
    dL/dx_i     = lam_i dL/dz_i + sum_{n: index_n = i} (1 - lam_n) dL/dz_n
    """
    z = input
    if index is not None and lam is not None:
        index, lam = _existing(index, lam, input.shape[-3])
        z = reference.mixup(input, index, lam, dim=-3)
    s = torch.einsum("...npd,...cmd->...npcm", z, weight)
    e = grad[..., :, None, :, None] * polynomial.slope(s)
    weight_grad = torch.einsum("...npcm,...npd->...cmd", e, z).sum_to_size(weight.shape)
    input_grad = torch.einsum("...npcm,...cmd->...npd", e, weight).sum_to_size(input.shape)
    if index is not None and lam is not None:
        input_grad = _spread(input_grad, index, lam, -3)
    return input_grad, weight_grad


def pairwise_mixup_block(
    row: Tensor,
    column: Tensor | None,
    row_target: Tensor,
    column_target: Tensor | None,
    lam: Sequence[float],
    lam_weight: Sequence[float],
    polynomial: Polynomial,
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
    dtype = accumulation(row.dtype)
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
            log_p = polynomial(t).sum(dim=(3, 5)).log_softmax(-1)
            label = node * row_label[:, part, None] + (1 - node) * column_label[:, None]
            loss -= weight * (label * log_p).sum(dim=(1, 2, 3))
            if need_grad:
                d = weight * (log_p.exp() - label)
                e = d[:, :, :, None, :, None] * polynomial.slope(t)
                row_grad.index_add_(1, part, node * e.sum(2))
                column_grad += (1 - node) * e.sum(1)
    if not need_grad:
        return loss, None, None
    return loss, row_grad, None if column is None else column_grad


def mixup_labels(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: Tensor,
    label_smoothing: float,
    ignore_index: int,
    total_weight: float | None,
) -> tuple[Tensor, Tensor]:
    """What each class of each row counts for, (N,C), and whether no target counts at all, ().

    ``total_weight`` is what the targets that count make up together; None gives each a weight of 1. A row is NaN where
    a target that counts is out of range.
    """
    num_classes = input.shape[1]
    label = lam.new_zeros(input.shape)
    none = torch.zeros((), dtype=torch.bool, device=input.device)
    for target, weight in ((target_a, lam), (target_b, 1 - lam)):
        counts = target != ignore_index
        if total_weight is not None:
            count = counts.sum()
            weight, none = weight * total_weight / count, none | (count == 0)
        weight = torch.where(counts, weight, 0.0)
        valid = (target >= 0) & (target < num_classes)
        weight = torch.where(valid | (weight == 0), weight, torch.nan)[:, None]
        label += weight * label_smoothing / num_classes
        label.scatter_add_(1, target.where(valid, 0)[:, None], weight * (1 - label_smoothing))
    return label, none


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
