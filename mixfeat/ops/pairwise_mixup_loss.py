"""``torch.ops.mixfeat.pairwise_mixup_loss``: cross-entropy of all mixed pairs of samples, from their pre-activations.

It takes a block of row samples and a block of column samples, or with ``column`` None the rows as both, which halves
the work where pairs are symmetric; so rows and columns can be parts of a larger problem of ``num_pairs`` pairs. The
loss's upstream gradient is a number per run: forward yields the gradients with the loss, backward scales them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixfeat import backends, reference
from mixfeat.activations import Polynomial

__all__ = ["check_nodes", "pairwise_mixup_loss"]

torch.library.define(
    "mixfeat::pairwise_mixup_loss",
    "(Tensor row, Tensor? column, Tensor row_target, Tensor? column_target, Tensor lam, Tensor lam_weight, "
    "SymInt num_pairs, float[] polynomial, bool need_grad) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_op = torch.ops.mixfeat.pairwise_mixup_loss.default


def pairwise_mixup_loss(
    row: Tensor,
    column: Tensor | None,
    row_target: Tensor,
    column_target: Tensor | None,
    lam: Tensor,
    lam_weight: Tensor,
    num_pairs: int,
    polynomial: Polynomial,
) -> Tensor:
    """The loss (R,) of row samples mixed with column samples, differentiable with respect to both::

        loss = sum_k lam_weight_k sum_{i,j} [lam_k CE(g_ij, y_i) + (1 - lam_k) CE(g_ij, y_j)] / num_pairs
        g_ijc = sum_{p,m} phi(lam_k row_ipcm + (1 - lam_k) column_jpcm)

    Args:
        row, column: pre-activations (R,N,P,C,M) and (R,N',P,C,M), any strides; ``column`` None for row itself.
        row_target, column_target: (N,) or (R,N), and likewise of the columns, int64.
        lam, lam_weight: (K,) on the CPU: nodes in [0, 1], and weights that sum to 1.
        num_pairs: what the sum is divided by.
        polynomial: phi.
    """
    return _op(row, column, row_target, column_target, lam, lam_weight, num_pairs, polynomial, False)[0]


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _forward(
    row: Tensor,
    column: Tensor | None,
    row_target: Tensor,
    column_target: Tensor | None,
    lam: Tensor,
    lam_weight: Tensor,
    num_pairs: int,
    fields: Sequence[float],
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    name = backends.serving(row.device.type, row.dtype)
    nodes, weights = _nodes(lam, lam_weight, symmetric=column is None)
    weights = [weight / max(num_pairs, 1) for weight in weights]
    _check_target(row_target, row.shape[3])
    if column_target is not None:
        _check_target(column_target, row.shape[3])
    polynomial = Polynomial.of(fields)
    dtype = _accumulation(row.dtype)
    grads = [
        torch.empty_like(side, dtype=dtype) if side is not None and need_grad else row.new_empty(0, dtype=dtype)
        for side in (row, column)
    ]
    if name == "cpu":
        loss = torch.ops.mixfeat_cpu.pairwise_mixup_loss.default(
            row.to(dtype),
            None if column is None else column.to(dtype),
            row_target.contiguous(),
            None if column_target is None else column_target.contiguous(),
            nodes,
            weights,
            *polynomial,
            grads[0] if need_grad else None,
            grads[1] if need_grad and column is not None else None,
        )
        return loss, grads[0], grads[1]
    if name == "triton":
        from mixfeat.kernels.triton.pairwise_mixup_loss import pairwise_mixup_loss as launch
    else:
        launch = reference.pairwise_mixup_block
    loss, *results = launch(row, column, row_target, column_target, nodes, weights, polynomial, need_grad)
    for grad, result in zip(grads, results, strict=True):
        if result is not None:
            grad.copy_(result)
    return loss, grads[0], grads[1]


def _nodes(lam: Tensor, lam_weight: Tensor, symmetric: bool) -> tuple[list[float], list[float]]:
    """Nodes and weights as numbers. Where (i, j) and (j, i) are both visited, lam and 1 - lam are one node."""
    check_nodes(lam, lam_weight)
    nodes, weights = lam.tolist(), lam_weight.tolist()
    exactness = _exactness(lam)
    merged: dict[float, float] = {}
    for node, weight in zip(nodes, weights, strict=True):
        near = (other for other in merged if symmetric and abs(other + node - 1) <= exactness)
        node = next(near, node)
        merged[node] = merged.get(node, 0.0) + weight
    return list(merged), list(merged.values())


def check_nodes(lam: Tensor, lam_weight: Tensor) -> None:
    """Refuse nodes outside [0, 1] and weights that do not sum to 1 as exactly as their dtype lets them."""
    nodes, weights = lam.tolist(), lam_weight.tolist()
    if not all(0 <= node <= 1 for node in nodes):
        raise ValueError(f"lam must be in [0, 1], got {nodes}")
    if not abs(sum(weights) - 1) <= _exactness(lam_weight) * len(weights):
        raise ValueError(f"lam_weight must sum to 1, got {weights}, which sum to {sum(weights)}")


def _exactness(values: Tensor) -> float:
    return 4 * torch.finfo(values.dtype).eps


def _check_target(target: Tensor, num_classes: int) -> None:
    """Refuse a target out of range where it can be read without waiting; elsewhere it gives NaN."""
    if target.device.type == "cpu" and target.numel():
        low, high = (int(bound) for bound in target.aminmax())
        if low < 0 or high >= num_classes:
            raise IndexError(f"target must lie in [0, {num_classes}), got {low if low < 0 else high}")


class _PairwiseMixupLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, row: Tensor, column: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            loss, row_grad, column_grad = _op(row, column, *rest[:-1], True)
        ctx.save_for_backward(row_grad, column_grad)
        ctx.dtype = row.dtype
        ctx.mark_non_differentiable(row_grad, column_grad)
        return loss, row_grad, column_grad

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad[:, None, None, None, None]
        sides = (
            (scale * saved).to(ctx.dtype) if need else None
            for saved, need in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        )
        return *sides, *[None] * 7


def _autograd(row: Tensor, column: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    if torch.is_grad_enabled() and (row.requires_grad or (column is not None and column.requires_grad)):
        return _PairwiseMixupLoss.apply(row, column, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(row, column, *rest)


torch.library.impl("mixfeat::pairwise_mixup_loss", "Autograd", _autograd)
torch.library.impl("mixfeat::pairwise_mixup_loss", "CompositeExplicitAutograd", _forward)


@torch.library.register_fake("mixfeat::pairwise_mixup_loss")
def _(row: Tensor, column: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _accumulation(row.dtype)
    row_grad, column_grad = (
        torch.empty_like(side, dtype=dtype) if side is not None and rest[-1] else row.new_empty(0, dtype=dtype)
        for side in (row, column)
    )
    return row.new_empty(row.shape[:1], dtype=dtype), row_grad, column_grad
