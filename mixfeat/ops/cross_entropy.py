"""``torch.ops.mixfeat.mixup_cross_entropy`` and ``soft_target_cross_entropy``: losses of logits, with gradients.

Each is one pass over the logits, which also yields the gradient. Backward scales it by the loss's upstream gradient,
and does nothing if that is 1, as in the usual training step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mixfeat import _checks, backends, reference
from mixfeat.ops import fallback
from mixfeat.ops.registration import Operator, graph_is_kept, is_batched, saved_tensors_are_hooked

__all__ = [
    "folds_mean", "gradient_may_be_overwritten", "mixup_cross_entropy", "rows_of", "scaled", "scaled_in_place",
    "soft_target_cross_entropy", "weighted_mixup_cross_entropy",
]  # fmt: skip


def mixup_cross_entropy(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: Tensor,
    label_smoothing: float,
    lse_square_scale: float,
    ignore_index: int,
    reduction: str,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss, () or (N,), and the logsumexp, (N,) or, if not needed, empty; lam has the loss's dtype."""
    options = (label_smoothing, lse_square_scale, ignore_index, reduction, need_lse)
    return _mixup_cross_entropy(input, target_a, target_b, lam, *options, False)


def weighted_mixup_cross_entropy(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: Tensor,
    weight: Tensor,
    label_smoothing: float,
    lse_square_scale: float,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Compute the same with class weights (C,), in plain PyTorch; lam and weight have the loss's dtype."""
    _checks.lam_values(lam)
    num_classes, valid = input.shape[1], []
    for key, target in (("a", target_a), ("b", target_b)):
        bad = (target != ignore_index) & ((target < 0) | (target >= num_classes))
        if input.device.type == "cpu" and bool(bad.any()):
            raise _out_of_range(key, int(target[bad][0]), num_classes, ignore_index)
        valid.append(~bad)
    loss, lse = reference.mixup_cross_entropy(
        input.to(lam.dtype), target_a.where(valid[0], 0), target_b.where(valid[1], 0), lam, weight=weight,
        label_smoothing=label_smoothing, lse_square_scale=lse_square_scale, ignore_index=ignore_index,
        reduction=reduction, return_lse=True,
    )  # fmt: skip
    if input.device.type == "cpu":
        return loss, lse
    missing = ~(valid[0] & valid[1])
    return loss.where(~(missing if reduction == "none" else missing.any()), torch.nan), lse


def soft_target_cross_entropy(input: Tensor, target: Tensor, label_smoothing: float, reduction: str) -> Tensor:
    """Return the loss, () or (N,)."""
    return _soft_target_cross_entropy(input, target, label_smoothing, reduction, False)


def folds_mean(dtype: torch.dtype) -> bool:
    """Return whether forward's gradient includes the mean's 1/N, which would underflow in float16."""
    return dtype != torch.float16


def _mixup_forward(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: Tensor,
    label_smoothing: float,
    lse_square_scale: float,
    ignore_index: int,
    reduction: str,
    need_lse: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_samples, num_classes = input.shape
    mean, fold = reduction == "mean", folds_mean(input.dtype)
    name = backends.serving(input.device.type, input.dtype)
    if name == "cpu":
        targets = target_a.contiguous(), target_b.contiguous()
        native = (
            rows_of(input), *targets, lam, label_smoothing, lse_square_scale, ignore_index, mean, fold,
            reduction != "none", need_lse, need_grad, None, None,
        )  # fmt: skip
        run = torch.ops.mixfeat_cpu.mixup_cross_entropy.default
        loss, lse, grad, bad = _checks.explained(run, native, _checks.lam_values, lam)
        if bad >= 0:
            raise _out_of_range("ab"[bad % 2], int(targets[bad % 2][bad // 2]), num_classes, ignore_index)
        return loss / num_samples if mean and not fold else loss, lse, grad, _empty_counts(input, reduction, need_grad)

    _checks.lam_values(lam)
    if input.device.type == "cpu":  # on other devices a target out of range gives NaN
        for key, target in (("a", target_a), ("b", target_b)):
            bad_ones = target[(target != ignore_index) & ((target < 0) | (target >= num_classes))]
            if len(bad_ones):
                raise _out_of_range(key, int(bad_ones[0]), num_classes, ignore_index)
    loss, grad = _empty(input, need_grad)
    lse, counts = loss.new_empty(num_samples if need_lse else 0), _empty_counts(input, reduction, need_grad)
    total_weight = (1.0 if fold else float(num_samples)) if mean else None
    arguments = (target_a, target_b, lam, label_smoothing, lse_square_scale, ignore_index, total_weight)
    if name == "triton":
        from mixfeat.kernels.triton import cross_entropy as kernels

        lse_to, grad_to = lse if need_lse else None, grad if need_grad else None
        if total_weight and _counts_serve(input) and kernels.counts_later(num_samples, num_classes):
            counts = counts if len(counts) else counts.new_empty(2)
            losses, loss = loss.new_empty(2, num_samples), loss.new_empty(())
            kernels.cross_entropy(rows_of(input), *arguments, losses, lse_to, grad_to)
            kernels.mean(losses, target_a, target_b, ignore_index, num_samples / total_weight, loss, counts)
            return loss, lse, grad, counts if need_grad else counts.new_empty(0)
        found = kernels.count(target_a, target_b, ignore_index) if mean else None
        kernels.cross_entropy(rows_of(input), *arguments, loss, lse_to, grad_to, counts=found)
        counts = found if found is not None and len(counts) else counts
    else:
        rows, row_lse, rows_grad = fallback.mixup_cross_entropy_rows(input.to(loss.dtype), *arguments, need_grad)
        _fill(loss, grad, (rows, rows_grad))
        if need_lse:
            lse.copy_(row_lse)
        if len(counts):
            counts.copy_(torch.stack([(target != ignore_index).sum() for target in (target_a, target_b)]))
    return _reduce(loss, reduction, fold), lse, grad, counts


def _counts_serve(input: Tensor) -> bool:
    """Return whether backward needs the number of targets that are not ignored, which GPU kernels use.

    The device decides, not the backend, because a compiled backward pass may come from a cache.
    """
    return input.device.type != "cpu"


def _empty_counts(input: Tensor, reduction: str, need_grad: bool) -> Tensor:
    size = 2 if reduction == "mean" and need_grad and _counts_serve(input) else 0
    return input.new_empty(size, dtype=torch.int32)


def _mixup_backward(
    grad: Tensor | None,
    lse_grad: Tensor | None,
    counts: Tensor,
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: Tensor,
    label_smoothing: float,
    lse_square_scale: float,
    ignore_index: int,
    mean: bool,
) -> Tensor:
    """Recompute the gradient, given those of the loss and of the logsumexp, and forward's ``counts``."""
    name = backends.serving(input.device.type, input.dtype)
    factor = lam.new_zeros(()) if grad is None else grad
    if name == "cpu":
        _, _, input_grad, _ = torch.ops.mixfeat_cpu.mixup_cross_entropy.default(
            rows_of(input), target_a.contiguous(), target_b.contiguous(), lam, label_smoothing, lse_square_scale,
            ignore_index, mean, True, False, False, True, factor, lse_grad,
        )  # fmt: skip
        return input_grad
    total_weight = 1.0 if mean else None
    arguments = (target_a, target_b, lam, label_smoothing, lse_square_scale, ignore_index, total_weight)
    if name == "triton":
        from mixfeat.kernels.triton import cross_entropy as kernels

        input_grad, found = input.new_empty(input.shape), None
        if mean and len(input):
            found = counts if len(counts) else kernels.count(target_a, target_b, ignore_index)
        kernels.cross_entropy(rows_of(input), *arguments, None, None, input_grad, factor, lse_grad, counts=found)
        return input_grad
    *_, rows = fallback.mixup_cross_entropy_rows(input.to(lam.dtype), *arguments, True, factor, lse_grad)
    assert rows is not None
    return rows.to(input.dtype)


def _soft_target_forward(
    input: Tensor, target: Tensor, label_smoothing: float, reduction: str, need_grad: bool
) -> tuple[Tensor, Tensor]:
    num_samples, num_classes = input.shape
    mean, fold = reduction == "mean", folds_mean(input.dtype)
    name = backends.serving(input.device.type, input.dtype)
    weight = 1 / num_samples if num_samples and mean and fold else 1.0
    if name == "cpu":
        if target.dtype not in (input.dtype, torch.float32) or input.dtype == torch.float64:
            target = target.to(_checks.accumulation(input.dtype))
        loss, grad = torch.ops.mixfeat_cpu.soft_target_cross_entropy.default(
            rows_of(input), rows_of(target), weight, label_smoothing, reduction != "none", need_grad
        )
        loss = loss / num_samples if mean and not fold else loss
    else:
        loss, grad = _empty(input, need_grad)
        if name == "triton":
            from mixfeat.kernels.triton.cross_entropy import soft_target_cross_entropy as launch

            launch(rows_of(input), rows_of(target), weight, label_smoothing, loss, grad if need_grad else None)
        else:
            label = (target.to(loss.dtype) * (1 - label_smoothing) + label_smoothing / num_classes) * weight
            _fill(loss, grad, fallback.soft_target_cross_entropy_rows(input.to(loss.dtype), label, need_grad))
        loss = _reduce(loss, reduction, fold)
    return (loss if num_samples or not mean else loss * torch.nan), grad


def _empty(input: Tensor, need_grad: bool) -> tuple[Tensor, Tensor]:
    """Allocate the loss of each row and, if needed, the gradient."""
    loss = input.new_empty(input.shape[0], dtype=_checks.accumulation(input.dtype))
    return loss, input.new_empty(input.shape if need_grad else 0)


def rows_of(tensor: Tensor) -> Tensor:
    """Return the tensor with the classes of each row contiguous, copied if needed."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def _reduce(loss: Tensor, reduction: str, folded: bool) -> Tensor:
    if reduction == "none":
        return loss
    # the mean of no rows is NaN, the sum is 0
    return loss.sum() if reduction == "sum" or (folded and len(loss)) else loss.mean()


def _out_of_range(key: str, value: int, num_classes: int, ignore_index: int) -> IndexError:
    return IndexError(f"target_{key} must lie in [0, {num_classes}) or be ignore_index ({ignore_index}), got {value}")


def _fill(loss: Tensor, grad: Tensor, rows: tuple[Tensor, Tensor | None]) -> None:
    loss.copy_(rows[0])
    if rows[1] is not None:
        grad.copy_(rows[1])


def scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """Return the gradient times a factor, () or (N,), in the gradient's dtype."""
    return (grad * (factor if factor.dim() == 0 else factor[:, None])).to(grad.dtype)


def scaled_in_place(grad: Tensor, factor: Tensor) -> Tensor:
    """Compute :func:`scaled` in grad's memory, which nobody else will read."""
    if grad.device.type == "cpu" and factor.dim() == 0 and factor.item() == 1:
        return grad
    if grad.is_cuda and backends.serving("cuda", grad.dtype) == "triton":
        from mixfeat.kernels.triton.cross_entropy import scale_ as launch

        launch(grad, factor)
        return grad
    return grad.mul_(factor if factor.dim() == 0 else factor[:, None])


def _fake(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, reduction, need_grad = rest
    loss, grad = _empty(input, need_grad)
    return (loss if reduction == "none" else loss.new_empty(())), grad


def _mixup_fake(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, reduction, need_lse, need_grad = rest
    loss, grad = _fake(input, reduction, need_grad)
    lse = loss.new_empty(input.shape[0] if need_lse else 0)
    return loss, lse, grad, _empty_counts(input, reduction, need_grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], saved: tuple[Tensor, ...]) -> None:
    input = inputs[0]
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.options = inputs[len(tensors) : -1]
    ctx.save_for_backward(*saved, *tensors)
    ctx.divisor = input.shape[0] if "mean" in ctx.options and not folds_mean(input.dtype) else 1
    ctx.may_overwrite = gradient_may_be_overwritten(ctx)


def _backward(ctx: Any, grad: Tensor, needs: Sequence[bool]) -> tuple[Tensor]:
    input_grad, *_ = ctx.saved_tensors
    factor = grad if ctx.divisor == 1 else grad / ctx.divisor
    return ((scaled_in_place if ctx.may_overwrite(grad) else scaled)(input_grad, factor),)


def gradient_may_be_overwritten(ctx: Any) -> Callable[[Tensor], bool]:
    """Return a predicate of the upstream gradient: whether backward alone will read the saved gradient."""
    is_alone = ctx.direct and not saved_tensors_are_hooked()
    return lambda grad: is_alone and not graph_is_kept() and not is_batched(grad)


def _mixup_backward_of(ctx: Any, grads: tuple[Tensor | None, Tensor | None], needs: Sequence[bool]) -> Sequence[Tensor]:
    grad, lse_grad = grads
    input_grad, counts, input, target_a, target_b, lam = ctx.saved_tensors
    label_smoothing, lse_square_scale, ignore_index, reduction, need_lse = ctx.options
    if not need_lse:
        if grad is None:
            return (torch.zeros_like(input),)
        if not _counts_serve(input):
            return _backward(ctx, grad, needs)
        if ctx.may_overwrite(grad) and backends.serving(input.device.type, input.dtype) == "triton":
            _write_again(input_grad, counts, ctx, grad)
            return (input_grad,)
    arguments = (input, target_a, target_b, lam, label_smoothing, lse_square_scale, ignore_index, reduction == "mean")
    return (_mixup_cross_entropy_backward.outputs(grad, lse_grad if need_lse else None, counts, *arguments),)


def _write_again(input_grad: Tensor, counts: Tensor, ctx: Any, grad: Tensor) -> None:
    """Rewrite the gradient in forward's memory; the kernel returns at once if the gradient is already correct."""
    from mixfeat.kernels.triton import cross_entropy as kernels

    _, _, input, target_a, target_b, lam = ctx.saved_tensors
    label_smoothing, lse_square_scale, ignore_index, reduction, _ = ctx.options
    mean, written = reduction == "mean" and len(input) > 0, 1
    if mean:
        written = 0 if ctx.divisor != 1 else 2 if kernels.counts_later(*input.shape) else 1
    kernels.cross_entropy(
        rows_of(input), target_a, target_b, lam, label_smoothing, lse_square_scale, ignore_index, 1.0 if mean else None,
        None, None, input_grad, grad, counts=counts if mean else None, written=written,
    )  # fmt: skip


def _mixup_recorded_backward(
    ctx: Any, grads: tuple[Tensor | None, Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor]:
    _, _, input, target_a, target_b, lam = ctx.saved_tensors
    label_smoothing, lse_square_scale, ignore_index, reduction, need_lse = ctx.options
    *_, rows = fallback.mixup_cross_entropy_rows(
        input.to(lam.dtype), target_a, target_b, lam, label_smoothing, lse_square_scale, ignore_index,
        1.0 if reduction == "mean" else None, True, lam.new_zeros(()) if grads[0] is None else grads[0],
        grads[1] if need_lse else None,
    )  # fmt: skip
    assert rows is not None
    return (rows.to(input.dtype),)


def _soft_target_recorded_backward(ctx: Any, grad: Tensor, needs: Sequence[bool]) -> tuple[Tensor]:
    _, input, target = ctx.saved_tensors
    label_smoothing, reduction = ctx.options
    dtype, weight = _checks.accumulation(input.dtype), 1 / max(1, input.shape[0]) if reduction == "mean" else 1.0
    label = (target.to(dtype) * (1 - label_smoothing) + label_smoothing / input.shape[1]) * weight
    _, rows = fallback.soft_target_cross_entropy_rows(input.to(dtype), label, True)
    assert rows is not None
    return (scaled(rows, grad).to(input.dtype),)


def _mixup_definition(input: Tensor, target_a: Tensor, target_b: Tensor, lam: Tensor, *options: Any) -> Any:
    label_smoothing, lse_square_scale, ignore_index, reduction, *_ = options
    return reference.mixup_cross_entropy(
        input.to(lam.dtype), target_a, target_b, lam,
        label_smoothing=label_smoothing, lse_square_scale=lse_square_scale, ignore_index=ignore_index,
        reduction=reduction, return_lse=True,
    )  # fmt: skip


def _soft_target_definition(
    input: Tensor, target: Tensor, label_smoothing: float, reduction: str, need_grad: bool
) -> Tensor:
    x, t = (tensor.to(_checks.accumulation(input.dtype)) for tensor in (input, target))
    return reference.soft_target_cross_entropy(x, t, label_smoothing=label_smoothing, reduction=reduction)


def _operator(schema: str, **functions: Any) -> Operator:
    return Operator(
        schema,
        differentiable=("input",),
        request=lambda args: (*args[:-1], True),
        **functions,
    )


_mixup_cross_entropy_backward = Operator(
    "mixup_cross_entropy_backward(Tensor? grad, Tensor? lse_grad, Tensor counts, Tensor input, Tensor target_a, "
    "Tensor target_b, Tensor lam, float label_smoothing, float lse_square_scale, int ignore_index, bool mean) "
    "-> Tensor",
    forward=_mixup_backward,
    fake=lambda grad, lse_grad, counts, input, *rest: input.new_empty(input.shape),
)
_mixup_cross_entropy = _operator(
    "mixup_cross_entropy(Tensor input, Tensor target_a, Tensor target_b, Tensor lam, float label_smoothing, "
    "float lse_square_scale, int ignore_index, str reduction, bool need_lse, bool need_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    forward=_mixup_forward,
    fake=_mixup_fake,
    results=2,
    setup_context=lambda ctx, inputs, output: _setup_context(ctx, inputs, output[2:]),
    backward=_mixup_backward_of,
    recorded_backward=_mixup_recorded_backward,
    definition=_mixup_definition,
)
_soft_target_cross_entropy = _operator(
    "soft_target_cross_entropy(Tensor input, Tensor target, float label_smoothing, str reduction, bool need_grad) "
    "-> (Tensor, Tensor)",
    forward=_soft_target_forward,
    fake=_fake,
    setup_context=lambda ctx, inputs, output: _setup_context(ctx, inputs, output[1:]),
    backward=_backward,
    recorded_backward=_soft_target_recorded_backward,
    definition=_soft_target_definition,
)
