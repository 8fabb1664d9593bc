"""What the operators share in how they are called."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["accumulation", "check_lam", "check_partners", "may_go_direct", "refuse_tangents", "refuse_twice"]

_PLAIN = (Tensor, torch.nn.Parameter)


def may_go_direct(*tensors: Tensor) -> bool:
    """Whether nobody watches this call: no tracing, mode, functorch transform, dual numbers or tensor subclass.

    The way through the dispatcher then changes nothing, and costs a small problem more time than its kernel.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or any(type(tensor) not in _PLAIN for tensor in tensors)
    )


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are formed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_partners(index: Tensor, lam: Tensor, samples: int, backend: str) -> tuple[Tensor, Tensor]:
    """Refuse partners and weights out of range where they can be read without waiting; elsewhere let them give NaN."""
    if index.device.type == "cpu":
        check_lam(lam)
        if index.numel():
            low, high = (int(bound) for bound in index.aminmax())
            if low < 0 or high >= samples:
                raise IndexError(f"index must lie in [0, {samples}), got {low if low < 0 else high}")
        return index.contiguous(), lam
    if backend == "triton":
        return index, lam  # its kernels see to it
    valid = (index >= 0) & (index < samples)
    return index.where(valid, 0), lam.where(valid, torch.nan)


def check_lam(lam: Tensor) -> None:
    """Refuse weights outside [0, 1], NaN among them, on a CPU."""
    if lam.device.type == "cpu" and lam.numel():
        low, high = (float(bound) for bound in lam.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"lam must be in [0, 1], got {low if not low >= 0 else high}")


def refuse_tangents(name: str, *arguments: Any) -> None:
    """Forward-mode derivatives raise: an operator that knows none would drop them, and the result pass for constant."""
    if forward_ad._current_level >= 0 and any(
        isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None for argument in arguments
    ):
        raise NotImplementedError(f"{name} has no forward-mode derivative (jvp, jacfwd): differentiate it backward")


def refuse_twice(name: str, grad: Tensor) -> Tensor:
    """A gradient that was formed in forward: differentiating it raises, instead of taking it for a constant."""
    return _Refuse.apply(name, grad.detach().requires_grad_()) if torch.is_grad_enabled() else grad


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, grad: Tensor) -> Tensor:
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(f"{ctx.name} cannot be differentiated twice: its gradient has no derivative")
