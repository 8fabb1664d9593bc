"""``torch.ops.mixfeat.mixup``: each sample of a batch interpolated with a partner, and its backward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixfeat import backends, reference
from mixfeat.ops.dispatch import check_partners, may_go_direct

__all__ = ["mixup"]

torch.library.define(
    "mixfeat::mixup",
    "(Tensor input, Tensor index, Tensor lam, ScalarType dtype) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "mixfeat::mixup_backward",
    "(Tensor grad, Tensor index, Tensor lam, ScalarType dtype) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_op = torch.ops.mixfeat.mixup.default
_backward_op = torch.ops.mixfeat.mixup_backward.default


def mixup(input: Tensor, index: Tensor, lam: Tensor, dtype: torch.dtype) -> Tensor:
    """The mixed samples, by ``torch.ops.mixfeat.mixup`` where somebody watches, else by what it would call."""
    if not may_go_direct(input):
        return _op(input, index, lam, dtype)
    if torch.is_grad_enabled() and input.requires_grad:
        return _apply(_forward, _backward, input, index, lam, dtype)
    return _forward(input, index, lam, dtype)


def _sample_order(tensor: Tensor) -> list[int]:
    """The dimensions, in the order in which each sample is one run of memory; as they are if there is none."""
    strides = tensor.stride()
    order = sorted(range(1, tensor.dim()), key=lambda d: -strides[d])
    expected = 1
    for d in reversed(order):
        if tensor.shape[d] != 1:
            if strides[d] != expected:
                return list(range(tensor.dim()))
            expected *= tensor.shape[d]
    return [0, *order]


def _empty(tensor: Tensor, order: list[int], dtype: torch.dtype) -> Tensor:
    """Memory for a tensor of this shape, one sample after the other, each with its dimensions in this order."""
    empty = tensor.new_empty([tensor.shape[d] for d in order], dtype=dtype)
    return empty.permute([order.index(d) for d in range(tensor.dim())])


def _rows(tensor: Tensor, order: list[int]) -> Tensor:
    """(N,K), a view where each sample is one run of memory in this order, else a copy."""
    return tensor.permute(order).flatten(1) if tensor.dim() > 1 else tensor[:, None]


def _forward(input: Tensor, index: Tensor, lam: Tensor, dtype: torch.dtype) -> Tensor:
    name = backends.serving(input.device.type, dtype)
    index, lam = check_partners(index, lam, input.shape[0], name)
    order = _sample_order(input)
    output = _empty(input, order, dtype)
    if output.numel():
        rows, output_rows = _rows(input, order), _rows(output, order)
        if name == "triton":
            from mixfeat.kernels.triton.mixup import mixup as launch

            launch(rows, index, lam, output_rows)
        else:
            output_rows.copy_(reference.mixup(rows, index, lam, dtype=dtype))
    return output


def _backward(grad: Tensor, index: Tensor, lam: Tensor, dtype: torch.dtype) -> Tensor:
    name = backends.serving(grad.device.type, grad.dtype)
    index, lam = check_partners(index, lam, grad.shape[0], name)
    order = _sample_order(grad)
    input_grad = _empty(grad, order, grad.dtype)
    if input_grad.numel():
        rows, input_rows = _rows(grad, order), _rows(input_grad, order)
        if name == "triton":
            from mixfeat.kernels.triton.mixup import mixup_backward as launch

            launch(rows, index, lam, input_rows)
        else:
            input_rows.copy_(reference.mixup_backward(rows.to(lam.dtype), index, lam))
    return input_grad.to(dtype)


class _Mixup(torch.autograd.Function):
    """The operator's derivative; ``forward`` and ``backward`` are the operators, or directly what they would call."""

    @staticmethod
    def forward(
        ctx: Any, forward: Any, backward: Any, input: Tensor, index: Tensor, lam: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(index, lam)
        ctx.backward, ctx.dtype = backward, input.dtype
        with torch._C._AutoDispatchBelowAutograd():
            return forward(input, index, lam, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, ctx.backward(grad, *ctx.saved_tensors, ctx.dtype), None, None, None


# Function.apply without what it does for functorch's transforms
_apply = super(torch.autograd.Function, _Mixup).apply


def _autograd(input: Tensor, index: Tensor, lam: Tensor, dtype: torch.dtype) -> Tensor:
    if torch.is_grad_enabled() and input.requires_grad:
        return _Mixup.apply(_op, _backward_op, input, index, lam, dtype)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(input, index, lam, dtype)


torch.library.impl("mixfeat::mixup", "Autograd", _autograd)
torch.library.impl("mixfeat::mixup", "CompositeExplicitAutograd", _forward)
torch.library.impl("mixfeat::mixup_backward", "CompositeExplicitAutograd", _backward)


@torch.library.register_fake("mixfeat::mixup")
@torch.library.register_fake("mixfeat::mixup_backward")
def _(tensor: Tensor, index: Tensor, lam: Tensor, dtype: torch.dtype) -> Tensor:
    return _empty(tensor, _sample_order(tensor), dtype)
