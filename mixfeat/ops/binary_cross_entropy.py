"""``torch.ops.mixfeat.mixup_binary_cross_entropy``: a sigmoid loss of logits with both labels, and its gradient.

One pass over the logits yields the loss and the gradient; backward scales it by the loss's upstream gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixfeat import _checks, backends, reference
from mixfeat.ops import fallback
from mixfeat.ops.cross_entropy import folds_mean, gradient_may_be_overwritten, rows_of, scaled, scaled_in_place
from mixfeat.ops.registration import Operator

__all__ = ["mixup_binary_cross_entropy"]


def mixup_binary_cross_entropy(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: Tensor,
    pos_weight: Tensor | None,
    label_smoothing: float,
    threshold: float | None,
    reduction: str,
) -> Tensor:
    """Return the loss, () or (N,C); lam and pos_weight have the loss's dtype."""
    options = (label_smoothing, threshold, reduction)
    return _mixup_binary_cross_entropy(input, target_a, target_b, lam, pos_weight, *options, False)


def _forward(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: Tensor,
    pos_weight: Tensor | None,
    label_smoothing: float,
    threshold: float | None,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    name, reduce = backends.serving(input.device.type, input.dtype), reduction != "none"
    scale = 1 / max(1, input.numel()) if reduction == "mean" and folds_mean(input.dtype) else 1.0
    weight = None if pos_weight is None else pos_weight.contiguous()
    arguments = (target_a.contiguous(), target_b.contiguous(), lam, weight, label_smoothing, threshold)
    if name == "cpu":
        run = torch.ops.mixfeat_cpu.mixup_binary_cross_entropy.default
        native = (rows_of(input), *arguments, scale, reduce, need_grad)
        loss, grad = _checks.explained(run, native, _values, *arguments[:3], input.shape[1])  # the loss is summed
    else:
        _values(target_a, target_b, lam, input.shape[1])
        loss = input.new_empty(input.shape[: 1 if reduce else 2], dtype=_checks.accumulation(input.dtype))
        grad = input.new_empty(input.shape if need_grad else 0)
        if name == "triton":
            from mixfeat.kernels.triton.binary_cross_entropy import binary_cross_entropy as launch

            launch(rows_of(input), *arguments, scale, loss, grad if need_grad else None)
        else:
            values, slopes = fallback.mixup_binary_cross_entropy(input.to(loss.dtype), *arguments)
            loss.copy_(values.sum(1) if reduce else values)
            if need_grad:
                grad.copy_(scale * slopes)
        loss = loss.sum() if reduce else loss
    return (loss / input.numel() if reduction == "mean" else loss), grad


def _values(target_a: Tensor, target_b: Tensor, lam: Tensor, num_classes: int) -> None:
    """Refuse targets and weights out of range."""
    _checks.lam_values(lam)
    for key, target in (("target_a", target_a), ("target_b", target_b)):
        _checks.class_values(target, num_classes, key)


def _fake(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, reduction, need_grad = rest
    loss = input.new_empty(input.shape if reduction == "none" else (), dtype=_checks.accumulation(input.dtype))
    return loss, input.new_empty(input.shape if need_grad else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, *targets, ctx.label_smoothing, ctx.threshold, ctx.reduction, _ = inputs
    ctx.save_for_backward(output[1], input, *targets)
    ctx.divisor = input.numel() if ctx.reduction == "mean" and not folds_mean(input.dtype) else 1
    ctx.may_overwrite = gradient_may_be_overwritten(ctx)


def _backward(ctx: Any, grad: Tensor, needs: Sequence[bool]) -> tuple[Tensor]:
    input_grad, *_ = ctx.saved_tensors
    if ctx.reduction == "none":
        return ((input_grad * grad).to(input_grad.dtype),)
    factor = grad if ctx.divisor == 1 else grad / ctx.divisor
    return ((scaled_in_place if ctx.may_overwrite(grad) else scaled)(input_grad, factor),)


def _recorded_backward(ctx: Any, grad: Tensor, needs: Sequence[bool]) -> tuple[Tensor]:
    _, input, target_a, target_b, lam, pos_weight = ctx.saved_tensors
    options = (target_a, target_b, lam, pos_weight, ctx.label_smoothing, ctx.threshold)
    _, slopes = fallback.mixup_binary_cross_entropy(input.to(lam.dtype), *options)
    factor = grad / max(1, input.numel()) if ctx.reduction == "mean" else grad
    return ((slopes * factor).to(input.dtype),)


def _definition(
    input: Tensor, target_a: Tensor, target_b: Tensor, lam: Tensor, pos_weight: Tensor | None, *options: Any
) -> Tensor:
    label_smoothing, threshold, reduction, _ = options
    return reference.mixup_binary_cross_entropy(
        input.to(lam.dtype), target_a, target_b, lam, pos_weight=pos_weight,
        label_smoothing=label_smoothing, threshold=threshold, reduction=reduction,
    )  # fmt: skip


_mixup_binary_cross_entropy = Operator(
    "mixup_binary_cross_entropy(Tensor input, Tensor target_a, Tensor target_b, Tensor lam, Tensor? pos_weight, "
    "float label_smoothing, float? threshold, str reduction, bool need_grad) -> (Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    differentiable=("input",),
    request=lambda args: (*args[:-1], True),
    setup_context=_setup_context,
    backward=_backward,
    recorded_backward=_recorded_backward,
    definition=_definition,
)
