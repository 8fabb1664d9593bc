"""The operators in plain PyTorch: the definition that every kernel is held to, for any dtype and device.

Differentiable by autograd, readable as the formulas they stand for, and without any check of their arguments: those are
:mod:`mixfeat.functional`'s.
"""

import torch
from torch import Tensor

from mixfeat.activations import Activation, Polynomial

__all__ = ["mixup", "patch_conv", "patch_conv_backward"]


def mixup(input: Tensor, index: Tensor, lam: float | Tensor, dim: int = 0) -> Tensor:
    """``lam_n x_n + (1 - lam_n) x_{index_n}``, samples n along ``dim``; ``lam`` a float, () or (N,).

    A tensor ``lam`` is not rounded to a half-precision input's dtype; the mixed samples are.
    """
    if isinstance(lam, Tensor):
        lam = lam.view(-1, *[1] * (input.dim() - dim % input.dim() - 1))
    return (lam * input + (1 - lam) * input.index_select(dim, index)).to(input.dtype)


def patch_conv(
    input: Tensor,
    weight: Tensor,
    activation: Activation | Polynomial,
    *,
    index: Tensor | None = None,
    lam: float | Tensor | None = None,
) -> Tensor:
    """Logits of the 2-layer patch-wise network: mix, convolve, activate, sum over patches and filters::

        z_n = lam_n x_n + (1 - lam_n) x_{index_n}
        g[n,c] = sum_{p,m} phi(<w[c,m], z[n,p]>)

    ``input`` (N,P,D) or (R,N,P,D), ``weight`` (C,M,D) or (R,C,M,D); result (N,C) or (R,N,C).
    """
    if index is not None:
        assert lam is not None
        input = mixup(input, index, lam, dim=-3)
    s = torch.einsum("...npd,...cmd->...npcm", input, weight)
    return activation(s).sum(dim=(-3, -1))


def patch_conv_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    activation: Polynomial,
    *,
    index: Tensor | None = None,
    lam: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`patch_conv` to input and weight, given ``grad`` = dL/dg, as formulas::

    E[n,p,c,m]  = dL/dg[n,c] phi'(s[n,p,c,m])
    dL/dw[c,m]  = sum_{n,p} E[n,p,c,m] z[n,p]
    dL/dz[n,p]  = sum_{c,m} E[n,p,c,m] w[c,m]
    dL/dx_i     = lam_i dL/dz_i + sum_{n: index_n = i} (1 - lam_n) dL/dz_n
    """
    z = input if index is None or lam is None else mixup(input, index, lam, dim=-3)
    s = torch.einsum("...npd,...cmd->...npcm", z, weight)
    e = grad[..., :, None, :, None] * activation.derivative(s)
    weight_grad = torch.einsum("...npcm,...npd->...cmd", e, z).sum_to_size(weight.shape)
    input_grad = torch.einsum("...npcm,...cmd->...npd", e, weight).sum_to_size(input.shape)
    if index is not None and lam is not None:
        lam = lam.to(input.dtype).view(-1, 1, 1)
        input_grad = (lam * input_grad).index_add(-3, index, (1 - lam) * input_grad)
    return input_grad, weight_grad
