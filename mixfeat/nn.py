"""Modules over the functional operators."""

import torch
from torch import Tensor, nn

from mixfeat import functional, ops
from mixfeat.activations import Activation, PolyReLU

__all__ = ["PairwiseMixupLoss", "TwoLayerPatchCNN"]


class TwoLayerPatchCNN(nn.Module):
    """The 2-layer patch-wise convolutional network of Chidambaram et al. (ICML 2023), or R of them side by side::

        g[n,c] = sum_{p,m} phi(<w[c,m], x[n,p]>)

    A hidden layer of filters shared by all patches, a second layer fixed to ones, no bias.

    Args:
        num_classes: C. filters_per_class: M. patch_dim: D. All at least 1.
        activation: phi.
        num_runs: R independent networks, trained in one launch; None for a single one without the run dimension.
        init_std: weights start as N(0, init_std^2). Default: 0.7 rho for PolyReLU, at which signals of norm up to 1/2
            start at a fixed fraction of the threshold, so that gradients vanish at no degree; else 1/sqrt(D).
        generator: source of the initial weights.
        device, dtype: of the weights.

    Attributes:
        weight: (C,M,D), or (R,C,M,D).

    Raises:
        TypeError, ValueError: sizes that are not positive integers, an init_std that is not positive, no activation.
    """

    weight: nn.Parameter

    def __init__(
        self,
        num_classes: int,
        filters_per_class: int,
        patch_dim: int,
        activation: Activation,
        *,
        num_runs: int | None = None,
        init_std: float | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_classes": num_classes, "filters_per_class": filters_per_class, "patch_dim": patch_dim}
        for name, size in (sizes if num_runs is None else {"num_runs": num_runs, **sizes}).items():
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name} must be an integer, got {size!r}")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not isinstance(activation, Activation):
            raise TypeError(f"activation must be a mixfeat activation such as PolyReLU(8, 0.1), got {activation!r}")
        if init_std is None:
            init_std = 0.7 * activation.rho if isinstance(activation, PolyReLU) else patch_dim**-0.5
        if not 0 < init_std < float("inf"):
            raise ValueError(f"init_std must be finite and positive, got {init_std}")
        self.activation = activation
        self.init_std = float(init_std)
        shape = (num_classes, filters_per_class, patch_dim)
        self.weight = nn.Parameter(
            torch.empty(shape if num_runs is None else (num_runs, *shape), device=device, dtype=dtype)
        )
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew."""
        nn.init.normal_(self.weight, std=self.init_std, generator=generator)

    def forward(self, input: Tensor, index: Tensor | None = None, lam: float | Tensor | None = None) -> Tensor:
        """Logits (N,C) or (R,N,C) of ``input``, mixed if ``index`` and ``lam`` say so (:func:`mixfeat.patch_conv`)."""
        return functional.patch_conv(input, self.weight, self.activation, index=index, lam=lam)

    def extra_repr(self) -> str:
        *runs, num_classes, filters_per_class, patch_dim = self.weight.shape
        text = f"{num_classes}, {filters_per_class}, {patch_dim}, {self.activation}"
        return f"{text}, num_runs={runs[0]}" if runs else text


class PairwiseMixupLoss(nn.Module):
    """The Mixup objective over all ordered pairs of samples (:func:`mixfeat.pairwise_mixup_loss`) of a patch network.

    Args:
        lam: 0.5 (Midpoint Mixup), another number in [0, 1], or (K,) nodes, such as those of
            :func:`mixfeat.beta_quadrature`.
        lam_weight: (K,) weights of the nodes. Both stay on the CPU wherever the module goes.

    Raises:
        TypeError, ValueError: as :func:`mixfeat.pairwise_mixup_loss` does, for lam and lam_weight.
    """

    def __init__(self, lam: float | Tensor = 0.5, lam_weight: Tensor | None = None) -> None:
        super().__init__()
        nodes, weights = functional._check_nodes(lam, lam_weight)
        ops.check_nodes(nodes, weights)
        self.lam, self.lam_weight = nodes.clone(), weights.clone()

    def forward(self, model: nn.Module, input: Tensor, target: Tensor) -> Tensor:
        """The loss, () or (R,), of a network with ``weight`` and ``activation`` such as :class:`TwoLayerPatchCNN`.

        Raises:
            TypeError: a model without a weight and an activation.
        """
        weight, activation = getattr(model, "weight", None), getattr(model, "activation", None)
        if not isinstance(weight, Tensor) or not isinstance(activation, Activation):
            raise TypeError(f"model must be a TwoLayerPatchCNN, or have its weight and activation, got {model!r}")
        return functional.pairwise_mixup_loss(
            input, weight, target, activation, lam=self.lam, lam_weight=self.lam_weight
        )

    def extra_repr(self) -> str:
        return f"lam={self.lam.tolist()}, lam_weight={self.lam_weight.tolist()}"
