"""Modules over the functional operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from mixfeat import _checks, functional
from mixfeat.activations import Activation, PolyReLU

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # not there in every build of PyTorch

__all__ = ["Mixup", "MixupCrossEntropyLoss", "PairwiseMixupLoss", "TwoLayerPatchCNN"]


class TwoLayerPatchCNN(nn.Module):
    """The 2-layer patch-wise convolutional network of Chidambaram et al. (ICML 2023), or R of them side by side::

        g[n,c] = sum_{p,m} phi(<w[c,m], x[n,p]>)

    A hidden layer of filters shared by all patches, a second layer fixed to ones, no bias.

    Args:
        num_classes: C, at least 1.
        filters_per_class: M, at least 1.
        patch_dim: D, at least 1.
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
        if num_runs is not None:
            sizes = {"num_runs": num_runs, **sizes}
        shape = [_checks.integer(name, size, 1) for name, size in sizes.items()]
        _checks.activation(activation)
        if init_std is None:
            init_std = 0.7 * activation.rho if isinstance(activation, PolyReLU) else shape[-1] ** -0.5
        self.activation = activation
        self.init_std = _checks.positive("init_std", init_std)
        _checks.generator(generator)
        if dtype is not None:
            _checks.float_dtype("dtype", dtype)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
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
        group: ranks of torch.distributed among which the samples are spread, "world" for all processes. Gradients are
            such that DistributedDataParallel around a module that calls this one gives the right step.

    Raises:
        TypeError, ValueError: as :func:`mixfeat.pairwise_mixup_loss` does, for lam and lam_weight.
    """

    def __init__(
        self,
        lam: float | Tensor = 0.5,
        lam_weight: Tensor | None = None,
        *,
        group: ProcessGroup | Literal["world"] | None = None,
    ) -> None:
        super().__init__()
        nodes, weights = _checks.nodes(lam, lam_weight)
        _checks.node_values(nodes, weights)
        self.lam, self.lam_weight, self.group = nodes.clone(), weights.clone(), group

    def forward(self, model: nn.Module, input: Tensor, target: Tensor) -> Tensor:
        """The loss, () or (R,), of a network with ``weight`` and ``activation`` such as :class:`TwoLayerPatchCNN`.

        Raises:
            TypeError: a model without a weight and an activation.
        """
        weight, activation = getattr(model, "weight", None), getattr(model, "activation", None)
        if not isinstance(weight, Tensor) or not isinstance(activation, Activation):
            wraps = isinstance(getattr(model, "module", None), nn.Module)
            hint = ", which wraps a model: pass its .module, or wrap a module that calls this loss" if wraps else ""
            raise TypeError(
                "model must be a TwoLayerPatchCNN, or have its weight and activation, got a "
                f"{type(model).__name__}{hint}"
            )
        return functional.pairwise_mixup_loss(
            input, weight, target, activation, lam=self.lam, lam_weight=self.lam_weight, group=self.group
        )

    def extra_repr(self) -> str:
        return f"lam={self.lam.tolist()}, lam_weight={self.lam_weight.tolist()}"


class Mixup(nn.Module):
    """Mix each sample of a batch with a randomly drawn partner (:func:`mixfeat.sample_mixup`, :func:`mixfeat.mixup`).

    Partner and lam are drawn on the batch's device. In eval mode nothing is mixed, and lam is 1; the
    dtype is the same.

    Args:
        alpha: lam ~ Beta(alpha, alpha), alpha > 0.
        lam: this number in [0, 1] instead of a draw; 0.5 is Midpoint Mixup.
        per_sample: a lam for each sample instead of one for all.
        num_classes: C; if given, targets are returned dense.
        generator: source of all randomness.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it needs.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        lam: float | None = None,
        per_sample: bool = False,
        num_classes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.alpha, self.lam = _checks.sampling(alpha, lam, generator)
        self.num_classes = None if num_classes is None else _checks.integer("num_classes", num_classes, 1)
        self.per_sample, self.generator = per_sample, generator

    def forward(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor, Tensor]]:
        """Mix a batch.

        Args:
            input: (N, ...), as :func:`mixfeat.mixup` takes it.
            target: classes, (N,) int64.

        Returns:
            (mixed, (target_a, target_b, lam)), the classes of each sample and of its partner and the sample's weight,
            for :class:`MixupCrossEntropyLoss`; with ``num_classes`` (mixed, target), the latter (N,C) float32, of which
            a target outside [0, C) gives nothing.

        Raises:
            TypeError, ValueError: as :func:`mixfeat.mixup`, and for a target of the wrong type, shape or device.
        """
        _checks.tensor("input", input)
        _checks.classes("target", target, input.shape[:1], input.device)
        if self.training:
            index, lam = functional.sample_mixup(
                len(input), self.alpha, lam=self.lam, per_sample=self.per_sample, generator=self.generator,
                device=input.device,
            )  # fmt: skip
            mixed, partner = functional.mixup(input, index, lam), target[index]
        else:
            mixed, partner = input.to(functional.mixed_dtype(input)), target
            lam = torch.ones((), dtype=torch.float32, device=input.device)
        if self.num_classes is None:
            return mixed, (target, partner, lam)
        classes = torch.arange(self.num_classes, device=input.device)
        a, b = ((labels[:, None] == classes).float() for labels in (target, partner))
        return mixed, torch.lerp(b, a, lam.view(-1, 1))

    def extra_repr(self) -> str:
        text = f"alpha={self.alpha}" if self.lam is None else f"lam={self.lam}"
        text += ", per_sample=True" if self.per_sample else ""
        return text if self.num_classes is None else f"{text}, num_classes={self.num_classes}"


class MixupCrossEntropyLoss(nn.Module):
    """Cross-entropy of the logits of mixed samples with the labels of both (:func:`mixfeat.mixup_cross_entropy`).

    Args:
        label_smoothing: in [0, 1].
        ignore_index: a target that does not count.
        reduction: "mean", "sum" or "none".

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it needs.
    """

    def __init__(self, label_smoothing: float = 0.0, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__()
        options = _checks.loss_options(label_smoothing, ignore_index, reduction)
        self.label_smoothing, self.ignore_index, self.reduction = options

    def forward(self, logits: Tensor, target: tuple[Tensor, Tensor, float | Tensor]) -> Tensor:
        """The loss of ``logits`` (N,C); ``target`` is (target_a, target_b, lam) as :class:`Mixup` returns it.

        Raises:
            TypeError: a target that is no such triple.
        """
        if not isinstance(target, tuple | list) or len(target) != 3:
            got = f"{len(target)} entries" if isinstance(target, tuple | list) else type(target).__name__
            raise TypeError(f"target must be (target_a, target_b, lam), as Mixup returns it, got {got}")
        target_a, target_b, lam = target
        return functional.mixup_cross_entropy(
            logits, target_a, target_b, lam,
            label_smoothing=self.label_smoothing, ignore_index=self.ignore_index, reduction=self.reduction,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"
