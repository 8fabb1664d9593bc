"""Modules over the functional operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from mixfeat import _checks, functional
from mixfeat.activations import Activation, PolyReLU

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # missing in some builds of PyTorch

__all__ = ["Mixup", "MixupCrossEntropyLoss", "PairwiseMixupLoss", "TwoLayerPatchCNN"]


class TwoLayerPatchCNN(nn.Module):
    """The 2-layer patch-wise convolutional network of Chidambaram et al. (ICML 2023), or R of them side by side::

        g[n,c] = sum_{p,m} phi(<w[c,m], x[n,p]>)

    All patches share the filters of the hidden layer. The second layer is fixed to ones, without bias; ``readout``
    replaces it, fixed or trained.

    Args:
        num_classes: C, at least 1.
        filters_per_class: M, at least 1.
        patch_dim: D, at least 1.
        activation: phi.
        num_runs: R independent networks, trained together; None for a single one without the run dimension.
        init_std: standard deviation of the initial weights, N(0, init_std^2). The default is 0.7 rho for PolyReLU,
            where signals of norm up to 1/2 start at a fixed fraction of the threshold, so gradients vanish at no
            degree; else 1/sqrt(D).
        readout: the second layer, (C,M) or (R,C,M): a tensor, which is copied and fixed, or an ``nn.Parameter``, which
            becomes a parameter of this module and is trained; None for ones.
        generator: source of the initial weights.
        device, dtype: device and dtype of the weights.

    Attributes:
        weight: (C,M,D), or (R,C,M,D).
        readout: the second layer, or None.

    Raises:
        TypeError, ValueError: a size that is not a positive integer, an init_std that is not positive, an activation
            that is not one, a readout of the wrong shape or dtype.
    """

    weight: nn.Parameter
    readout: Tensor | None

    def __init__(
        self,
        num_classes: int,
        filters_per_class: int,
        patch_dim: int,
        activation: Activation,
        *,
        num_runs: int | None = None,
        init_std: float | None = None,
        readout: Tensor | None = None,
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
        if isinstance(readout, nn.Parameter):
            _checks.readout(readout, self.weight)
            self.readout = readout
        else:
            fixed = None if readout is None else _checks.readout(readout, self.weight).detach().clone()
            self.register_buffer("readout", fixed)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights."""
        nn.init.normal_(self.weight, std=self.init_std, generator=generator)

    def forward(self, input: Tensor, index: Tensor | None = None, lam: float | Tensor | None = None) -> Tensor:
        """Return the logits (N,C) or (R,N,C), of mixed samples if ``index`` is given (:func:`mixfeat.patch_conv`)."""
        return functional.patch_conv(input, self.weight, self.activation, index=index, lam=lam, readout=self.readout)

    def extra_repr(self) -> str:
        *runs, num_classes, filters_per_class, patch_dim = self.weight.shape
        text = f"{num_classes}, {filters_per_class}, {patch_dim}, {self.activation}"
        return f"{text}, num_runs={runs[0]}" if runs else text


class PairwiseMixupLoss(nn.Module):
    """The Mixup objective over all ordered pairs of samples (:func:`mixfeat.pairwise_mixup_loss`) of a patch network.

    Args:
        lam: 0.5 (Midpoint Mixup), another number in [0, 1], or (K,) nodes, such as those of
            :func:`mixfeat.beta_quadrature`.
        lam_weight: (K,) weights of the nodes. Nodes and weights stay on the CPU when the module moves.
        label_lam, label_smoothing, pairs: as :func:`mixfeat.pairwise_mixup_loss` takes them.
        group: process group of torch.distributed over which the samples are sharded; "world" for all processes.
            DistributedDataParallel around a module that calls this one takes the correct step.

    Raises:
        TypeError, ValueError: an invalid option, as :func:`mixfeat.pairwise_mixup_loss` raises it.
    """

    def __init__(
        self,
        lam: float | Tensor = 0.5,
        lam_weight: Tensor | None = None,
        *,
        label_lam: float | Tensor | None = None,
        label_smoothing: float = 0.0,
        pairs: str = "all",
        group: ProcessGroup | Literal["world"] | None = None,
    ) -> None:
        super().__init__()
        nodes, weights = _checks.nodes(lam, lam_weight)
        _checks.node_values(nodes, weights)
        self.lam, self.lam_weight, self.group = nodes.clone(), weights.clone(), group
        self.label_lam, self.label_smoothing, self.pairs = _checks.labels(label_lam, label_smoothing, pairs, nodes)

    def forward(self, model: nn.Module, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss, () or (R,), of a model with ``weight`` and ``activation``, such as a TwoLayerPatchCNN.

        Raises:
            TypeError: a model without a weight or an activation.
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
            input, weight, target, activation, lam=self.lam, lam_weight=self.lam_weight, label_lam=self.label_lam,
            label_smoothing=self.label_smoothing, pairs=self.pairs, readout=getattr(model, "readout", None),
            group=self.group,
        )  # fmt: skip

    def extra_repr(self) -> str:
        text = f"lam={self.lam.tolist()}, lam_weight={self.lam_weight.tolist()}"
        text += "" if self.label_lam is None else f", label_lam={self.label_lam.tolist()}"
        text += f", label_smoothing={self.label_smoothing}" if self.label_smoothing else ""
        return text + (f", pairs={self.pairs!r}" if self.pairs != "all" else "")


class Mixup(nn.Module):
    """Mix each sample of a batch with a randomly drawn partner: Mixup, CutMix, or a random choice of the two.

    :func:`mixfeat.sample_mixup` or :func:`mixfeat.sample_cutmix` draws, and :func:`mixfeat.mixup` or
    :func:`mixfeat.cutmix` mixes. Draws are made on the batch's device, without waiting for it. In eval mode nothing is
    mixed and lam is 1; the dtype is that of training.

    Args:
        alpha: parameter of Mixup's lam ~ Beta(alpha, alpha), > 0; None for CutMix alone.
        lam: a number in [0, 1] that replaces the draw; 0.5 is Midpoint Mixup.
        per_sample: the same as ``mode="elem"``.
        cutmix_alpha: parameter of CutMix, > 0; None for Mixup alone. It takes images only, (N,ch,H,W).
        prob: probability that a batch is mixed, or in the other modes a sample or a pair.
        switch_prob: probability of CutMix where both are on.
        mode: "batch" draws one lam or box for all samples, "elem" one for each sample, "pair" one for each pair of
            samples that are mixed with each other (with odd N one sample is its own partner).
        label_smoothing: smoothing of dense targets, in [0, 1]; without ``num_classes`` the loss smooths.
        num_classes: C; if given, classes are returned as dense targets.
        generator: source of all randomness. Each worker of a DataLoader draws from its own copy, which is seeded
            differently in each worker and each epoch.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it, the value and the requirement.
    """

    def __init__(
        self,
        alpha: float | None = 1.0,
        *,
        lam: float | None = None,
        per_sample: bool = False,
        cutmix_alpha: float | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: Literal["batch", "elem", "pair"] = "batch",
        label_smoothing: float = 0.0,
        num_classes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if alpha is None and cutmix_alpha is None:
            raise ValueError("alpha is needed where cutmix_alpha is None: neither Mixup nor CutMix would be on")
        self.mixes = alpha is not None
        self.alpha, self.lam = _checks.sampling(1.0 if alpha is None else alpha, lam, generator)
        if lam is not None and cutmix_alpha is not None:
            raise ValueError("lam must be None where cutmix_alpha is given: a box's size is drawn")
        self.cutmix_alpha = None if cutmix_alpha is None else _checks.positive("cutmix_alpha", cutmix_alpha)
        self.prob, self.switch_prob = _checks.fraction("prob", prob), _checks.fraction("switch_prob", switch_prob)
        if mode not in ("batch", "elem", "pair"):
            raise ValueError(f'mode must be "batch", "elem" or "pair", got {mode!r}')
        if per_sample and mode == "pair":
            raise ValueError('per_sample is mode="elem", got mode="pair"')
        self.mode = "elem" if per_sample else mode
        self.num_classes = None if num_classes is None else _checks.integer("num_classes", num_classes, 1)
        self.label_smoothing = _checks.fraction("label_smoothing", label_smoothing)
        if self.label_smoothing and num_classes is None:
            raise ValueError("label_smoothing needs num_classes: targets that stay classes are smoothed by the loss")
        self.generator = generator
        self._worker: int | None = None  # seed of the data loader's worker that the generator has been seeded for

    def forward(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor, Tensor]]:
        """Mix a batch.

        Args:
            input: (N, ...), as :func:`mixfeat.mixup` takes it; with CutMix images (N,ch,H,W).
            target: classes, int64: (N,), or (N, ...) with a class at each position; or floating: (N,C) probabilities,
                one-hot or multi-label, or (N,C,H,W). A target as large as the images is cut and pasted with them.

        Returns:
            (mixed, (target_a, target_b, lam)) for classes: each sample's class, its partner's, and the sample's weight,
            for :class:`MixupCrossEntropyLoss`. With ``num_classes`` (mixed, target), target (N,C,...) float32; a class
            outside [0, C) adds 0 to it. For a floating target (mixed, target), mixed in the same way.

        Raises:
            TypeError, ValueError: an argument that :func:`mixfeat.mixup` or :func:`mixfeat.cutmix` refuses, or a target
                of the wrong type, shape or device.
        """
        _checks.tensor("input", input)
        _checks.any_target("target", target, input.shape[0], input.device)
        if not self.training:
            lam = torch.ones((), dtype=torch.float32, device=input.device)
            return input.to(functional.mixed_dtype(input)), self._labels(target, target, lam)
        generator = self._own_generator()
        cuts = self.cutmix_alpha is not None
        if not (self.mixes and cuts):
            return self._cut(input, target, generator) if cuts else self._mix(input, target, generator)
        if self.mode == "batch" and not torch.compiler.is_compiling():  # one draw on the host, and one pass over memory
            host = generator if generator is None or generator.device.type == "cpu" else None
            if torch.rand((), generator=host, device="cpu").item() < self.switch_prob:
                return self._cut(input, target, generator)
            return self._mix(input, target, generator)
        (cut, cut_target), (mixed, mixed_target) = (f(input, target, generator) for f in (self._cut, self._mix))
        chosen = self._draw(len(input), input.device, generator) < self.switch_prob

        def choose(a: Tensor, b: Tensor) -> Tensor:
            shape = (-1, *[1] * (max(a.dim(), b.dim()) - 1)) if chosen.dim() else ()
            return torch.where(chosen.view(shape), a, b)

        if isinstance(cut_target, Tensor) and isinstance(mixed_target, Tensor):
            return choose(cut, mixed), choose(cut_target, mixed_target)
        return choose(cut, mixed), tuple(map(choose, cut_target, mixed_target))  # type: ignore[return-value]

    def _mix(
        self, input: Tensor, target: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor, Tensor]]:
        index, lam = functional.sample_mixup(
            len(input), self.alpha, lam=self.lam, per_sample=self.mode != "batch", generator=generator,
            device=input.device,
        )  # fmt: skip
        index, (lam,) = self._paired(index, lam)
        lam = lam.where(self._kept(len(input), index, input.device, generator), 1.0) if self.prob < 1 else lam
        mixed = functional.mixup(input, index, lam)
        if target.is_floating_point():
            return mixed, functional.mixup(target, index, lam)
        return mixed, self._labels(target, target[index], lam)

    def _cut(
        self, input: Tensor, target: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor, Tensor]]:
        assert self.cutmix_alpha is not None
        index, box, lam = functional.sample_cutmix(
            input.shape, self.cutmix_alpha, per_sample=self.mode != "batch", generator=generator, device=input.device
        )
        index, (lam, box) = self._paired(index, lam, box)
        if self.prob < 1:
            kept = self._kept(len(input), index, input.device, generator)
            lam, box = lam.where(kept, 1.0), box.where(kept[..., None], 0)
        mixed = functional.cutmix(input, index, box).to(functional.mixed_dtype(input))
        if target.shape[-2:] == input.shape[-2:] and target.dim() > 2:
            images = target if target.dim() == 4 else target[:, None]
            # float64 holds classes exactly
            pasted = functional.cutmix(images if target.is_floating_point() else images.double(), index, box)
            pasted = pasted.to(target.dtype).view_as(target)
            return mixed, pasted if target.is_floating_point() else self._labels(pasted, pasted, torch.ones_like(lam))
        if target.is_floating_point():
            return mixed, functional.mixup(target, index, lam)
        return mixed, self._labels(target, target[index], lam)

    def _paired(self, index: Tensor, *drawn: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pair neighbours in the permutation in mode "pair", with one draw for both."""
        if self.mode != "pair":
            return index, list(drawn)
        even = len(index) // 2 * 2
        places = torch.cat([index[:even].view(-1, 2).flip(1).flatten(), index[even:]])
        partner = torch.empty_like(index).scatter_(0, index, places)
        first = torch.minimum(partner, torch.arange(len(index), device=index.device))
        return partner, [values[first] for values in drawn]

    def _kept(self, samples: int, index: Tensor, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Draw which samples are mixed."""
        drawn = self._draw(samples, device, generator)
        if self.mode == "pair":
            drawn = drawn[torch.minimum(index, torch.arange(samples, device=device))]
        return drawn < self.prob

    def _draw(self, samples: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Draw one uniform number, or in the other modes one for each sample."""
        source = device if generator is None else generator.device
        shape = () if self.mode == "batch" else (samples,)
        return torch.rand(shape, generator=generator, dtype=torch.float64, device=source).to(device)

    def _labels(self, target: Tensor, partner: Tensor, lam: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        if target.is_floating_point():
            return target
        if self.num_classes is None:
            return target, partner, lam
        classes = torch.arange(self.num_classes, device=target.device).view(-1, *[1] * (target.dim() - 1))
        a, b = ((labels[:, None] == classes).float() for labels in (target, partner))
        dense = torch.lerp(b, a, lam.view(-1, *[1] * target.dim()))
        smoothing = self.label_smoothing
        return dense * (1 - smoothing) + smoothing / self.num_classes if smoothing else dense

    def _own_generator(self) -> torch.Generator | None:
        """Return the generator, seeded for this worker in a data loader, where every worker copies the same state."""
        worker = torch.utils.data.get_worker_info() if self.generator is not None else None
        if worker is not None and self._worker != worker.seed:
            assert self.generator is not None
            self.generator.manual_seed((self.generator.initial_seed() + worker.seed) % 2**63)
            self._worker = worker.seed
        return self.generator

    def extra_repr(self) -> str:
        parts = [f"lam={self.lam}" if self.lam is not None else f"alpha={self.alpha if self.mixes else None}"]
        parts += ["per_sample=True"] if self.mode == "elem" else []
        parts += [f"cutmix_alpha={self.cutmix_alpha}"] if self.cutmix_alpha is not None else []
        parts += [f"prob={self.prob}"] if self.prob < 1 else []
        parts += [f"switch_prob={self.switch_prob}"] if self.mixes and self.cutmix_alpha is not None else []
        parts += ["mode='pair'"] if self.mode == "pair" else []
        parts += [f"label_smoothing={self.label_smoothing}"] if self.label_smoothing else []
        parts += [f"num_classes={self.num_classes}"] if self.num_classes is not None else []
        return ", ".join(parts)


class MixupCrossEntropyLoss(nn.Module):
    """Cross-entropy of mixed samples from both labels (:func:`mixfeat.mixup_cross_entropy`).

    Args:
        label_smoothing: in [0, 1], the share of each target that is spread evenly over all classes.
        ignore_index: value of a target that is ignored.
        reduction: "mean", "sum" or "none".
        lse_square_scale: coefficient of the z-loss, not negative.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it, the value and the requirement.
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        lse_square_scale: float = 0.0,
    ) -> None:
        super().__init__()
        options = _checks.loss_options(label_smoothing, ignore_index, reduction)
        self.label_smoothing, self.ignore_index, self.reduction = options
        self.lse_square_scale = _checks.finite("lse_square_scale", lse_square_scale, 0)

    def forward(self, logits: Tensor, target: tuple[Tensor, Tensor, float | Tensor]) -> Tensor:
        """Return the loss of ``logits`` (N,C); ``target`` is (target_a, target_b, lam) as :class:`Mixup` returns it.

        Raises:
            TypeError: a target that is not such a triple.
        """
        if not isinstance(target, tuple | list) or len(target) != 3:
            got = f"{len(target)} entries" if isinstance(target, tuple | list) else type(target).__name__
            raise TypeError(f"target must be (target_a, target_b, lam), as Mixup returns it, got {got}")
        target_a, target_b, lam = target
        return functional.mixup_cross_entropy(
            logits, target_a, target_b, lam, label_smoothing=self.label_smoothing,
            lse_square_scale=self.lse_square_scale, ignore_index=self.ignore_index, reduction=self.reduction,
        )  # fmt: skip

    def extra_repr(self) -> str:
        scale = f", lse_square_scale={self.lse_square_scale}" if self.lse_square_scale else ""
        options = f"label_smoothing={self.label_smoothing}, ignore_index={self.ignore_index}"
        return f"{options}, reduction={self.reduction!r}{scale}"
