"""``torch.ops.mixfeat.patch_conv``: the fused patch convolution and its backward pass.

Besides the logits it returns the activation's slopes phi' for the first ``saved`` samples, which spares the backward
pass their recomputation. On a GPU it saves those of all samples if patches are long, else none.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixfeat import _checks, backends, reference
from mixfeat.kernels.polynomial import Polynomial
from mixfeat.ops import fallback
from mixfeat.ops.registration import Folded, Operator, fold_runs, is_batched, is_transformed

__all__ = ["patch_conv"]

# The slopes that the CPU backend may save for the backward pass, which spares one of three matrix products. This limit
# keeps the memory of a forward and backward pass within 64 MiB of the input's and the weight's; the slopes of further
# samples are recomputed.
SAVED_BYTES = 32 << 20


def patch_conv(
    input: Tensor, weight: Tensor, index: Tensor | None, lam: Tensor | None, polynomial: Polynomial
) -> Tensor:
    """Return the logits, (N,C) or (R,N,C)."""
    return _patch_conv(input, weight, index, lam, polynomial, 0)


def _samples_to_save(input: Tensor, weight: Tensor) -> int:
    """Return the number of samples whose slopes forward saves if gradients are needed."""
    *_, samples, patches, patch_dim = input.shape
    if torch.compiler.is_dynamo_compiling():  # Dynamo cannot trace the choice of a backend
        on_triton = input.device.type == "cuda"
    else:
        on_triton = backends.serving(input.device.type, input.dtype) == "triton"
    if on_triton:
        from mixfeat.kernels.triton import configs

        filters = weight.shape[-3:-1].numel()
        return samples if configs.keeps_slopes(input.dtype, filters, patch_dim) else 0
    if input.device.type != "cpu":
        return 0
    slopes = weight.numel() // max(1, patch_dim) * patches  # of one sample
    if input.dim() == 4 and weight.dim() == 3:
        slopes *= input.shape[0]
    return min(samples, SAVED_BYTES // max(1, slopes * _slope_dtype(input).itemsize))


def _request(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments with which forward saves slopes for the backward pass."""
    input, weight, index, lam, fields, _ = args
    if input.dtype == torch.float16 and not Polynomial.of(fields).upper:
        return args  # a power may overflow float16
    return input, weight, index, lam, fields, _samples_to_save(input, weight)


def _slope_dtype(input: Tensor) -> torch.dtype:
    """Return the slopes' dtype: the input's, but float32 for float16 on a CPU."""
    return torch.float32 if input.device.type == "cpu" and input.dtype == torch.float16 else input.dtype


def _slope_shape(input: Tensor, weight: Tensor, saved: int) -> tuple[int, int, int, int]:
    """Return (B, saved, P, columns); runs that share the data are columns of one product."""
    columns = weight.shape[-3] * weight.shape[-2]
    if input.dim() == 4:
        return input.shape[0], saved, input.shape[2], columns
    return 1, saved, input.shape[1], columns * (weight.shape[0] if weight.dim() == 4 else 1)


def _forward(
    input: Tensor, weight: Tensor, index: Tensor | None, lam: Tensor | None, fields: Sequence[float], saved: int
) -> tuple[Tensor, Tensor]:
    polynomial = Polynomial.of(fields)
    name = backends.serving_network(input.device.type, input.dtype, polynomial)
    if name == "cpu":
        index = None if index is None else index.contiguous()
        # tuple(): PyTorch converts a NamedTuple 0.8 us slower
        native = (*_native(input, weight), index, lam, tuple(polynomial), saved)
        run = torch.ops.mixfeat_cpu.patch_conv.default
        logits, slope = _checks.explained(run, native, _values, index, lam, input.shape[-3])
        return logits if logits.dtype == input.dtype else logits.to(input.dtype), slope
    index = _values(index, lam, input.shape[-3])
    if name == "triton":
        from mixfeat.kernels.triton.patch_conv import patch_conv as launch

        slope = input.new_empty(_slope_shape(input, weight, saved), dtype=_slope_dtype(input))
        kept = slope if saved and saved == input.shape[-3] else None
        logits = launch(*_as_networks(input, weight), index, lam, polynomial, slope=kept)
        if input.dim() == 3:  # (1, N, R*C), where weight has R runs
            logits = logits[0] if weight.dim() == 3 else logits[0].unflatten(1, weight.shape[:2]).transpose(0, 1)
        if saved == 0 or kept is not None:
            return logits.contiguous(), slope
    else:
        logits = fallback.patch_conv(input, weight, index, lam, polynomial)
    return logits.contiguous(), _slope(input, weight, index, lam, polynomial, saved)


def _backward(
    grad: Tensor,
    slope: Tensor,
    input: Tensor,
    weight: Tensor,
    index: Tensor | None,
    lam: Tensor | None,
    fields: Sequence[float],
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    polynomial = Polynomial.of(fields)
    name = backends.serving_network(input.device.type, input.dtype, polynomial)
    input_grad, weight_grad = input.new_empty(0), weight.new_empty(0)
    if name == "cpu":
        index = None if index is None else index.contiguous()
        grad = grad.to(_checks.accumulation(input.dtype)).contiguous()
        native = (grad, slope, *_native(input, weight), index, lam, tuple(polynomial), need_input, need_weight)
        run = torch.ops.mixfeat_cpu.patch_conv_backward.default
        input_grad, weight_grad = _checks.explained(run, native, _values, index, lam, input.shape[-3])
        return input_grad.to(input.dtype), weight_grad.to(weight.dtype)
    index = _values(index, lam, input.shape[-3])
    if name == "triton":
        from mixfeat.kernels.triton.patch_conv import patch_conv_backward as launch

        if input.dim() == 3:
            grad = (grad if weight.dim() == 3 else grad.transpose(0, 1).flatten(1))[None]
        grads = launch(
            grad,
            *_as_networks(input, weight),
            index,
            lam,
            polynomial,
            input_grad=need_input,
            weight_grad=need_weight,
            slope=slope if 0 < slope.shape[1] == input.shape[-3] else None,
        )
        if grads[0] is not None:
            input_grad = grads[0].view(input.shape)
        if grads[1] is not None:  # a weight that all runs share gets the sum of their gradients
            summed = input.dim() == 4 and weight.dim() == 3
            weight_grad = grads[1].sum(0) if summed else grads[1].view(weight.shape)
    else:
        g, x, w = (t.to(_checks.accumulation(input.dtype)) for t in (grad, input, weight))
        grads = fallback.patch_conv_backward(g, x, w, index, lam, polynomial)
        input_grad, weight_grad = (
            t.contiguous() if need else t.new_empty(0) for t, need in zip(grads, (need_input, need_weight), strict=True)
        )
    return input_grad.to(input.dtype), weight_grad.to(weight.dtype)


def _values(index: Tensor | None, lam: Tensor | None, num_samples: int) -> Tensor | None:
    """Refuse partners and their weights out of range; return the partners contiguous."""
    return None if index is None or lam is None else _checks.partners(index, lam, num_samples)


def _native(input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return input and weight as the CPU library takes them: no float16, contiguous patches and weight."""
    if input.dtype == torch.float16:
        input, weight = input.float(), weight.float()
    return input if input.stride(-1) == 1 or input.shape[-1] <= 1 else input.contiguous(), weight.contiguous()


def _as_networks(input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return input (B,N,P,D) and weight (B,C,M,D), as Triton's kernels take them."""
    if input.dim() == 3:
        return input[None], weight.flatten(0, -3)[None]
    return input, weight if weight.dim() == 4 else weight.expand(input.shape[0], *weight.shape)


def _slope(
    input: Tensor, weight: Tensor, index: Tensor | None, lam: Tensor | None, polynomial: Polynomial, saved: int
) -> Tensor:
    """Compute the slopes of the first ``saved`` samples, for a backend whose forward does not return them."""
    if saved == 0:
        return input.new_empty(_slope_shape(input, weight, 0), dtype=_slope_dtype(input))
    x, w = (t.to(_checks.accumulation(input.dtype)) for t in _as_networks(input, weight))
    if index is not None and lam is not None:
        x = reference.mixup(x, index, lam, dim=-3)
    with torch.autocast(input.device.type, enabled=False):
        slope = polynomial.slope(torch.einsum("bnpd,bqd->bnpq", x[:, :saved], w.flatten(1, 2)))
    return slope.to(_slope_dtype(input))


def _fake(
    input: Tensor, weight: Tensor, index: Tensor | None, lam: Tensor | None, fields: list[float], saved: int
) -> tuple[Tensor, Tensor]:
    runs = input.shape[:-3] if input.dim() == 4 else weight.shape[:-3]
    logits = input.new_empty((*runs, input.shape[-3], weight.shape[-3]))
    return logits, input.new_empty(_slope_shape(input, weight, saved), dtype=_slope_dtype(input))


def _backward_fake(grad: Tensor, slope: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, need_input, need_weight = rest
    return (
        input.new_empty(input.shape if need_input else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, weight, index, lam, ctx.fields, _ = inputs
    ctx.save_for_backward(output[1], input, weight, index, lam)


class _RecordedBackward(torch.autograd.Function):
    """The backward pass, which can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, outer: Any, needs: Sequence[bool], grad: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
        ctx.fields = outer.fields
        ctx.save_for_backward(grad, *saved)
        ctx.set_materialize_grads(False)
        with backends.as_chosen(outer.chosen):
            grads = _patch_conv_backward.outputs(grad, *saved, outer.fields, *needs)
        return tuple(value if need else None for value, need in zip(grads, needs, strict=True))

    @staticmethod
    def backward(ctx: Any, *factors: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, _, input, weight, index, lam = ctx.saved_tensors
        if factors == (None, None):
            return (None,) * 8
        dtype = _checks.accumulation(input.dtype)
        g, x, w = (t.to(dtype) for t in (grad, input, weight))
        u, v = (None if t is None else t.to(dtype) for t in factors)
        polynomial, need_input = Polynomial.of(ctx.fields), ctx.needs_input_grad[4]
        grads = fallback.patch_conv_double_backward(g, x, w, index, lam, polynomial, u, v, need_input)
        g, x, w = (None if d is None else d.to(t.dtype) for d, t in zip(grads, (grad, input, weight), strict=True))
        return None, None, g, None, x, w, None, None


def _recorded_backward(ctx: Any, grad: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    _, input, weight, index, lam = ctx.saved_tensors
    if not (is_transformed((grad,)) or is_batched(grad)):
        return _RecordedBackward.apply(ctx, needs, grad, *ctx.saved_tensors)
    g, x, w = (t.to(_checks.accumulation(input.dtype)) for t in (grad, input, weight))
    input_grad, weight_grad = fallback.patch_conv_backward(g, x, w, index, lam, Polynomial.of(ctx.fields))
    return input_grad.to(input.dtype), weight_grad.to(weight.dtype)


def _definition(
    input: Tensor, weight: Tensor, index: Tensor | None, lam: Tensor | None, fields: Sequence[float], saved: int
) -> Tensor:
    x, w = (t.to(_checks.accumulation(input.dtype)) for t in (input, weight))
    return reference.patch_conv(x, w, Polynomial.of(fields), index=index, lam=lam).to(input.dtype)


def _fold(size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> Folded:
    """Turn batches of inputs and weights into runs."""
    arguments, runs = fold_runs(size, in_dims, args, {0: 3, 1: 3})
    return arguments, lambda logits: logits if runs is None else logits.unflatten(0, (size, runs))


def _flops(input: Tensor, weight: Tensor, products: int) -> int:
    """Count the operations of ``products`` products of all patches with all filters, 2 R N P D C M each."""
    runs = weight.shape[0] if input.dim() == 3 and weight.dim() == 4 else 1
    return 2 * products * runs * input.numel() * weight.shape[-3] * weight.shape[-2]


_patch_conv_backward = Operator(
    "patch_conv_backward(Tensor grad, Tensor slope, Tensor input, Tensor weight, Tensor? index, Tensor? lam, "
    "float[] polynomial, bool need_input, bool need_weight) -> (Tensor, Tensor)",
    forward=_backward,
    fake=_backward_fake,
    flops=lambda grad, slope, input, weight, *rest: _flops(input, weight, sum(rest[-2:])),
)
_patch_conv = Operator(
    "patch_conv(Tensor input, Tensor weight, Tensor? index, Tensor? lam, float[] polynomial, SymInt saved) "
    "-> (Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    differentiable=("input", "weight"),
    request=_request,
    setup_context=_setup_context,
    backward=lambda ctx, grad, needs: _patch_conv_backward.outputs(grad, *ctx.saved_tensors, ctx.fields, *needs),
    recorded_backward=_recorded_backward,
    definition=_definition,
    foldable=("input", "weight"),
    fold=_fold,
    flops=lambda input, weight, *rest: _flops(input, weight, 1),
)
