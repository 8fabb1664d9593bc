"""``torch.ops.mixfeat.mixup``: each sample of a batch interpolated with a partner, and its backward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mixfeat import _checks, backends, reference
from mixfeat.ops import fallback
from mixfeat.ops.registration import Folded, Operator, can_bypass_dispatcher

__all__ = ["empty_like", "in_shape_of", "mixup", "mixup_as_is", "sample_order", "samples_of"]


def mixup(input: Tensor, index: Tensor, lam: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mixed samples, of input's shape and memory format."""
    return _mixup(input, index, lam, dtype)


def mixup_as_is(input: Tensor, index: Tensor, lam: float | Tensor) -> Tensor | None:
    """Return the mixed samples where the CPU library takes unchecked arguments as they are, without a gradient.

    For a small batch checks take longer than the kernel, and the library refuses what it does not take. None says that
    the arguments are to be checked and served as usual.
    """
    by_number = type(lam) is float
    if not (type(input) is Tensor and type(index) is Tensor and (by_number or type(lam) is Tensor)):
        return None
    if not can_bypass_dispatcher((input, index, None if by_number else lam), (0, 1, 2)):
        return None
    dtype = input.dtype
    if (
        (input.requires_grad and torch.is_grad_enabled())
        or not (input.is_cpu and input.is_contiguous() and index.is_contiguous() and dtype in _checks.FLOAT_DTYPES)
        or backends.serving("cpu", dtype) != "cpu"
    ):
        return None
    run: Any = torch.ops.mixfeat_cpu.mixup_by_number
    if isinstance(lam, Tensor):
        if lam.requires_grad or lam.dim() > 1 or lam.dtype != _checks.accumulation(dtype):
            return None
        run = torch.ops.mixfeat_cpu.mixup
    try:
        return run.default(input, index, lam, dtype)
    except RuntimeError:
        return None


def sample_order(tensor: Tensor) -> list[int]:
    """Return the order of dimensions in which each sample is contiguous; their own order if no such order exists."""
    if tensor.is_contiguous():
        return list(range(tensor.dim()))
    strides = tensor.stride()
    order = sorted(range(1, tensor.dim()), key=lambda d: -strides[d])
    expected = 1
    for d in reversed(order):
        if tensor.shape[d] != 1:
            if strides[d] != expected:
                return list(range(tensor.dim()))
            expected *= tensor.shape[d]
    return [0, *order]


def samples_of(tensor: Tensor, order: list[int]) -> Tensor:
    """Flatten to (N,K): a view if each sample is contiguous in this order, else a copy."""
    if tensor.dim() == 2 and tensor.stride(1) == 1:
        return tensor
    samples = tensor.permute(order).flatten(1) if tensor.dim() > 1 else tensor[:, None]
    return samples if samples.stride(1) == 1 else samples.contiguous()


def in_shape_of(samples: Tensor, tensor: Tensor, order: list[int]) -> Tensor:
    """Undo :func:`samples_of`: give samples (N,K) in this order the shape of ``tensor``."""
    if tensor.is_contiguous():
        return samples if tensor.dim() == 2 else samples.view_as(tensor)
    shaped = samples.view([tensor.shape[d] for d in order])
    return shaped.permute([order.index(d) for d in range(tensor.dim())])


def _by_patch(input: Tensor, index: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return input (N,P,...), partners and weights (N,P) as N P samples, one for each patch."""
    samples, patches = lam.shape
    index = _checks.partners(index, lam, samples)  # before a product that may overflow 64 bits
    if index.device.type != "cpu":
        index = index.clamp(-1, samples)  # an invalid partner must stay invalid after the product
    partner = index[:, None] * patches + torch.arange(patches, device=index.device)
    return input.flatten(0, 1), partner.flatten(), lam.flatten()


def _native(run: Callable[..., Tensor], batch: Tensor, index: Tensor, lam: Tensor, *rest: Any) -> Tensor:
    """Run an operator of the CPU library; pass contiguous batches unchanged, because views cost microseconds."""
    order = None if batch.is_contiguous() else sample_order(batch)
    native = (batch if order is None else samples_of(batch, order), index.contiguous(), lam, *rest)
    result = _checks.explained(run, native, _checks.partners, index, lam, batch.shape[0])
    return result if order is None else in_shape_of(result, batch, order)


def _forward(input: Tensor, index: Tensor, lam: Tensor, dtype: torch.dtype) -> Tensor:
    name = backends.serving(input.device.type, dtype)
    if lam.dim() == 2:
        return _forward(*_by_patch(input, index, lam), dtype).unflatten(0, lam.shape)
    if name == "cpu":
        return _native(torch.ops.mixfeat_cpu.mixup.default, input, index, lam, dtype)
    order = sample_order(input)
    samples = samples_of(input, order)
    index = _checks.partners(index, lam, input.shape[0])
    if name == "triton":
        from mixfeat.kernels.triton.mixup import mixup as launch

        mixed = torch.empty(samples.shape, dtype=dtype, device=input.device)
        launch(samples, index, lam, mixed)
    else:
        mixed = fallback.mixup(samples, index, lam, dtype).contiguous()
    return in_shape_of(mixed, input, order)


def _backward(grad: Tensor, index: Tensor, lam: Tensor) -> Tensor:
    name = backends.serving(grad.device.type, grad.dtype)
    if lam.dim() == 2:
        return _backward(*_by_patch(grad, index, lam)).unflatten(0, lam.shape)
    if name == "cpu":
        return _native(torch.ops.mixfeat_cpu.mixup_backward.default, grad, index, lam)
    order = sample_order(grad)
    samples = samples_of(grad, order)
    index = _checks.partners(index, lam, grad.shape[0])
    if name == "triton":
        from mixfeat.kernels.triton.mixup import mixup_backward as launch

        input_grad = torch.empty(samples.shape, dtype=grad.dtype, device=grad.device)
        launch(samples, index, lam, input_grad)
    else:
        input_grad = fallback.mixup_backward(samples, index, lam).contiguous()
    return in_shape_of(input_grad, grad, order)


def empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an empty tensor of the shape and sample order of ``tensor``."""
    order = sample_order(tensor)
    return in_shape_of(tensor.new_empty([tensor.shape[d] for d in order], dtype=dtype), tensor, order)


def _result_like(tensor: Tensor, lam: Tensor, dtype: torch.dtype) -> Tensor:
    if lam.dim() == 2:
        return empty_like(tensor.flatten(0, 1), dtype).unflatten(0, lam.shape)
    return empty_like(tensor, dtype)


_mixup_backward = Operator(
    "mixup_backward(Tensor grad, Tensor index, Tensor lam) -> Tensor",
    forward=_backward,
    fake=lambda grad, index, lam: _result_like(grad, lam, grad.dtype),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *partners, _ = inputs
    ctx.save_for_backward(*partners)


def _fold(size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> Folded:
    """Fold a batch of inputs into each sample, or into each patch if patches have weights."""
    input, index, lam, dtype = args
    at = max(1, lam.dim())
    return (input.movedim(in_dims[0], at), index, lam, dtype), lambda mixed: mixed.movedim(at, 0)


_mixup = Operator(
    "mixup(Tensor input, Tensor index, Tensor lam, ScalarType dtype) -> Tensor",
    forward=_forward,
    fake=lambda input, index, lam, dtype: _result_like(input, lam, dtype),
    differentiable=("input",),
    setup_context=_setup_context,
    backward=lambda ctx, grad, needs: (_mixup_backward.outputs(grad, *ctx.saved_tensors),),
    recorded_backward=lambda ctx, grad, needs: (fallback.mixup_backward(grad, *ctx.saved_tensors),),
    definition=lambda input, index, lam, dtype: reference.mixup(input.to(lam.dtype), index, lam, dtype=dtype),
    foldable=("input",),
    fold=_fold,
)
