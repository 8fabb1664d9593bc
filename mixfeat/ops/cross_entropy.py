"""``torch.ops.mixfeat.mixup_cross_entropy`` and ``soft_target_cross_entropy``: losses of logits, with gradients.

Each is one pass over the logits, which also yields the gradient; backward only scales it by the loss's upstream
gradient, and where that is 1, as in the usual training step, has nothing left to do.
"""

from typing import Any

import torch
from torch import Tensor

from mixfeat import backends, reference
from mixfeat.ops.dispatch import accumulation, check_lam, may_go_direct, refuse_tangents, refuse_twice

__all__ = ["mixup_cross_entropy", "soft_target_cross_entropy"]

torch.library.define(
    "mixfeat::mixup_cross_entropy",
    "(Tensor input, Tensor target_a, Tensor target_b, Tensor lam, float label_smoothing, int ignore_index, "
    "str reduction, bool need_grad) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "mixfeat::soft_target_cross_entropy",
    "(Tensor input, Tensor target, float label_smoothing, str reduction, bool need_grad) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_mixup_op = torch.ops.mixfeat.mixup_cross_entropy.default
_soft_target_op = torch.ops.mixfeat.soft_target_cross_entropy.default


def mixup_cross_entropy(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: Tensor,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """The loss, () or (N,); lam of the loss's dtype."""
    options = (label_smoothing, ignore_index, reduction)
    return _call(_mixup_op, _mixup_forward, input, target_a, target_b, lam, *options)


def soft_target_cross_entropy(input: Tensor, target: Tensor, label_smoothing: float, reduction: str) -> Tensor:
    """The loss, () or (N,)."""
    return _call(_soft_target_op, _soft_target_forward, input, target, label_smoothing, reduction)


def _call(op: Any, forward: Any, input: Tensor, *rest: Any) -> Tensor:
    """By the operator where somebody watches, else by what it would call."""
    if not may_go_direct(input):
        return op(input, *rest, False)[0]
    if torch.is_grad_enabled() and input.requires_grad:
        return _apply(forward, True, input, *rest)
    return forward(input, *rest, False)[0]


def _folds_mean(dtype: torch.dtype) -> bool:
    """Whether the gradient that forward yields has the mean's 1/N in it: float16 would lose small numbers to it."""
    return dtype != torch.float16


def _mixup_forward(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: Tensor,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    num_samples, num_classes = input.shape
    mean, fold = reduction == "mean", _folds_mean(input.dtype)
    name = backends.serving(input.device.type, input.dtype)
    check_lam(lam)
    if name == "cpu":
        targets = target_a.contiguous(), target_b.contiguous()
        loss, grad, bad = torch.ops.mixfeat_cpu.mixup_cross_entropy.default(
            _rows(input), *targets, lam, label_smoothing, ignore_index, mean, fold, reduction != "none", need_grad
        )
        if bad >= 0:
            raise _out_of_range("ab"[bad % 2], int(targets[bad % 2][bad // 2]), num_classes, ignore_index)
        return loss / num_samples if mean and not fold else loss, grad

    if input.device.type == "cpu":  # elsewhere a target that is out of range gives NaN
        for key, target in (("a", target_a), ("b", target_b)):
            bad_ones = target[(target != ignore_index) & ((target < 0) | (target >= num_classes))]
            if len(bad_ones):
                raise _out_of_range(key, int(bad_ones[0]), num_classes, ignore_index)
    loss, grad = _empty(input, need_grad)
    total_weight = (1.0 if fold else float(num_samples)) if mean else None
    arguments = (target_a, target_b, lam, label_smoothing, ignore_index, total_weight)
    if name == "triton":
        from mixfeat.kernels.triton.cross_entropy import cross_entropy as launch

        launch(_rows(input), *arguments, loss, grad if need_grad else None)
    else:
        _mixup_by_reference(input, *arguments, loss, grad)
    return _reduce(loss, reduction, fold), grad


def _soft_target_forward(
    input: Tensor, target: Tensor, label_smoothing: float, reduction: str, need_grad: bool
) -> tuple[Tensor, Tensor]:
    num_samples, num_classes = input.shape
    mean, fold = reduction == "mean", _folds_mean(input.dtype)
    name = backends.serving(input.device.type, input.dtype)
    weight = 1 / num_samples if num_samples and mean and fold else 1.0
    if name == "cpu":
        if target.dtype not in (input.dtype, torch.float32) or input.dtype == torch.float64:
            target = target.to(accumulation(input.dtype))
        loss, grad = torch.ops.mixfeat_cpu.soft_target_cross_entropy.default(
            _rows(input), _rows(target), weight, label_smoothing, reduction != "none", need_grad
        )
        loss = loss / num_samples if mean and not fold else loss
    else:
        loss, grad = _empty(input, need_grad)
        if name == "triton":
            from mixfeat.kernels.triton.cross_entropy import soft_target_cross_entropy as launch

            launch(_rows(input), _rows(target), weight, label_smoothing, loss, grad if need_grad else None)
        else:
            label = (target.to(loss.dtype) * (1 - label_smoothing) + label_smoothing / num_classes) * weight
            _by_reference(input, label, loss, grad)
        loss = _reduce(loss, reduction, fold)
    return (loss if num_samples or not mean else loss * torch.nan), grad


def _empty(input: Tensor, need_grad: bool) -> tuple[Tensor, Tensor]:
    """Memory for the loss of each row and for the gradient, if there is to be one."""
    loss = input.new_empty(input.shape[0], dtype=accumulation(input.dtype))
    return loss, input.new_empty(input.shape if need_grad else 0)


def _rows(tensor: Tensor) -> Tensor:
    """With the classes of a row side by side."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def _reduce(loss: Tensor, reduction: str, folded: bool) -> Tensor:
    if reduction == "none":
        return loss
    # the mean of nothing is not a number, the sum is
    return loss.sum() if reduction == "sum" or (folded and len(loss)) else loss.mean()


def _out_of_range(key: str, value: int, num_classes: int, ignore_index: int) -> IndexError:
    return IndexError(f"target_{key} must lie in [0, {num_classes}) or be ignore_index ({ignore_index}), got {value}")


def _mixup_by_reference(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: Tensor,
    label_smoothing: float,
    ignore_index: int,
    total_weight: float | None,
    loss: Tensor,
    grad: Tensor,
) -> None:
    """What the Triton kernel computes, from its arguments: loss (N,) and gradient (N,C), if there is to be one."""
    num_classes = input.shape[1]
    label = loss.new_zeros(input.shape)  # what each class counts for: NaN where a target that counts is out of range
    none = torch.zeros((), dtype=torch.bool, device=loss.device)
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
    _by_reference(input, label, loss, grad, sparse=True)
    loss.masked_fill_(none, torch.nan)


def _by_reference(input: Tensor, label: Tensor, loss: Tensor, grad: Tensor, sparse: bool = False) -> None:
    row_loss, row_grad = reference.cross_entropy_rows(input.to(loss.dtype), label, grad.dim() == 2, sparse=sparse)
    loss.copy_(row_loss)
    if row_grad is not None:
        grad.copy_(row_grad)


class _CrossEntropy(torch.autograd.Function):
    """Both operators' derivative. ``direct`` says that nobody watches: then the loss alone is returned."""

    @staticmethod
    def forward(ctx: Any, compute: Any, direct: bool, input: Tensor, *rest: Any) -> Tensor | tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            loss, grad = compute(input, *rest, True)
        ctx.save_for_backward(grad)
        ctx.direct = direct
        ctx.divisor = input.shape[0] if rest[-1] == "mean" and not _folds_mean(input.dtype) else 1
        ctx.others = len(rest)
        if direct:
            return loss
        ctx.mark_non_differentiable(grad)
        return loss, grad

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        factor = upstream.detach() if ctx.divisor == 1 else upstream.detach() / ctx.divisor
        grad = _scaled_for_good(grad, factor) if ctx.direct and not _graph_is_kept() else _scaled(grad, factor)
        return None, None, refuse_twice("a fused cross-entropy", grad), *[None] * ctx.others


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    return (grad * (factor if factor.dim() == 0 else factor[:, None])).to(grad.dtype)


def _scaled_for_good(grad: Tensor, factor: Tensor) -> Tensor:
    """The same in grad's own memory, which nobody else will read."""
    if grad.device.type == "cpu" and factor.dim() == 0 and factor.item() == 1:
        return grad
    if grad.is_cuda and backends.serving("cuda", grad.dtype) == "triton":
        from mixfeat.kernels.triton.cross_entropy import scale_ as launch

        launch(grad, factor)
        return grad
    return grad.mul_(factor if factor.dim() == 0 else factor[:, None])


def _graph_is_kept() -> bool:
    """Whether this backward pass may be followed by another through the same graph."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


# Function.apply without what it does for functorch's transforms
_apply = super(torch.autograd.Function, _CrossEntropy).apply


def _register(name: str, op: Any, forward: Any) -> None:
    def autograd(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        refuse_tangents(name.removeprefix("mixfeat::"), input, *rest)
        if torch.is_grad_enabled() and input.requires_grad:
            return _CrossEntropy.apply(op, False, input, *rest[:-1])
        with torch._C._AutoDispatchBelowAutograd():
            return op(input, *rest)

    def fake(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *_, reduction, need_grad = rest
        loss, grad = _empty(input, need_grad)
        return (loss if reduction == "none" else loss.new_empty(())), grad

    torch.library.impl(name, "Autograd", autograd)
    torch.library.impl(name, "CompositeExplicitAutograd", forward)
    torch.library.register_fake(name, fake)


_register("mixfeat::mixup_cross_entropy", _mixup_op, _mixup_forward)
_register("mixfeat::soft_target_cross_entropy", _soft_target_op, _soft_target_forward)
