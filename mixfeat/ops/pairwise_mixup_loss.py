"""``torch.ops.mixfeat.pairwise_mixup_loss``: cross-entropy of all mixed pairs of samples, with its gradients.

Plain matrix products convolve the samples once; kernels take the pre-activations. A kernel sees a block of row samples
and a block of column samples, which may be parts of a larger problem. The loss's upstream gradient is one number per
run, so forward returns the gradients with the loss and backward scales them. With a process group every rank holds a
block of the samples (:mod:`mixfeat.ops.sharding`).
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixfeat import _checks, backends
from mixfeat.kernels.polynomial import Polynomial
from mixfeat.ops import fallback, sharding
from mixfeat.ops.registration import Folded, Operator, fold_runs

__all__ = ["PAIRS", "pairwise_mixup_block", "pairwise_mixup_loss"]


class Objective(NamedTuple):
    """The label of a pair, and the pairs that count.

    Attributes:
        label_lam: the first sample's share of the label at each node; None for the nodes themselves.
        label_smoothing: the share of each label that is spread evenly over all classes.
        pairs: "all", "distinct" or "different_class".
    """

    label_lam: Sequence[float] | None = None
    label_smoothing: float = 0.0
    pairs: str = "all"

    def labels(self, nodes: Sequence[float]) -> list[float]:
        """Return the first sample's share of the label at each node."""
        return list(nodes if self.label_lam is None else self.label_lam)


PAIRS = ("all", "distinct", "different_class")


class Signs(NamedTuple):
    """A readout of one magnitude, +-a, for CPU kernels: filters ordered by sign, and a in the activation's scale.

    Attributes:
        order: (1 or R,C*M) int64, the filters class by class, those of -a first.
        negative_filters: (1 or R,C) int64, how many those are.
        magnitude: a.
    """

    order: Tensor
    negative_filters: Tensor
    magnitude: float

    @classmethod
    def of(cls, readout: Tensor) -> "Signs | None":
        """Return the signs of a readout (C,M) or (R,C,M), None where its magnitudes differ or are 0."""
        readout = readout if readout.dim() == 3 else readout[None]
        least, magnitude = (v.item() for v in readout.abs().aminmax()) if readout.numel() else (0.0, 0.0)
        if least != magnitude or not 0 < magnitude < torch.inf:
            return None
        classes, filters = readout.shape[1:]
        positive = readout > 0
        first = torch.arange(0, classes * filters, filters, device=readout.device)  # of each class
        order = positive.byte().argsort(dim=-1, stable=True) + first[:, None]
        return cls(order.flatten(1), filters - positive.sum(-1), magnitude)

    def ordered(self, weight: Tensor) -> Tensor:
        """Order filters (C*M,D) or (R,C*M,D)."""
        if len(self.order) == 1:
            return weight.index_select(-2, self.order[0])
        return weight.expand(len(self.order), -1, -1).take_along_dim(self.order[..., None], -2)

    def as_given(self, weight: Tensor) -> Tensor:
        """Undo :meth:`ordered` for filters (R,C*M,D)."""
        if len(self.order) == 1:
            return torch.empty_like(weight).index_copy_(-2, self.order[0], weight)
        return torch.empty_like(weight).scatter_(-2, self.order[..., None].expand_as(weight), weight)


def pairwise_mixup_loss(
    input: Tensor,
    weight: Tensor,
    readout: Tensor | None,
    target: Tensor,
    lam: Tensor,
    lam_weight: Tensor,
    label_lam: Tensor | None,
    polynomial: Polynomial,
    label_smoothing: float = 0.0,
    pairs: str = "all",
    num_rows: int = 0,
    group: str = "",
) -> Tensor:
    """Return the loss (R,), with R = 1 if neither input nor weight has runs.

    ``lam``, ``lam_weight`` and ``label_lam`` are (K,) on the CPU. ``num_rows`` > 0 pairs that many first samples with
    all others, instead of all with all. ``group`` is the name of a process group over which samples are sharded, "" for
    none.
    """
    options = (polynomial, label_smoothing, pairs, num_rows, group)
    arguments = (input, weight, readout, target, lam, lam_weight, label_lam)
    return _pairwise_mixup_loss(*arguments, *options, False, False, False)


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
    """Compute the loss (R,) of row samples mixed with column samples, and its gradients, from pre-activations::

        loss  = sum_k lam_weight_k sum_{i,j} [lam_k CE(g_ij, y_i) + (1 - lam_k) CE(g_ij, y_j)]
        g_ijc = sum_{p,m} phi(lam_k row_ipcm + (1 - lam_k) column_jpcm)

    Args:
        row, column: (R,N,P,C,M) and (R,N',P,C,M), any strides; ``column`` None for all ordered pairs of rows. Then lam
            and 1 - lam should be merged into one node, and lam = 1/2 costs half.
        row_target, column_target: int64 classes of the rows, (N,) or (R,N), and likewise of the columns.
        lam, lam_weight: the nodes and their weights, with any sum.
        polynomial: phi.
        need_grad: whether to compute gradients.

    Returns:
        The loss and its gradients to row and column, None if not computed; float32, or float64 for float64.
    """
    arguments = (row, column, row_target, column_target, lam, lam_weight, polynomial, need_grad)
    return _block(*arguments, Objective(), None)[:3]


def _block(
    row: Tensor,
    column: Tensor | None,
    row_target: Tensor,
    column_target: Tensor | None,
    lam: Sequence[float],
    lam_weight: Sequence[float],
    polynomial: Polynomial,
    need_grad: bool,
    objective: Objective,
    readout: Tensor | None,
    negative_filters: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Compute the same for any objective and ``readout`` (R or 1,C,M); also return the gradient to it (R,C,M).

    ``negative_filters`` is for the CPU kernels, as :class:`Signs` has it.
    """
    name = backends.serving_network(row.device.type, row.dtype, polynomial)
    arguments = (row, column, row_target, column_target, lam, lam_weight, polynomial, need_grad)
    if name == "triton":
        from mixfeat.kernels.triton.pairwise_mixup_loss import pairwise_mixup_loss as launch

        return launch(*arguments, *objective, readout, need_grad and readout is not None)
    if name != "cpu":
        return fallback.pairwise_mixup_block(*arguments, *objective, readout)
    dtype = _checks.accumulation(row.dtype)
    row_grad, column_grad = (
        torch.empty(s.shape, dtype=dtype, device=s.device) if need_grad and s is not None else None
        for s in (row, column)
    )
    readout_grad = None
    if readout is not None:
        readout = readout.to(dtype).contiguous()
        readout_grad = readout.new_empty(row.shape[0], *readout.shape[1:]) if need_grad else None

    def of_filters(s: Tensor | None) -> Tensor | None:
        """Make every filter a class of its own if there is a readout."""
        return s if s is None or readout is None else s.flatten(3)[..., None]

    loss = torch.ops.mixfeat_cpu.pairwise_mixup_loss.default(
        of_filters(row.to(dtype)),
        of_filters(None if column is None else column.to(dtype)),
        row_target.contiguous(),
        None if column_target is None else column_target.contiguous(),
        lam,
        lam_weight,
        tuple(polynomial),
        of_filters(row_grad),
        of_filters(column_grad),
        objective.labels(lam),
        objective.label_smoothing,
        PAIRS.index(objective.pairs),
        readout,
        readout_grad,
        True,  # skip what is zero or linear
        negative_filters,
    )
    return loss, row_grad, column_grad, readout_grad


def merged_nodes(lam: Tensor, lam_weight: Tensor, dtype: torch.dtype) -> dict[float, float]:
    """Return weights by node, with lam and 1 - lam merged: the pair (i, j) at lam is (j, i) at 1 - lam."""
    merged: dict[float, float] = {}
    for node, weight in zip(lam.tolist(), lam_weight.tolist(), strict=True):
        mirrored = (other for other in merged if abs(other + node - 1) <= 2 * torch.finfo(dtype).eps)
        node = next(mirrored, node)
        merged[node] = merged.get(node, 0.0) + weight
    return merged


def list_nodes(
    lam: Tensor, lam_weight: Tensor, label_lam: Tensor | None, dtype: torch.dtype, symmetric: bool
) -> tuple[list[float], list[float], list[float] | None]:
    """Return nodes, weights and label shares; mirror images are merged if pairs are symmetric."""
    if label_lam is None and symmetric:
        merged = merged_nodes(lam, lam_weight, dtype)
        return list(merged), list(merged.values()), None
    return lam.tolist(), lam_weight.tolist(), None if label_lam is None else label_lam.tolist()


def _pair_factor(target: Tensor, pairs: str, num_rows: int, num_classes: int) -> Tensor | float:
    """Return the number of all pairs over that of the pairs that count, a number or (1 or R,)."""
    num_samples = target.shape[-1]
    if pairs == "all":
        return 1.0
    if pairs == "distinct":
        return num_samples / (num_samples - 1) if num_samples > 1 else 0.0
    label = torch.atleast_2d(target)[..., None] == torch.arange(num_classes, device=target.device)
    of_rows, of_columns = (label[:, :num_rows], label[:, num_rows:]) if num_rows else (label, label)
    every = of_rows.shape[1] * of_columns.shape[1]
    same = (of_rows.sum(1) * of_columns.sum(1)).sum(-1)
    return torch.where(same < every, every / (every - same).clamp(min=1).double(), 0.0)


def _of_runs(factor: Tensor | float, tensor: Tensor) -> Tensor | float:
    """Return a factor (1 or R,) that broadcasts with a tensor (R, ...), in its dtype."""
    if isinstance(factor, float):
        return factor
    return factor.to(tensor.dtype).view(-1, *[1] * (tensor.dim() - 1))


def count_runs(input: Tensor, weight: Tensor) -> int:
    """Return R, 1 if neither tensor has runs."""
    return input.shape[0] if input.dim() == 4 else weight.shape[0] if weight.dim() == 4 else 1


def _forward(
    input: Tensor,
    weight: Tensor,
    readout: Tensor | None,
    target: Tensor,
    lam: Tensor,
    lam_weight: Tensor,
    label_lam: Tensor | None,
    fields: Sequence[float],
    label_smoothing: float,
    pairs: str,
    num_rows: int,
    group: str,
    need_input: bool,
    need_weight: bool,
    need_readout: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    device, polynomial = input.device.type, Polynomial.of(fields)
    *_, num_samples, num_patches, patch_dim = input.shape
    num_classes, filters = weight.shape[-3:-1]
    num_runs, dtype = count_runs(input, weight), _checks.accumulation(input.dtype)
    need_grad = need_input or need_weight or need_readout
    sizes: tuple[int, ...] = (num_samples,)
    if group:
        settings = {
            "dtype": input.dtype, "device": device, "num_runs": num_runs, "target.dim()": target.dim(),
            "num_patches": num_patches, "patch_dim": patch_dim, "num_classes": num_classes,
            "filters_per_class": filters, "activation": polynomial, "lam": lam.tolist(),
            "lam_weight": lam_weight.tolist(), "whether gradients are wanted": need_grad,
        }  # fmt: skip
        sizes = sharding.agree(
            group, num_samples, settings, lambda: _check_values(target, num_classes, lam, lam_weight)
        )
    else:
        _check_values(target, num_classes, lam, lam_weight)
    name = backends.serving_network(device, input.dtype, polynomial)
    x, w = input.flatten(-3, -2), weight.flatten(-3, -2)  # (..., N*P, D), (..., C*M, D)
    if name != "triton":
        x, w = x.to(dtype), w.to(dtype)
    signs = Signs.of(readout) if readout is not None and not need_readout and name == "cpu" else None
    if signs:
        w, readout = signs.ordered(w), None
        polynomial = polynomial._replace(scale=polynomial.scale * signs.magnitude)
    with torch.autocast(device, enabled=False) if _checks.autocast_is_enabled(device) else contextlib.nullcontext():
        s = (x @ w.mT).view(num_runs, num_samples, num_patches, num_classes, filters)
        readout_grad = None
        if group:
            block = functools.partial(pairwise_mixup_block, polynomial=polynomial, need_grad=need_grad)
            loss, grad = sharding.all_pairs(block, s, target, merged_nodes(lam, lam_weight, dtype), sizes, group)
        else:
            nodes, weights, labels = list_nodes(lam, lam_weight, label_lam, dtype, not num_rows)
            if label_lam is not None:
                _checks.label_lam_values(label_lam)
            count = num_rows * (num_samples - num_rows) if num_rows else num_samples**2
            row, row_target = s, target
            column: Tensor | None = None
            column_target: Tensor | None = None
            if num_rows:
                row, column = s[:, :num_rows], s[:, num_rows:]
                row_target, column_target = target[..., :num_rows], target[..., num_rows:]
            shares = [value / max(1, count) for value in weights]
            second_layer = None if readout is None else readout if readout.dim() == 3 else readout[None]
            loss, grad, column_grad, readout_grad = _block(
                row, column, row_target, column_target, nodes, shares, polynomial, need_grad,
                Objective(labels, label_smoothing, pairs), second_layer, signs and signs.negative_filters,
            )  # fmt: skip
            if grad is not None and column_grad is not None:
                grad = torch.cat([grad, column_grad], 1)
            factor = _pair_factor(target, pairs, num_rows, num_classes)
            if pairs != "all":
                loss = loss * _of_runs(factor, loss)
                grad, readout_grad = (None if g is None else g * _of_runs(factor, g) for g in (grad, readout_grad))
        del s
        input_grad, weight_grad = loss.new_empty(0), loss.new_empty(0)
        if grad is not None:
            grad = grad.reshape(num_runs, num_samples * num_patches, w.shape[-2])
            if need_weight:
                weight_grad = grad.mT @ x.to(dtype)
                weight_grad = signs.as_given(weight_grad) if signs else weight_grad
                weight_grad = weight_grad.view(num_runs, *weight.shape[-3:])
            if need_input:
                input_grad = (grad @ w.to(dtype)).view(num_runs, *input.shape[-3:])
    return (
        loss,
        input_grad,
        weight_grad,
        readout_grad if need_readout and readout_grad is not None else loss.new_empty(0),
    )


def _check_values(target: Tensor, num_classes: int, lam: Tensor, lam_weight: Tensor) -> None:
    _checks.node_values(lam, lam_weight)
    _checks.class_values(target, num_classes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:7])
    ctx.options = inputs[7:12]


def _backward(ctx: Any, grad: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    grads: list[Tensor | None] = []
    for saved, tensor, need in zip(ctx.saved_tensors[:3], ctx.saved_tensors[3:6], needs, strict=True):
        if not need:
            grads.append(None)
            continue
        factor = grad.view(-1, *[1] * (saved.dim() - 1))
        shape = tensor.shape if tensor.dim() == saved.dim() else (1, *tensor.shape)  # sum over runs that share it
        grads.append((factor * saved).sum_to_size(shape).view(tensor.shape).to(tensor.dtype))
    return grads


def _recorded_backward(ctx: Any, grad: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    inputs, group = ctx.saved_tensors[3:], ctx.options[-1]
    _forbid_group(group, "differentiated twice")
    loss = _plain(*inputs, *ctx.options[:-1], linear_memory=True)
    wanted = [tensor for tensor, need in zip(inputs[:3], needs, strict=True) if need]
    found = iter(torch.autograd.grad(loss, wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needs]


_TRANSFORMED = "transformed by torch.func or differentiated forward"


def _definition(*args: Any) -> Tensor:
    *inputs, group, _, _, _ = args
    _forbid_group(group, _TRANSFORMED)
    return _plain(*inputs, linear_memory=False)


def _fold(size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> Folded:
    """Turn batches of inputs, weights, readouts and targets into runs."""
    _forbid_group(args[11], _TRANSFORMED)
    arguments, runs = fold_runs(size, in_dims, args, {0: 3, 1: 3, 2: 2, 3: 1})
    if arguments[0].dim() == arguments[1].dim() == 3:  # readouts or targets are batched
        arguments[1] = arguments[1].expand(size, -1, -1, -1)
    return arguments, lambda loss: loss.view(size, 1 if runs is None else runs)


def _plain(
    input: Tensor, weight: Tensor, readout: Tensor | None, target: Tensor, lam: Tensor, lam_weight: Tensor,
    label_lam: Tensor | None, fields: Sequence[float], label_smoothing: float, pairs: str, num_rows: int,
    *, linear_memory: bool,
) -> Tensor:  # fmt: skip
    nodes, weights, labels = list_nodes(lam, lam_weight, label_lam, _checks.accumulation(input.dtype), not num_rows)
    factor = _pair_factor(target, pairs, num_rows, weight.shape[-3])
    loss = fallback.pairwise_mixup_loss(
        input, weight, target, nodes, weights, Polynomial.of(fields), labels, label_smoothing, pairs, readout, num_rows,
        linear_memory=linear_memory,
    )  # fmt: skip
    return loss * _of_runs(factor, loss)


def _forbid_group(group: str, what: str) -> None:
    if group:
        raise NotImplementedError(f"pairwise_mixup_loss with a group cannot be {what}")


def _fake(input: Tensor, weight: Tensor, readout: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = rest[-3:]
    num_runs = count_runs(input, weight)
    loss = input.new_empty(num_runs, dtype=_checks.accumulation(input.dtype))
    sizes = (input.shape[-3:], weight.shape[-3:], () if readout is None else readout.shape[-2:])
    grads = (loss.new_empty((num_runs, *size) if need else (0,)) for size, need in zip(sizes, needs, strict=True))
    input_grad, weight_grad, readout_grad = grads
    return loss, input_grad, weight_grad, readout_grad


def _flops(input: Tensor, weight: Tensor, *rest: Any) -> int:
    """Count the operations of the products of all patches with all filters, for pre-activations and gradients.

    The sums over pairs are not matrix products, and so are not counted.
    """
    patches = input.shape[-3] * input.shape[-2]
    filters = weight.shape[-3] * weight.shape[-2]
    return 2 * (1 + sum(rest[-3:-1])) * count_runs(input, weight) * patches * input.shape[-1] * filters


_pairwise_mixup_loss = Operator(
    "pairwise_mixup_loss(Tensor input, Tensor weight, Tensor? readout, Tensor target, Tensor lam, Tensor lam_weight, "
    "Tensor? label_lam, float[] polynomial, float label_smoothing, str pairs, SymInt num_rows, str group, "
    "bool need_input, bool need_weight, bool need_readout) -> (Tensor, Tensor, Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    differentiable=("input", "weight", "readout"),
    request=lambda args: (*args[:-3], *(t is not None and t.requires_grad for t in args[:3])),
    setup_context=_setup_context,
    backward=_backward,
    recorded_backward=_recorded_backward,
    definition=_definition,
    foldable=("input", "weight", "readout", "target"),
    fold=_fold,
    flops=_flops,
)
