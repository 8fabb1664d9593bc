"""The operators in plain PyTorch: the definition that every kernel is held to, for any dtype and device.

Differentiable by autograd, readable as the formulas they stand for, and without any check of their arguments: those are
:mod:`mixfeat.functional`'s.
"""

import torch
from torch import Tensor

from mixfeat.activations import Activation, Polynomial

__all__ = ["mixup", "patch_conv"]


def mixup(input: Tensor, index: Tensor, lam: float | Tensor, dim: int = 0) -> Tensor:
    """``lam_n x_n + (1 - lam_n) x_{index_n}``, samples n along ``dim``; ``lam`` a float, () or (N,)."""
    if isinstance(lam, Tensor):
        lam = lam.to(input.dtype)
        if lam.dim() == 1:
            lam = lam.view(-1, *[1] * (input.dim() - dim % input.dim() - 1))
    return lam * input + (1 - lam) * input.index_select(dim, index)


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
