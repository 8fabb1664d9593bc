"""The operators' forward and backward passes in plain PyTorch, where no kernel serves.

Forward is :mod:`mixfeat.reference`. The derivatives are written out here and take less memory than autograd's. Targets
and partners out of range give NaN on other devices than the CPU, where they were refused before.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mixfeat import reference
from mixfeat._checks import accumulation
from mixfeat.kernels.polynomial import Polynomial

__all__ = [
    "cutmix", "cutmix_backward", "mixup", "mixup_backward", "mixup_binary_cross_entropy", "mixup_cross_entropy_rows",
    "pairwise_mixup_block", "pairwise_mixup_loss", "patch_conv", "patch_conv_backward", "patch_conv_double_backward",
    "soft_target_cross_entropy_rows",
]  # fmt: skip


def _existing(index: Tensor, lam: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Replace partners out of range by the first sample, with a weight of NaN."""
    if index.device.type == "cpu":
        return index, lam
    exists = (index >= 0) & (index < samples)
    return index.where(exists, 0), lam.where(exists[:, None] if lam.dim() == 2 else exists, torch.nan)


def mixup(input: Tensor, index: Tensor, lam: Tensor, dtype: torch.dtype) -> Tensor:
    """Mix samples (N, ...) in lam's dtype and round to ``dtype``."""
    index, lam = _existing(index, lam, input.shape[0])
    return reference.mixup(input.to(lam.dtype), index, lam, dtype=dtype)


def mixup_backward(grad: Tensor, index: Tensor, lam: Tensor) -> Tensor:
    """Compute dL/dx of :func:`mixup`: ``dL/dx_i = lam_i grad_i + sum_{n: index_n = i} (1 - lam_n) grad_n``."""
    index, lam = _existing(index, lam, grad.shape[0])
    return _spread(grad.to(lam.dtype), index, lam, 0).to(grad.dtype)


def _spread(grad: Tensor, index: Tensor, lam: Tensor, dim: int) -> Tensor:
    """Distribute the mixed samples' gradient along ``dim``: lam to each sample, 1 - lam to its partner."""
    lam = reference.across(lam.to(grad.dtype), grad, dim)
    return (lam * grad).index_add(dim, index, (1 - lam) * grad)


def cutmix(input: Tensor, index: Tensor, box: Tensor) -> Tensor:
    """Paste boxes into images (N,ch,H,W). A partner out of range gives NaN, or 0 for uint8."""
    if input.device.type == "cpu":
        return reference.cutmix(input, index, box)
    exists = ((index >= 0) & (index < input.shape[0])).view(-1, 1, 1, 1)
    mixed = reference.cutmix(input, index.where(exists.flatten(), 0), box)
    missing = input.new_full((), torch.nan if input.is_floating_point() else 0)
    return mixed.where(exists | ~reference.in_box(input, box), missing)


def cutmix_backward(grad: Tensor, index: Tensor, box: Tensor) -> Tensor:
    """Compute dL/dx of :func:`cutmix`: outside the box ``grad_i``, inside the sum of grad_n over index_n = i."""
    inside = reference.in_box(grad, box)
    exists = (index >= 0) & (index < grad.shape[0])
    pasted = grad.where(inside & exists.view(-1, 1, 1, 1), 0)
    return grad.where(~inside, 0).index_add(0, index.where(exists, 0), pasted)


def patch_conv(
    input: Tensor, weight: Tensor, index: Tensor | None, lam: Tensor | None, polynomial: Polynomial
) -> Tensor:
    """Compute the logits (N,C) or (R,N,C)."""
    if index is not None and lam is not None:
        index, lam = _existing(index, lam, input.shape[-3])
    return reference.patch_conv(input, weight, polynomial, index=index, lam=lam)


def patch_conv_backward(
    grad: Tensor, input: Tensor, weight: Tensor, index: Tensor | None, lam: Tensor | None, polynomial: Polynomial
) -> tuple[Tensor, Tensor]:
    """Compute dL/dx and dL/dw of :func:`patch_conv`, given ``grad`` = dL/dg, all of one dtype::

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


def patch_conv_double_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    index: Tensor | None,
    lam: Tensor | None,
    polynomial: Polynomial,
    input_factor: Tensor | None,
    weight_factor: Tensor | None,
    need_input: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Differentiate :func:`patch_conv_backward`, weighted by two factors, to ``grad``, input and weight::

    A          = <u, dL/dx> + <v, dL/dw>,  u = input_factor, v = weight_factor; None is 0
    r[n,p,c,m] = <u[n,p], w[c,m]> + <z[n,p], v[c,m]>, with u mixed like z
    H[n,p,c,m] = dL/dg[n,c] phi''(s[n,p,c,m]) r[n,p,c,m]
    dA/dG[n,c] = sum_{p,m} phi'(s[n,p,c,m]) r[n,p,c,m]
    dA/dw[c,m] = sum_{n,p} H[n,p,c,m] z[n,p] + E[n,p,c,m] u[n,p]
    dA/dz[n,p] = sum_{c,m} H[n,p,c,m] w[c,m] + E[n,p,c,m] v[c,m]
    """
    z, u, v = input, input_factor, weight_factor
    if index is not None and lam is not None:
        index, lam = _existing(index, lam, input.shape[-3])
        z = reference.mixup(input, index, lam, dim=-3)
        u = None if u is None else reference.mixup(u, index, lam, dim=-3)

    def of_samples(grad: Tensor, z: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        products = [
            torch.einsum("...npd,...cmd->...npcm", x, w) for x, w in ((u, weight), (z, v)) if None not in (x, w)
        ]
        r, s = sum(products[1:], products[0]), torch.einsum("...npd,...cmd->...npcm", z, weight)
        slope, g = polynomial.slope(s), grad[..., :, None, :, None]
        h = g * (polynomial.curvature(s) * r)
        weight_grad = torch.einsum("...npcm,...npd->...cmd", h, z)
        if u is not None:
            weight_grad = weight_grad + torch.einsum("...npcm,...npd->...cmd", g * slope, u)
        z_grad = None
        if need_input:
            z_grad = torch.einsum("...npcm,...cmd->...npd", h, weight)
            if v is not None:
                z_grad = z_grad + torch.einsum("...npcm,...cmd->...npd", g * slope, v)
        return (slope * r).sum((-3, -1)), z_grad, weight_grad.sum_to_size(weight.shape)

    step = num_samples = input.shape[-3]
    if input.device.type == "cpu":  # chunks that fit the cache are faster than one large allocation
        step = 2**16 * num_samples // max(1, grad.numel() * input.shape[-2] * weight.shape[-2])
    step = max(1, step)
    factors = [None] * max(1, num_samples) if u is None else u.split(step, -3)
    parts = [of_samples(*part) for part in zip(grad.split(step, -2), z.split(step, -3), factors, strict=False)]
    grad_grads, z_grads, weight_grads = zip(*parts, strict=True)
    input_grad = None
    if need_input:
        input_grad = torch.cat(z_grads, -3).sum_to_size(input.shape)
        if index is not None and lam is not None:
            input_grad = _spread(input_grad, index, lam, -3)
    return torch.cat(grad_grads, -2), input_grad, torch.stack(weight_grads).sum(0)


def pairwise_mixup_block(
    row: Tensor,
    column: Tensor | None,
    row_target: Tensor,
    column_target: Tensor | None,
    lam: Sequence[float],
    lam_weight: Sequence[float],
    polynomial: Polynomial,
    need_grad: bool,
    label_lam: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    pairs: str = "all",
    readout: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Compute the sum over pairs of row and column samples, and its gradients, from pre-activations::

        t_ijpcm = lam row_ipcm + (1 - lam) column_jpcm;  h_ijcm = sum_p phi(t_ijpcm);  g_ijc = sum_m a_cm h_ijcm
        q_ijc   = (1 - eps) (l [c = y_i] + (1 - l) [c = y_j]) + eps / C,  l = label_lam, or lam
        L       = - sum_{i,j} lam_weight sum_c q_ijc log softmax(g_ij)_c, summed over the nodes lam
        D_ijc   = lam_weight (softmax(g_ij)_c - q_ijc), or 0 for a pair outside ``pairs``
        dL/drow_ipcm = lam sum_j D_ijc a_cm phi'(t_ijpcm);  dL/dcolumn_jpcm = (1 - lam) sum_i D_ijc a_cm phi'(t_ijpcm)
        dL/da_cm     = sum_{i,j} D_ijc h_ijcm

    ``row`` is (R,N,P,C,M), ``column`` (R,N',P,C,M) or None for row itself. Targets are (N,) or (R,N). ``readout`` is a,
    (R or 1,C,M), None for ones. Return the loss (R,) and the gradients, in float32, or float64 for float64. Strips of
    rows keep memory linear in N and N'. A target out of range makes the results NaN.
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
    a = None if readout is None else readout.to(dtype)[:, None, None]  # (R or 1,1,1,C,M)
    loss = rows.new_zeros(rows.shape[0])
    row_grad = torch.zeros_like(rows)
    column_grad = row_grad if column is None else torch.zeros_like(columns)
    readout_grad = None if readout is None else rows.new_zeros(rows.shape[0], *readout.shape[1:])
    step = max(1, 2**24 // max(1, columns.numel()))
    for node, weight, share in zip(lam, lam_weight, lam if label_lam is None else label_lam, strict=True):
        for part in torch.arange(rows.shape[1], device=row.device).split(step):
            t = node * rows[:, part, None] + (1 - node) * columns[:, None]
            h = polynomial(t).sum(dim=3)
            log_p = (h if a is None else a * h).sum(-1).log_softmax(-1)
            label = _mixed(row_label[:, part, None], column_label[:, None], share, label_smoothing)
            counts = _counts(row_label[:, part], column_label, part, pairs)[..., None]
            loss -= weight * (label * log_p).where(counts, 0).sum(dim=(1, 2, 3))
            if need_grad:
                d = (weight * (log_p.exp() - label)).where(counts, 0)
                e = d[:, :, :, None, :, None] * polynomial.slope(t)
                e = e if a is None else a[:, :, :, None] * e
                row_grad.index_add_(1, part, node * e.sum(2))
                column_grad += (1 - node) * e.sum(1)
                if readout_grad is not None:
                    readout_grad += (d[..., None] * h).sum(dim=(1, 2))
    if not need_grad:
        return loss, None, None, None
    return loss, row_grad, None if column is None else column_grad, readout_grad


def _mixed(first: Tensor, second: Tensor, share: float, label_smoothing: float) -> Tensor:
    """Return the labels of pairs, smoothed."""
    label = share * first + (1 - share) * second
    return (1 - label_smoothing) * label + label_smoothing / label.shape[-1] if label_smoothing else label


def _counts(row_label: Tensor, column_label: Tensor, rows: Tensor, pairs: str) -> Tensor:
    """Return the mask (R,n,N') of the pairs that count, rows at these places with all columns; labels are one-hot."""
    if pairs == "different_class":
        return (row_label[:, :, None] * column_label[:, None]).sum(-1) == 0
    shape = (row_label.shape[0], len(rows), column_label.shape[1])
    if pairs == "all":
        return torch.ones(shape, dtype=torch.bool, device=rows.device)
    return (rows[:, None] != torch.arange(shape[2], device=rows.device)).expand(shape)


def pairwise_mixup_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    lam: Sequence[float],
    lam_weight: Sequence[float],
    polynomial: Polynomial,
    label_lam: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    pairs: str = "all",
    readout: Tensor | None = None,
    num_rows: int = 0,
    *,
    linear_memory: bool,
) -> Tensor:
    """Compute the sum (R,) over the pairs that count, divided by the number of all pairs.

    Autograd can differentiate it any number of times. ``num_rows`` > 0 pairs that many first samples with all others.
    With ``linear_memory`` autograd recomputes the activations strip by strip instead of storing those of all pairs.
    """
    dtype, num_samples = accumulation(input.dtype), input.shape[-3]
    s = torch.einsum("...npd,...cmd->...npcm", input.to(dtype), weight.to(dtype))
    s = s if s.dim() == 5 else s[None]
    classes = torch.arange(s.shape[3], device=target.device)
    label = (target[..., None] == classes).to(dtype).expand(s.shape[0], num_samples, -1)
    a = None if readout is None else readout.to(dtype)
    a = a if a is None or a.dim() == 3 else a[None]
    row_end, column_start = (num_rows, num_rows) if num_rows else (num_samples, 0)
    all_rows, row_labels = s[:, :row_end], label[:, :row_end]
    columns, column_label = s[:, column_start:], label[:, column_start:]

    def part_loss(
        rows: Tensor, columns: Tensor, a: Tensor | None, row_label: Tensor, place: Tensor, node: float, share: float,
        factor: float,
    ) -> Tensor:  # fmt: skip
        t = node * rows[:, :, None] + (1 - node) * columns[:, None]
        h = polynomial(t).sum(dim=3)
        log_p = (h if a is None else a[:, None, None] * h).sum(-1).log_softmax(-1)
        shares = _mixed(row_label[:, :, None], column_label[:, None], share, label_smoothing)
        counts = _counts(row_label, column_label, place, pairs)[..., None]
        return -factor * (shares * log_p).where(counts, 0).sum(dim=(1, 2, 3))

    loss = s.new_zeros(s.shape[0])
    step = max(1, 2**24 // max(1, columns.numel()))
    places = torch.arange(row_end, device=s.device)
    for node, node_weight, share in zip(lam, lam_weight, lam if label_lam is None else label_lam, strict=True):
        factor = node_weight / max(1, row_end * columns.shape[1])
        for rows, row_label, place in zip(
            all_rows.split(step, 1), row_labels.split(step, 1), places.split(step), strict=True
        ):
            arguments = (rows, columns, a, row_label, place, node, share, factor)
            part = checkpoint(part_loss, *arguments, use_reentrant=False) if linear_memory else part_loss(*arguments)
            loss = loss + part
    return loss


def mixup_cross_entropy_rows(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: Tensor,
    label_smoothing: float,
    lse_square_scale: float,
    ignore_index: int,
    total_weight: float | None,
    need_grad: bool,
    factor: Tensor | None = None,
    lse_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute loss and logsumexp (N,) of each row and the gradient (N,C) to ``input``, in lam's dtype::

        L_n      = log sum_c exp x_nc
        loss_n   = sum over both targets y of w_n (CE(x_n, y_n) + scale L_n^2),  w = lam or 1 - lam, 0 if y is ignored
        label_nc = sum over both of w_n ((1 - eps) [c = y_n] + eps / C)
        grad_nc  = softmax(x_n)_c (sum_k label_nk + 2 scale L_n sum w_n) - label_nc

    The gradient is that of ``factor_n loss_n + lse_grad_n L_n``; None stands for 1 and 0. ``total_weight`` is the total
    weight of the targets that are not ignored, and the mean over none is NaN; None gives each target weight 1. A target
    out of range makes its row NaN unless it is ignored. A target of weight 0 adds nothing, whatever the logits.
    """
    num_classes = input.shape[1]
    lse = input.logsumexp(1)
    loss, label = lam.new_zeros(input.shape[0]), lam.new_zeros(input.shape)
    row_weight = torch.zeros_like(loss)
    for target, share in ((target_a, lam), (target_b, 1 - lam)):
        counts = target != ignore_index
        exists = (target >= 0) & (target < num_classes)
        weight = share if total_weight is None else share * total_weight / counts.sum()
        weight = torch.where(counts, weight, 0.0)
        weight = torch.where(exists | (weight == 0), weight, torch.nan)
        target = target.where(exists, 0)
        rows = weight * F.cross_entropy(input, target, label_smoothing=label_smoothing, reduction="none")
        if lse_square_scale:
            rows = rows + weight * lse_square_scale * lse.square()
        loss, row_weight = loss + rows.where(weight != 0, 0), row_weight + weight
        if total_weight is not None:
            loss = loss.where(counts.any(), torch.nan)
        label = label + weight[:, None] * label_smoothing / num_classes
        label = label.scatter_add(1, target[:, None], weight[:, None] * (1 - label_smoothing))
    if not need_grad:
        return loss, lse, None
    more: Tensor | None = 2 * lse_square_scale * lse * row_weight if lse_square_scale else None  # of the softmax
    counts = (label != 0).any(1)
    if factor is not None:
        label, more = label * (factor[:, None] if factor.dim() else factor), None if more is None else more * factor
    if lse_grad is not None:
        more = lse_grad if more is None else more.where(counts, 0) + lse_grad
        counts = counts | (lse_grad != 0)
    return loss, lse, _cross_entropy_grad(input, label, counts[:, None], more)


def mixup_binary_cross_entropy(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: Tensor,
    pos_weight: Tensor | None,
    label_smoothing: float,
    threshold: float | None,
) -> tuple[Tensor, Tensor]:
    """Compute the loss (N,C) of each class and its derivative, in lam's dtype::

        w_nc    = 1 + (pos_weight_c - 1) q_nc
        loss_nc = (1 - q_nc) x_nc - w_nc log sigmoid(x_nc);  slope_nc = 1 - q_nc - w_nc sigmoid(-x_nc)

    A target out of range makes its row NaN.
    """
    num_classes = input.shape[1]
    q = reference.mixed_labels(target_a, target_b, lam, num_classes, label_smoothing, threshold, lam.dtype)
    if input.device.type != "cpu":
        exist = (target_a >= 0) & (target_a < num_classes) & (target_b >= 0) & (target_b < num_classes)
        q = q.where(exist[:, None], torch.nan)
    w = torch.ones_like(q) if pos_weight is None else 1 + (pos_weight - 1) * q
    return (1 - q) * input - w * F.logsigmoid(input), 1 - q - w * torch.sigmoid(-input)


def soft_target_cross_entropy_rows(input: Tensor, label: Tensor, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Compute the loss (N,) of each row and its gradient (N,C) to ``input``, given the weight of each class::

    loss_n  = - sum_c label_nc log softmax(x_n)_c
    grad_nc = softmax(x_n)_c sum_k label_nk - label_nc
    """
    loss = -(label * input.log_softmax(1)).sum(1)
    return loss, _cross_entropy_grad(input, label) if need_grad else None


def _cross_entropy_grad(
    input: Tensor, label: Tensor, counts: Tensor | None = None, more: Tensor | None = None
) -> Tensor:
    """Compute the gradient of rows of cross-entropies, 0 in rows that do not count; ``more`` (N,) weights softmax."""
    p = input.softmax(1)
    p = p / p.sum(1, keepdim=True)  # softmax sums long rows less accurately than sum
    total = label.sum(1) if more is None else label.sum(1) + more
    grad = p * total[:, None] - label
    return grad if counts is None else grad.where(counts, 0)
