"""``torch.ops.mixfeat.pairwise_mixup_loss``: cross-entropy of all mixed pairs of samples, with its gradients.

Samples are convolved once, by plain matrix products; kernels take it from there. They see a block of row samples and a
block of column samples, so that both can be parts of a larger problem. The loss's upstream gradient is one number per
run: forward yields the gradients with the loss, backward scales them. Of samples that are spread over a process group,
every rank holds a block (:mod:`mixfeat.ops.sharding`).
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixfeat import _checks, backends
from mixfeat.kernels.polynomial import Polynomial
from mixfeat.ops import fallback, sharding
from mixfeat.ops.registration import Operator

__all__ = ["pairwise_mixup_block", "pairwise_mixup_loss"]


def pairwise_mixup_loss(
    input: Tensor, weight: Tensor, target: Tensor, lam: Tensor, lam_weight: Tensor, polynomial: Polynomial, group: str
) -> Tensor:
    """Return the loss (R,), with R = 1 where neither input nor weight has runs.

    Nodes and their weights (K,), on the CPU; the name of the process group whose samples are all meant, "" for none.
    """
    return _pairwise_mixup_loss(input, weight, target, lam, lam_weight, polynomial, group, False, False)


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
    """The loss (R,) of row samples mixed with column samples, and its gradients, from pre-activations::

        loss  = sum_k lam_weight_k sum_{i,j} [lam_k CE(g_ij, y_i) + (1 - lam_k) CE(g_ij, y_j)]
        g_ijc = sum_{p,m} phi(lam_k row_ipcm + (1 - lam_k) column_jpcm)

    Args:
        row, column: (R,N,P,C,M) and (R,N',P,C,M), any strides; ``column`` None for row itself, all ordered pairs of it.
            There lam and 1 - lam should be one node, and lam = 1/2 costs half.
        row_target, column_target: (N,) or (R,N), and likewise of the columns, int64.
        lam, lam_weight: the nodes and their weights, of any sum.
        polynomial: phi.
        need_grad: whether gradients are wanted.

    Returns:
        the loss, and its gradients with respect to row and column, None where there are none; float32, float64 for
        float64.
    """
    name = backends.serving(row.device.type, row.dtype)
    arguments = (row, column, row_target, column_target, lam, lam_weight, polynomial, need_grad)
    if name == "triton":
        from mixfeat.kernels.triton.pairwise_mixup_loss import pairwise_mixup_loss as launch

        return launch(*arguments)
    if name == "reference":
        return fallback.pairwise_mixup_block(*arguments)
    dtype = _checks.accumulation(row.dtype)
    row_grad, column_grad = (
        torch.empty(s.shape, dtype=dtype, device=s.device) if need_grad and s is not None else None
        for s in (row, column)
    )
    loss = torch.ops.mixfeat_cpu.pairwise_mixup_loss.default(
        row.to(dtype),
        None if column is None else column.to(dtype),
        row_target.contiguous(),
        None if column_target is None else column_target.contiguous(),
        lam,
        lam_weight,
        tuple(polynomial),
        row_grad,
        column_grad,
    )
    return loss, row_grad, column_grad


def merged_nodes(lam: Tensor, lam_weight: Tensor, dtype: torch.dtype) -> dict[float, float]:
    """Weights by node. With pairs (i, j) go pairs (j, i): lam and 1 - lam are one node, where dtype says so."""
    merged: dict[float, float] = {}
    for node, weight in zip(lam.tolist(), lam_weight.tolist(), strict=True):
        mirrored = (other for other in merged if abs(other + node - 1) <= 2 * torch.finfo(dtype).eps)
        node = next(mirrored, node)
        merged[node] = merged.get(node, 0.0) + weight
    return merged


def count_runs(input: Tensor, weight: Tensor) -> int:
    return input.shape[0] if input.dim() == 4 else weight.shape[0] if weight.dim() == 4 else 1


def _forward(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    lam: Tensor,
    lam_weight: Tensor,
    fields: Sequence[float],
    group: str,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    device = input.device.type
    *_, num_samples, num_patches, patch_dim = input.shape
    num_classes, filters = weight.shape[-3:-1]
    num_runs, dtype = count_runs(input, weight), _checks.accumulation(input.dtype)
    need_grad = need_input or need_weight
    sizes: tuple[int, ...] = (num_samples,)
    if group:
        settings = {
            "dtype": input.dtype, "device": device, "num_runs": num_runs, "target.dim()": target.dim(),
            "num_patches": num_patches, "patch_dim": patch_dim, "num_classes": num_classes,
            "filters_per_class": filters, "activation": Polynomial.of(fields), "lam": lam.tolist(),
            "lam_weight": lam_weight.tolist(), "whether gradients are wanted": need_grad,
        }  # fmt: skip
        sizes = sharding.agree(
            group, num_samples, settings, lambda: _check_values(target, num_classes, lam, lam_weight)
        )
    else:
        _check_values(target, num_classes, lam, lam_weight)
    x, w = input.flatten(-3, -2), weight.flatten(-3, -2)  # (..., N*P, D), (..., C*M, D)
    if backends.serving(device, input.dtype) != "triton":
        x, w = x.to(dtype), w.to(dtype)
    with torch.autocast(device, enabled=False) if _checks.autocast_is_enabled(device) else contextlib.nullcontext():
        s = (x @ w.mT).view(num_runs, num_samples, num_patches, num_classes, filters)
        nodes, polynomial = merged_nodes(lam, lam_weight, dtype), Polynomial.of(fields)
        if group:
            block = functools.partial(pairwise_mixup_block, polynomial=polynomial, need_grad=need_grad)
            loss, grad = sharding.all_pairs(block, s, target, nodes, sizes, group)
        else:
            weights = [value / max(1, num_samples**2) for value in nodes.values()]
            loss, grad, _ = pairwise_mixup_block(s, None, target, None, list(nodes), weights, polynomial, need_grad)
        del s
        input_grad, weight_grad = loss.new_empty(0), loss.new_empty(0)
        if grad is not None:
            grad = grad.reshape(num_runs, num_samples * num_patches, w.shape[-2])
            if need_weight:
                weight_grad = (grad.mT @ x.to(dtype)).view(num_runs, *weight.shape[-3:])
            if need_input:
                input_grad = (grad @ w.to(dtype)).view(num_runs, *input.shape[-3:])
    return loss, input_grad, weight_grad


def _check_values(target: Tensor, num_classes: int, lam: Tensor, lam_weight: Tensor) -> None:
    _checks.node_values(lam, lam_weight)
    _checks.class_values(target, num_classes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:5])
    ctx.fields, ctx.group = inputs[5:7]


def _backward(ctx: Any, grad: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    factor = grad[:, None, None, None]
    grads: list[Tensor | None] = []
    for saved, tensor, need in zip(ctx.saved_tensors[:2], ctx.saved_tensors[2:4], needs, strict=True):
        shape = tensor.shape if tensor.dim() == 4 else (1, *tensor.shape)  # what all runs share gets the sum over them
        grads.append((factor * saved).sum_to_size(shape).view(tensor.shape).to(tensor.dtype) if need else None)
    return grads


def _recorded_backward(ctx: Any, grad: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    _forbid_group(ctx.group, "differentiated twice")
    _, _, input, weight, target, lam, lam_weight = ctx.saved_tensors
    loss = _plain(input, weight, target, lam, lam_weight, ctx.fields, linear_memory=True)
    wanted = [tensor for tensor, need in zip((input, weight), needs, strict=True) if need]
    found = iter(torch.autograd.grad(loss, wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needs]


def _definition(
    input: Tensor, weight: Tensor, target: Tensor, lam: Tensor, lam_weight: Tensor, fields: Sequence[float],
    group: str, *needs: bool,
) -> Tensor:  # fmt: skip
    _forbid_group(group, "transformed by torch.func or differentiated forward")
    return _plain(input, weight, target, lam, lam_weight, fields, linear_memory=False)


def _plain(
    input: Tensor, weight: Tensor, target: Tensor, lam: Tensor, lam_weight: Tensor, fields: Sequence[float],
    *, linear_memory: bool,
) -> Tensor:  # fmt: skip
    nodes = merged_nodes(lam, lam_weight, _checks.accumulation(input.dtype))
    return fallback.pairwise_mixup_loss(
        input, weight, target, list(nodes), list(nodes.values()), Polynomial.of(fields), linear_memory=linear_memory
    )


def _forbid_group(group: str, what: str) -> None:
    if group:
        raise NotImplementedError(f"pairwise_mixup_loss with a group cannot be {what}")


def _fake(input: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_input, need_weight = rest
    num_runs = count_runs(input, weight)
    loss = input.new_empty(num_runs, dtype=_checks.accumulation(input.dtype))
    input_grad, weight_grad = (
        loss.new_empty((num_runs, *t.shape[-3:]) if need else (0,))
        for t, need in ((input, need_input), (weight, need_weight))
    )
    return loss, input_grad, weight_grad


def _flops(input: Tensor, weight: Tensor, *rest: Any) -> int:
    """Operations of the products of all patches with all filters, of pre-activations and of wanted gradients.

    The sums over pairs are no matrix products.
    """
    patches = input.shape[-3] * input.shape[-2]
    filters = weight.shape[-3] * weight.shape[-2]
    return 2 * (1 + sum(rest[-2:])) * count_runs(input, weight) * patches * input.shape[-1] * filters


_pairwise_mixup_loss = Operator(
    "pairwise_mixup_loss(Tensor input, Tensor weight, Tensor target, Tensor lam, Tensor lam_weight, "
    "float[] polynomial, str group, bool need_input, bool need_weight) -> (Tensor, Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    differentiable=("input", "weight"),
    request=lambda args: (*args[:-2], args[0].requires_grad, args[1].requires_grad),
    setup_context=_setup_context,
    backward=_backward,
    recorded_backward=_recorded_backward,
    definition=_definition,
    flops=_flops,
)
