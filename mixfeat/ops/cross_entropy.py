"""``torch.ops.mixfeat.mixup_cross_entropy`` and ``soft_target_cross_entropy``: losses of logits, with gradients.

Each is one pass over the logits, which also yields the gradient; backward only scales it by the loss's upstream
gradient, and where that is 1, as in the usual training step, has nothing left to do.
"""

from typing import Any

import torch
from torch import Tensor

from mixfeat import _checks, backends
from mixfeat.ops import fallback
from mixfeat.ops.registration import Operator, graph_is_kept, saved_tensors_are_hooked

__all__ = ["mixup_cross_entropy", "soft_target_cross_entropy"]


def mixup_cross_entropy(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: Tensor,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """Return the loss, () or (N,); lam of the loss's dtype."""
    options = (label_smoothing, ignore_index, reduction)
    return _mixup_cross_entropy(input, target_a, target_b, lam, *options, False)


def soft_target_cross_entropy(input: Tensor, target: Tensor, label_smoothing: float, reduction: str) -> Tensor:
    """Return the loss, () or (N,)."""
    return _soft_target_cross_entropy(input, target, label_smoothing, reduction, False)


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
    _checks.lam_values(lam)
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
        label, none = fallback.mixup_labels(input, *arguments)
        _fill(loss, grad, fallback.cross_entropy_rows(input.to(loss.dtype), label, need_grad, sparse=True))
        loss.masked_fill_(none, torch.nan)
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
            target = target.to(_checks.accumulation(input.dtype))
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
            _fill(loss, grad, fallback.cross_entropy_rows(input.to(loss.dtype), label, need_grad))
        loss = _reduce(loss, reduction, fold)
    return (loss if num_samples or not mean else loss * torch.nan), grad


def _empty(input: Tensor, need_grad: bool) -> tuple[Tensor, Tensor]:
    """Memory for the loss of each row and for the gradient, if there is to be one."""
    loss = input.new_empty(input.shape[0], dtype=_checks.accumulation(input.dtype))
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


def _fill(loss: Tensor, grad: Tensor, rows: tuple[Tensor, Tensor | None]) -> None:
    loss.copy_(rows[0])
    if rows[1] is not None:
        grad.copy_(rows[1])


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    return (grad * (factor if factor.dim() == 0 else factor[:, None])).to(grad.dtype)


def _scaled_in_place(grad: Tensor, factor: Tensor) -> Tensor:
    """The same in grad's own memory, which nobody else will read."""
    if grad.device.type == "cpu" and factor.dim() == 0 and factor.item() == 1:
        return grad
    if grad.is_cuda and backends.serving("cuda", grad.dtype) == "triton":
        from mixfeat.kernels.triton.cross_entropy import scale_ as launch

        launch(grad, factor)
        return grad
    return grad.mul_(factor if factor.dim() == 0 else factor[:, None])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, *_, reduction, _ = inputs
    ctx.save_for_backward(output[1])
    ctx.divisor = input.shape[0] if reduction == "mean" and not _folds_mean(input.dtype) else 1
    ctx.is_alone = ctx.direct and not saved_tensors_are_hooked()  # nobody else holds the gradient


def _backward(ctx: Any, grad: Tensor, needs: Any) -> tuple[Tensor]:
    (input_grad,) = ctx.saved_tensors
    factor = grad if ctx.divisor == 1 else grad / ctx.divisor
    scaled = _scaled_in_place if ctx.is_alone and not graph_is_kept() else _scaled
    return (scaled(input_grad, factor),)


def _fake(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, reduction, need_grad = rest
    loss, grad = _empty(input, need_grad)
    return (loss if reduction == "none" else loss.new_empty(())), grad


_mixup_cross_entropy = Operator(
    "mixup_cross_entropy(Tensor input, Tensor target_a, Tensor target_b, Tensor lam, float label_smoothing, "
    "int ignore_index, str reduction, bool need_grad) -> (Tensor, Tensor)",
    forward=_mixup_forward,
    fake=_fake,
    differentiable=("input",),
    request=lambda args: (*args[:-1], True),
    setup_context=_setup_context,
    backward=_backward,
)
_soft_target_cross_entropy = Operator(
    "soft_target_cross_entropy(Tensor input, Tensor target, float label_smoothing, str reduction, bool need_grad) "
    "-> (Tensor, Tensor)",
    forward=_soft_target_forward,
    fake=_fake,
    differentiable=("input",),
    request=lambda args: (*args[:-1], True),
    setup_context=_setup_context,
    backward=_backward,
)
