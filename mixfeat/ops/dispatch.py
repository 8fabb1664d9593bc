"""What the operators share in how they are called."""

import torch
from torch import Tensor

__all__ = ["accumulation", "may_go_direct"]

_PLAIN = (Tensor, torch.nn.Parameter)


def may_go_direct(*tensors: Tensor) -> bool:
    """Whether nobody watches this call: no tracing, mode, functorch transform or tensor subclass.

    The way through the dispatcher then changes nothing, and costs a small problem more time than its kernel.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or any(type(tensor) not in _PLAIN for tensor in tensors)
    )


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are formed."""
    return torch.float64 if dtype == torch.float64 else torch.float32
