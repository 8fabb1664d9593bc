"""The public operators: each checks its arguments, then calls the operator of the same name in :mod:`mixfeat.ops`."""

from numbers import Real

import torch
from torch import Tensor

from mixfeat import ops
from mixfeat.activations import Activation

__all__ = ["patch_conv"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def patch_conv(
    input: Tensor,
    weight: Tensor,
    activation: Activation,
    *,
    index: Tensor | None = None,
    lam: float | Tensor | None = None,
) -> Tensor:
    r"""Logits of a 2-layer patch-wise convolutional network, of samples or of samples mixed with a partner each.

    Mixing, convolution, activation and the sum over patches and filters are one kernel; neither the mixed samples nor
    the pre-activations are stored::

        z_n    = lam_n x_n + (1 - lam_n) x_{index_n}
        g[n,c] = sum_{p,m} phi(<w[c,m], z[n,p]>)

    This is the network of Chidambaram et al., "Provably Learning Diverse Features in Multi-View Data with Midpoint
    Mixup" (ICML 2023): a hidden layer of C*M filters shared by P patches, and a second layer fixed to ones.

    Args:
        input: x, (N,P,D): N samples of P patches of dimension D; or (R,N,P,D), data of R networks. Any strides.
        weight: w, (C,M,D): M filters for each of C classes; or (R,C,M,D), R independent networks.
        activation: phi.
        index: partner of each sample, (N,) int64, any map into [0, N); the same for all R networks. Needs ``lam``.
        lam: weight of the sample itself; its partner has 1 - lam. A number in [0, 1], or a floating-point tensor of
            shape () or (N,), which must not require grad. Needs ``index``.

    Returns:
        g, (N,C), or (R,N,C) if input or weight has the run dimension; of input's dtype. Sums are formed in float32
        (float64 for float64). Under autocast input and weight are cast as they are for a convolution.

    Gradients flow to ``input`` and ``weight``; differentiating twice raises. float32 products follow
    ``torch.get_float32_matmul_precision()`` on CUDA.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, index without lam or lam without index, lam outside [0, 1].
        IndexError: an index outside [0, N) on a CPU. On CUDA, where it cannot be read without waiting for the device,
            it makes that sample's logits NaN.
    """
    if not isinstance(activation, Activation):
        raise TypeError(f"activation must be a mixfeat activation such as PolyReLU(8, 0.1), got {activation!r}")
    _check_tensor("input", input, "(N,P,D) or (R,N,P,D)")
    _check_tensor("weight", weight, "(C,M,D) or (R,C,M,D)")
    device = input.device
    if weight.device != device:
        raise ValueError(f"weight must be on input's device {device}, got {weight.device}")
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        input = input if input.dtype == torch.float64 else input.to(dtype)
        weight = weight if weight.dtype == torch.float64 else weight.to(dtype)
    if weight.dtype != input.dtype:
        raise TypeError(f"weight must have input's dtype {input.dtype}, got {weight.dtype}")
    if weight.shape[-1] != input.shape[-1]:
        raise ValueError(
            f"weight must have input's patch dimension D = {input.shape[-1]} last, got shape {tuple(weight.shape)}"
        )
    if input.dim() == 4 and weight.dim() == 4 and input.shape[0] != weight.shape[0]:
        raise ValueError(f"weight must have as many runs R as input, {input.shape[0]}, got {weight.shape[0]}")
    if index is not None or lam is not None:
        lam = _check_mixing(index, lam, input.shape[-3], input)
    return ops.patch_conv(input, weight, index, lam, activation.polynomial)


def _check_tensor(name: str, value: Tensor, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    if not 3 <= value.dim() <= 4:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")


def _check_mixing(index: Tensor | None, lam: float | Tensor | None, samples: int, input: Tensor) -> Tensor:
    """Check partners and their weights for ``samples`` samples; returns lam as kernels take it."""
    if index is None:
        raise ValueError(f"index is needed where lam is given (lam = {lam})")
    if lam is None:
        raise ValueError("lam is needed where index is given; lam = 0.5 is Midpoint Mixup")
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index must be an int64 tensor, got {got}")
    if index.shape != (samples,):
        raise ValueError(f"index must have shape ({samples},), one partner for each sample, got {tuple(index.shape)}")
    if index.device != input.device:
        raise ValueError(f"index must be on input's device {input.device}, got {index.device}")
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    if not isinstance(lam, Tensor):
        if isinstance(lam, bool) or not isinstance(lam, Real):
            raise TypeError(f"lam must be a number or a tensor, got {lam!r}")
        if not 0 <= lam <= 1:
            raise ValueError(f"lam must be in [0, 1], got {lam}")
        return torch.full((), float(lam), dtype=dtype, device=input.device)
    if not lam.is_floating_point():
        raise TypeError(f"lam must be a floating-point tensor, got {lam.dtype}")
    if lam.shape != () and lam.shape != (samples,):
        raise ValueError(f"lam must have shape () or ({samples},), got {tuple(lam.shape)}")
    if lam.device != input.device:
        raise ValueError(f"lam must be on input's device {input.device}, got {lam.device}")
    if lam.requires_grad:
        raise ValueError("lam must not require grad: gradients flow to input and weight only")
    return lam.to(dtype)
