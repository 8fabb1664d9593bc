"""``torch.ops.mixfeat.mixup``: each sample of a batch interpolated with a partner, and its backward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixfeat import backends, reference
from mixfeat.ops.dispatch import check_partners, may_go_direct, refuse_tangents

__all__ = ["mixup"]

torch.library.define(
    "mixfeat::mixup",
    "(Tensor input, Tensor index, Tensor lam, ScalarType dtype) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "mixfeat::mixup_backward",
    "(Tensor grad, Tensor index, Tensor lam) -> Tensor",
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


def _samples(tensor: Tensor, order: list[int]) -> Tensor:
    """(N,K), a view where each sample is one run of memory in this order, else a copy."""
    samples = tensor.permute(order).flatten(1) if tensor.dim() > 1 else tensor[:, None]
    return samples if samples.stride(1) == 1 else samples.contiguous()


def _shaped(samples: Tensor, tensor: Tensor, order: list[int]) -> Tensor:
    """The inverse: (N,K), samples in this order, in the shape of ``tensor``."""
    shaped = samples.view([tensor.shape[d] for d in order])
    return shaped.permute([order.index(d) for d in range(tensor.dim())])


def _forward(input: Tensor, index: Tensor, lam: Tensor, dtype: torch.dtype) -> Tensor:
    name = backends.serving(input.device.type, dtype)
    index, lam = check_partners(index, lam, input.shape[0], name)
    order = _sample_order(input)
    samples = _samples(input, order)
    if name == "cpu":
        mixed = torch.ops.mixfeat_cpu.mixup.default(samples, index, lam, dtype)
    elif name == "triton":
        from mixfeat.kernels.triton.mixup import mixup as launch

        mixed = torch.empty(samples.shape, dtype=dtype, device=input.device)
        launch(samples, index, lam, mixed)
    else:
        mixed = reference.mixup(samples.to(lam.dtype), index, lam, dtype=dtype).contiguous()
    return _shaped(mixed, input, order)


def _backward(grad: Tensor, index: Tensor, lam: Tensor) -> Tensor:
    name = backends.serving(grad.device.type, grad.dtype)
    index, lam = check_partners(index, lam, grad.shape[0], name)
    order = _sample_order(grad)
    samples = _samples(grad, order)
    if name == "cpu":
        input_grad = torch.ops.mixfeat_cpu.mixup_backward.default(samples, index, lam)
    elif name == "triton":
        from mixfeat.kernels.triton.mixup import mixup_backward as launch

        input_grad = torch.empty(samples.shape, dtype=grad.dtype, device=grad.device)
        launch(samples, index, lam, input_grad)
    else:
        input_grad = reference.mixup_backward(samples.to(lam.dtype), index, lam).to(grad.dtype).contiguous()
    return _shaped(input_grad, grad, order)


class _Mixup(torch.autograd.Function):
    """The operator's derivative; ``forward`` and ``backward`` are the operators, or directly what they would call."""

    @staticmethod
    def forward(
        ctx: Any, forward: Any, backward: Any, input: Tensor, index: Tensor, lam: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(index, lam)
        ctx.backward = backward
        ctx.chosen = backends.chosen()
        with torch._C._AutoDispatchBelowAutograd():
            return forward(input, index, lam, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with backends.as_chosen(ctx.chosen):
            return None, None, ctx.backward(grad, *ctx.saved_tensors), None, None, None


# Function.apply without what it does for functorch's transforms
_apply = super(torch.autograd.Function, _Mixup).apply


def _autograd(input: Tensor, index: Tensor, lam: Tensor, dtype: torch.dtype) -> Tensor:
    refuse_tangents("mixup", input, lam)
    if torch.is_grad_enabled() and input.requires_grad:
        return _Mixup.apply(_op, _backward_op, input, index, lam, dtype)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(input, index, lam, dtype)


torch.library.impl("mixfeat::mixup", "Autograd", _autograd)
torch.library.impl("mixfeat::mixup", "CompositeExplicitAutograd", _forward)
torch.library.impl("mixfeat::mixup_backward", "CompositeExplicitAutograd", _backward)


@torch.library.register_fake("mixfeat::mixup")
def _(input: Tensor, index: Tensor, lam: Tensor, dtype: torch.dtype) -> Tensor:
    return _like(input, dtype)


@torch.library.register_fake("mixfeat::mixup_backward")
def _(grad: Tensor, index: Tensor, lam: Tensor) -> Tensor:
    return _like(grad, grad.dtype)


def _like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    order = _sample_order(tensor)
    return _shaped(tensor.new_empty([tensor.shape[d] for d in order], dtype=dtype), tensor, order)
