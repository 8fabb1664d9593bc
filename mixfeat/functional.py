"""The public operators: each checks its arguments, then calls the operator of the same name in :mod:`mixfeat.ops`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from mixfeat import _checks
from mixfeat.activations import Activation
from mixfeat.ops import cross_entropy, sharding
from mixfeat.ops.binary_cross_entropy import mixup_binary_cross_entropy as _mixup_binary_cross_entropy
from mixfeat.ops.cutmix import cutmix as _cutmix
from mixfeat.ops.gradient_descent import gradient_descent as _gradient_descent
from mixfeat.ops.mixup import mixup as _mixup
from mixfeat.ops.mixup import mixup_as_is
from mixfeat.ops.pairwise_mixup_loss import pairwise_mixup_loss as _pairwise_mixup_loss
from mixfeat.ops.patch_conv import patch_conv as _patch_conv

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # missing in some builds of PyTorch

__all__ = [
    "beta_quadrature", "cutmix", "gradient_descent", "mixup", "mixup_accuracy", "mixup_binary_cross_entropy",
    "mixup_cross_entropy", "pairwise_mixup_loss", "patch_conv", "sample_cutmix", "sample_mixup",
    "soft_target_cross_entropy",
]  # fmt: skip


def patch_conv(
    input: Tensor,
    weight: Tensor,
    activation: Activation,
    *,
    index: Tensor | None = None,
    lam: float | Tensor | None = None,
    readout: Tensor | None = None,
) -> Tensor:
    r"""Compute the logits of a 2-layer patch-wise convolutional network, of samples or of samples mixed with partners.

    Mixing, convolution, activation and the sum over patches and filters are one operator::

        z_n    = lam_n x_n + (1 - lam_n) x_{index_n}
        g[n,c] = sum_{p,m} readout[c,m] phi(<w[c,m], z[n,p]>)

    The pre-activations are never stored; the backward pass recomputes them. Where it is cheaper, forward saves some
    slopes phi' instead: up to 32 MiB on a CPU, those of long patches on a GPU.

    This is the network of Chidambaram et al., "Provably Learning Diverse Features in Multi-View Data with Midpoint
    Mixup" (ICML 2023): a hidden layer of C*M filters shared by P patches, and a second layer fixed to ones.

    Args:
        input: x, (N,P,D): N samples of P patches of dimension D; or (R,N,P,D), data of R networks. Any strides.
        weight: w, (C,M,D): M filters for each of C classes; or (R,C,M,D), R independent networks.
        activation: phi.
        index: partner of each sample, (N,) int64, any map into [0, N); the same for all R networks. Needs ``lam``.
        lam: weight of the sample itself; its partner has 1 - lam. A number in [0, 1], or a floating-point tensor of
            shape (), (N,), or (N,P) with a weight for each patch (0 and 1 give patch-wise CutMix). It must not require
            grad. Needs ``index``. With (N,P), :func:`mixup` writes the mixed samples to memory.
        readout: the second layer, (C,M) or (R,C,M), floating; by default ones, as in the paper. With it the sums of
            all filters, (N,C,M), are rounded to input's dtype and stored.

    Returns:
        g, (N,C), or (R,N,C) if input or weight has the run dimension; of input's dtype. Sums accumulate in float32
        (float64 for float64). Under autocast input and weight are cast as for a convolution.

    Gradients flow to ``input``, ``weight`` and ``readout``, and can be differentiated again. float32 products follow
    ``torch.get_float32_matmul_precision()`` on CUDA.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, index without lam or lam without index, lam outside [0, 1].
        IndexError: an index outside [0, N) on a CPU. On CUDA, where it cannot be read without waiting for the device,
            it makes that sample's logits NaN.
    """
    input, weight = _checks.network(input, weight, activation)
    if index is not None or lam is not None:
        lam = _checks.mixing(index, lam, input.shape[-3], input.device, input.dtype, input.shape[-2])
        if index is not None and lam.dim() == 2:
            first = input.movedim(-3, 0).movedim(-2, 1)  # (N,P,...), as mixup takes it
            input, index, lam = _mixup(first, index, lam, input.dtype).movedim(1, -2).movedim(0, -3), None, None
    if readout is None:
        return _patch_conv(input, weight, index, lam, activation.polynomial)
    readout = _checks.readout(readout, weight)
    filters = weight.flatten(-3, -2)[..., None, :]  # each filter is a class of its own
    sums = _patch_conv(input, filters, index, lam, activation.polynomial)
    return (sums.unflatten(-1, weight.shape[-3:-1]) * readout[..., None, :, :]).sum(-1)


def pairwise_mixup_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    activation: Activation,
    *,
    lam: float | Tensor = 0.5,
    lam_weight: Tensor | None = None,
    label_lam: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    pairs: str = "all",
    readout: Tensor | None = None,
    partner: Tensor | None = None,
    partner_target: Tensor | None = None,
    group: ProcessGroup | Literal["world"] | None = None,
) -> Tensor:
    r"""Compute the Mixup objective over all N^2 ordered pairs of samples, exactly, in memory linear in N::

        L     = 1/N^2 sum_{i,j} [lam CE(g(z_ij), y_i) + (1 - lam) CE(g(z_ij), y_j)]
        z_ij  = lam x_i + (1 - lam) x_j
        g(z)_c = sum_{p,m} readout[c,m] phi(<w[c,m], z[p]>)

    This is eq. 2.2 of Chidambaram et al. (ICML 2023), i = j included; with quadrature nodes it is the expectation over
    lam. Mixing commutes with the convolution, so only N samples are convolved. Kernels evaluate the activations of
    their pairs tile by tile, with the gradient in the same pass. At lam = 1/2, and for a node and its mirror image,
    pairs (i, j) and (j, i) share their work.

    Args:
        input: x, (N,P,D); or (R,N,P,D), data of R networks. Any strides.
        weight: w, (C,M,D); or (R,C,M,D), R independent networks.
        target: y, classes in [0, C), (N,) int64; or (R,N), one for each run.
        activation: phi.
        lam: weight of the first sample of a pair: a number in [0, 1], 1/2 for Midpoint Mixup; or (K,) nodes on the CPU,
            averaged with the weights ``lam_weight``. :func:`beta_quadrature` gives those of Beta(alpha, alpha).
        lam_weight: (K,) weights of the nodes, on the CPU; they sum to 1.
        label_lam: the first sample's share of the label, by default lam: a number in [0, 1], or (K,) on the CPU, one
            for each node. At lam = 1/2 over all pairs it changes nothing, as (i, j) and (j, i) are one mixed sample.
        label_smoothing: in [0, 1], the share of each label that is spread evenly over all classes.
        pairs: the pairs that the mean is over: "all", "distinct" (i != j) or "different_class" (y_i != y_j). Without
            such pairs (one sample, one class) the loss and its gradients are 0.
        readout: the second layer, (C,M) or (R,C,M), floating; by default ones.
        partner: x', (N',P,D) or (R,N',P,D): each x_i is paired with each x'_j, and the mean is over these N N' pairs,
            for stochastic training with a batch of inputs. Gradients flow to it as well. Not with "distinct".
        partner_target: classes of the partners, (N',) or (R,N').
        group: process group of torch.distributed over which the samples are sharded; "world" for all processes. Every
            rank calls with its own samples, any number of them, and with the same weight and settings. Pairs span the
            samples of all ranks. Ranks exchange pre-activations in a ring while they compute.

    Returns:
        L, (), or (R,) if input or weight has the run dimension; float32, or float64 for float64. Without samples L and
        its gradients are 0, not the NaN of an empty mean, so an empty shard of a data set adds nothing. With a group
        all ranks get the same number.

    With a group of W ranks, the gradients are those of the sum of all ranks' losses, W L, through this rank's samples.
    DistributedDataParallel averages the gradient to ``weight`` over ranks, which gives that of L. Every rank must scale
    its loss by the same factor. Ranks wait for each other, so a call cannot be part of a CUDA graph.

    Gradients flow to ``input``, ``weight``, ``readout`` and ``partner``, and can be differentiated again without a
    group. Under autocast input and weight are cast as for a linear layer. The convolution follows
    ``torch.get_float32_matmul_precision()``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, fewer than 2 classes, lam, label_lam or label_smoothing outside
            [0, 1], lam_weight without nodes or nodes without it, weights that do not sum to 1, unknown pairs, partner
            without partner_target or with pairs="distinct"; with a group any option but lam and lam_weight.
        IndexError: a target outside [0, C) on a CPU. On CUDA, where it cannot be read without waiting for the device,
            it makes loss and gradients NaN.
        RuntimeError: a group without torch.distributed initialised; another rank that died or exceeded the group's
            timeout.

    With a group every rank raises. A rank with valid arguments raises ValueError, which names the rank that refused its
    arguments and why, or the settings that differ.
    """
    name = "" if group is None else sharding.group_name(group)
    try:
        classifier_input = input
        input, weight = _checks.classifier(input, weight, target, activation)
        nodes, node_weights = _checks.nodes(lam, lam_weight)
        label_nodes, smoothing, pairs = _checks.labels(label_lam, label_smoothing, pairs, nodes)
        options = (label_lam, label_smoothing or None, readout, partner, None if pairs == "all" else pairs)
        if name and any(option is not None for option in options):
            raise ValueError("label_lam, label_smoothing, pairs, readout and partner are not served with a group")
        if readout is not None:
            readout = _checks.readout(readout, weight)
        num_rows = 0
        if partner is not None or partner_target is not None:
            partner, partner_target = _checks.partner_samples(partner, partner_target, classifier_input, weight, pairs)
            num_rows = input.shape[-3]
            input = torch.cat([input, partner.to(input.dtype)], -3)
            runs = input.shape[:-3] or weight.shape[:-3]
            if target.dim() != partner_target.dim():
                target, partner_target = (t.expand(*runs, t.shape[-1]) for t in (target, partner_target))
            target = torch.cat([target, partner_target], -1)
    except Exception as error:
        if name:
            sharding.refuse(name, error)
        raise
    options_of_pairs = (label_nodes, activation.polynomial, smoothing, pairs, num_rows, name)
    loss = _pairwise_mixup_loss(input, weight, readout, target, nodes, node_weights, *options_of_pairs)
    return loss if input.dim() == 4 or weight.dim() == 4 else loss.squeeze(0)  # a view, whose gradient is one too


def gradient_descent(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    activation: Activation,
    *,
    lam: float | Tensor | None = 0.5,
    lam_weight: Tensor | None = None,
    lr: float | Tensor,
    steps: int,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    label_lam: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    pairs: str = "all",
    readout: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Train networks by full-batch gradient descent, all steps in one call, as a loop of :class:`torch.optim.SGD`::

        for t in range(steps):
            loss[t] = L(w)
            v = momentum v + dL/dw + weight_decay w        # v = 0 before the first step
            w = w - lr v

    L is :func:`pairwise_mixup_loss`, or, with ``lam=None``, the mean cross-entropy of the unmixed samples (ERM). Every
    run descends on its own loss. A run that diverges has losses that are not finite, and does not affect the others.

    On the CPU backend the loop is native code. A thread takes many steps of one network at a time, so all threads are
    busy if there are at least as many networks.

    Args:
        input: x, (N,P,D); or (R,N,P,D), data of R networks. Any strides.
        weight: the initial w, (C,M,D); or (R,C,M,D), R independent networks.
        target: y, classes in [0, C), (N,) int64; or (R,N), one for each run.
        activation: phi.
        lam: None for plain cross-entropy; otherwise as :func:`pairwise_mixup_loss` takes it, 1/2 for Midpoint Mixup.
        lam_weight: (K,) weights of the nodes, on the CPU; they sum to 1.
        lr: step size: a finite number, not negative; or a floating-point tensor on the CPU, (steps,) for a schedule,
            (R,) with a step size for each run, or both: (R,steps), (R,1) or (1,steps). If R = steps > 1 a tensor of one
            dimension is ambiguous and refused.
        steps: number of steps; 0 returns the weight unchanged.
        momentum: in [0, 1).
        weight_decay: finite, not negative. The returned loss does not include it.
        label_lam, pairs: as :func:`pairwise_mixup_loss` takes them; not with ``lam=None``.
        label_smoothing: in [0, 1], the share of each label that is spread evenly over all classes.
        readout: the second layer, (C,M) or (R,C,M), floating; it is not trained. By default ones. A readout of several
            magnitudes, or on a GPU any of ``readout``, ``label_lam``, ``label_smoothing`` and ``pairs``, makes every
            step call the operators, which is slower.

    Returns:
        (weight, loss): weight after the last step, (C,M,D), or (R,C,M,D) if input or weight has the run dimension, of
        weight's dtype; loss before each step's update, (steps,) or (R,steps), float32, or float64 for float64.

    Half-precision runs are computed in float32; the returned weight is rounded to its dtype. Autocast only casts input
    to weight's dtype. A run may be split over several calls: without momentum, and in float32 or float64, the result is
    the same bit for bit. Momentum starts at 0 in every call.

    Not differentiable: the backward pass raises. Nothing is mutated.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, fewer than 2 classes; lam, label_lam or label_smoothing outside
            [0, 1], lam_weight that does not fit lam, unknown pairs, label_lam or pairs with lam=None; lr negative, not
            finite or of a wrong shape; steps < 0; momentum outside [0, 1); weight_decay negative or not finite.
        IndexError: a target outside [0, C) on a CPU. On CUDA, where it cannot be read without waiting for the device,
            it makes that run's loss and weight NaN.
    """
    input, weight = _checks.classifier(input, weight, target, activation, autocast=False)
    nodes, node_weights = (None, None) if lam is None and lam_weight is None else _checks.nodes(lam, lam_weight)
    if nodes is None and (label_lam is not None or pairs != "all"):
        name, value = ("label_lam", label_lam) if label_lam is not None else ("pairs", pairs)
        raise ValueError(f"{name} needs pairs of samples, which lam=None has not, got {value!r}")
    label_nodes, smoothing, pairs = _checks.labels(label_lam, label_smoothing, pairs, nodes)
    steps = _checks.integer("steps", steps, 0)
    runs = input.shape[:-3] or weight.shape[:-3]
    rates = _checks.lr(lr, runs, steps)
    momentum, weight_decay = _checks.momentum(momentum), _checks.finite("weight_decay", weight_decay, 0)
    dtype = _checks.accumulation(weight.dtype)
    if readout is not None:
        _checks.constant("readout", readout := _checks.readout(readout, weight), "it is not trained")
        readout = readout.to(dtype)
    trained, loss, _ = _gradient_descent(
        input.to(dtype), weight.to(dtype), target, nodes, node_weights, activation.polynomial, rates, steps, momentum,
        weight_decay, readout=readout, label_lam=label_nodes, label_smoothing=smoothing, pairs=pairs,
    )  # fmt: skip
    trained = trained.to(weight.dtype)
    return (trained, loss) if runs else (trained[0], loss[0])


def beta_quadrature(
    alpha: float, num_nodes: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Return quadrature nodes and weights for lam ~ Beta(alpha, alpha), exact for polynomials up to degree 2K - 1.

    This is Gauss-Jacobi quadrature on [0, 1], from the eigenvalues of the Jacobi matrix (Golub and Welsch, 1969). Nodes
    are ascending and symmetric about 1/2. alpha = 1 gives Gauss-Legendre quadrature.

    Args:
        alpha: parameter of the distribution, > 0.
        num_nodes: K, at least 1.
        dtype: floating-point dtype of the results.
        device: device of the results; :func:`pairwise_mixup_loss` takes them on the CPU.

    Returns:
        (lam, lam_weight), both (K,); weights are not negative and sum to 1.

    Raises:
        TypeError, ValueError: an alpha that is not positive and finite, a num_nodes that is not a positive integer, a
            dtype that is not floating-point.
    """
    alpha = _checks.alpha(alpha)
    num_nodes = _checks.integer("num_nodes", num_nodes, 1)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype!r}")
    n = torch.arange(2, max(2, num_nodes), dtype=torch.float64)
    squares = n * (n + 2 * alpha - 2) / ((2 * n + 2 * alpha - 1) * (2 * n + 2 * alpha - 3))
    squares = torch.cat([torch.tensor([1 / (2 * alpha + 1)], dtype=torch.float64), squares])[: num_nodes - 1]
    nodes, vectors = torch.linalg.eigh(torch.diag(squares.sqrt(), 1) + torch.diag(squares.sqrt(), -1))
    weights = vectors[0].square()
    nodes, weights = (nodes - nodes.flip(0)) / 2, (weights + weights.flip(0)) / 2  # exactly symmetric
    lam, lam_weight = (0.5 + 0.5 * nodes).clamp(0, 1), weights / weights.sum()
    return lam.to(device, dtype), lam_weight.to(device, dtype)


def sample_mixup(
    num_samples: int,
    alpha: float = 1.0,
    *,
    lam: float | None = None,
    per_sample: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a partner for each sample of a batch and the weight lam of the sample itself, for :func:`mixup`.

    Draws are made on the device, without waiting for it.

    Args:
        num_samples: N >= 0, odd or even.
        alpha: parameter of lam ~ Beta(alpha, alpha), > 0; 1 is uniform. A small alpha leaves most samples almost
            unmixed.
        lam: a number in [0, 1] that replaces the draw; 0.5 is Midpoint Mixup.
        per_sample: draw a lam for each sample instead of one for all.
        generator: source of all randomness. Draws are made on its device, so a CPU generator gives the same values on
            every device.
        device: device of the results; by default that of ``generator``, else torch's default.

    Returns:
        (index, lam): partners (N,) int64, a random permutation; lam (), or (N,) if ``per_sample``, float32.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it, the value and the requirement.
    """
    num_samples = _checks.integer("num_samples", num_samples, 0)
    alpha, lam = _checks.sampling(alpha, lam, generator)
    target, source = _devices(device, generator)
    index = _draw_partners(num_samples, generator, source)
    shape = (num_samples,) if per_sample else ()
    if lam is None:
        weight = _draw_beta(alpha, shape, generator, source).float()
    else:
        weight = torch.full(shape, lam, dtype=torch.float32, device=target)
    return index.to(target), weight.to(target)


def sample_cutmix(
    input_shape: Sequence[int],
    alpha: float = 1.0,
    *,
    per_sample: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a partner for each image of a batch, the box that it pastes, and the label weight lam, for :func:`cutmix`.

    With r ~ Beta(alpha, alpha) the box has sides sqrt(1 - r) H and sqrt(1 - r) W, rounded down to an even number of
    pixels. Its centre is uniform over the image, and the border clips it: Yun et al., "CutMix: Regularization Strategy
    to Train Strong Classifiers with Localizable Features" (ICCV 2019). Draws are made on the device, without waiting
    for it.

    Args:
        input_shape: (N,ch,H,W), as ``input.shape``.
        alpha: parameter of the distribution, > 0; 1 is uniform.
        per_sample: draw a box for each image instead of one for all.
        generator: source of all randomness. Draws are made on its device, so a CPU generator gives the same values on
            every device.
        device: device of the results; by default that of ``generator``, else torch's default.

    Returns:
        (index, box, lam): index (N,) int64, a random permutation; box (4,), or (N,4) if ``per_sample``, int64:
        y0, y1, x0, x1, with y1 and x1 excluded; lam () or (N,) float32, the exact share of the image outside the box:
        1 - (y1 - y0) (x1 - x0) / (H W).

    Raises:
        TypeError, ValueError: an invalid argument; the message names it, the value and the requirement.
    """
    num_samples, _, height, width = _checks.image_shape(input_shape)
    alpha, _ = _checks.sampling(alpha, None, generator)
    target, source = _devices(device, generator)
    index = _draw_partners(num_samples, generator, source)
    shape = (num_samples,) if per_sample else ()
    side = (1 - _draw_beta(alpha, shape, generator, source)).sqrt()
    centre = torch.rand((2, *shape), generator=generator, dtype=torch.float64, device=source)
    edges = []
    for position, size in zip(centre, (height, width), strict=True):
        half, middle = (side * size / 2).long(), (position * size).long()
        edges += [(middle - half).clamp(0, size), (middle + half).clamp(0, size)]
    box = torch.stack(edges, -1)
    area = (box[..., 1] - box[..., 0]) * (box[..., 3] - box[..., 2])
    lam = (1 - area.double() / max(1, height * width)).float()
    return index.to(target), box.to(target), lam.to(target)


def _devices(device: torch.device | str | None, generator: torch.Generator | None) -> tuple[torch.device, torch.device]:
    """Return the devices of the results and of the draws."""
    if device is None:
        # an empty tensor's device, because torch.compile cannot trace torch.get_default_device
        device = torch.empty(0).device if generator is None else generator.device
    device = torch.device(device)
    return device, device if generator is None else generator.device


def _draw_partners(num_samples: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draw a random permutation."""
    if generator is None and torch.compiler.is_compiling():
        # with generator=None randperm recompiles for every num_samples; without the argument Inductor (2.13) fails on
        # images[randperm(n)]
        return torch.rand(num_samples, dtype=torch.float64, device=device).argsort()
    return torch.randperm(num_samples, generator=generator, device=device)


def _draw_beta(alpha: float, shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draw from Beta(alpha, alpha), in float64."""
    # Gamma(a) = Gamma(a + 1) U^(1/a): its logarithm stays finite where a small a would make most draws 0
    concentration = torch.full((2, *shape), alpha + 1.0, dtype=torch.float64, device=device)
    uniform = torch.rand(concentration.shape, generator=generator, dtype=torch.float64, device=device)
    # PyTorch 2.10 draws no gamma on the meta device
    gamma = concentration if concentration.is_meta else torch._standard_gamma(concentration, generator=generator)
    first, second = (gamma.log() + (1 - uniform).log() / alpha).unbind()
    return torch.sigmoid(first - second)


def mixup(input: Tensor, index: Tensor, lam: float | Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Interpolate each sample of a batch with its partner, in one pass over memory::

        z_n = lam_n x_n + (1 - lam_n) x_{index_n}

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (ICLR 2018). Applied to hidden activations, in a
    network's forward, it is Manifold Mixup.

    Args:
        input: x, (N, ...): float32, bfloat16, float16, float64, or uint8, as images are stored. Any strides; the result
            has the memory format of the samples (channels_last stays channels_last).
        index: partner of each sample, (N,) int64, any map into [0, N).
        lam: weight of the sample itself; its partner has 1 - lam. A number in [0, 1], or a floating-point tensor of
            shape (), (N,), or, for input (N,P,...), (N,P): a weight for each patch (0 and 1 give patch-wise CutMix). It
            must not require grad, and is not rounded to a half-precision input's dtype.
        dtype: floating dtype of the result; by default input's, for uint8 torch's default. Values are not scaled: those
            of uint8 stay in [0, 255].

    Returns:
        z, of input's shape. Gradients flow to ``input``, and can be differentiated again.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, lam outside [0, 1].
        IndexError: an index outside [0, N) on a CPU. On CUDA, where it cannot be read without waiting for the device,
            it makes that sample NaN.
    """
    if dtype is None and (mixed := mixup_as_is(input, index, lam)) is not None:
        return mixed
    _checks.float_tensor("input", input, (*_checks.FLOAT_DTYPES, torch.uint8))
    if input.dim() == 0:
        raise ValueError("input must have shape (N, ...), got ()")
    if dtype is None:
        dtype = mixed_dtype(input)
    _checks.float_dtype("dtype", dtype)
    if dtype != input.dtype and input.dtype != torch.uint8:
        raise TypeError(f"dtype must be input's, {input.dtype}, unless input is uint8; got {dtype}")
    patches = input.shape[1] if input.dim() > 1 else None
    lam = _checks.mixing(index, lam, input.shape[0], input.device, dtype, patches)
    return _mixup(input, index, lam, dtype)


def mixed_dtype(input: Tensor) -> torch.dtype:
    """Return the dtype that :func:`mixup` gives its result by default."""
    return torch.get_default_dtype() if input.dtype == torch.uint8 else input.dtype


def cutmix(input: Tensor, index: Tensor, box: Tensor) -> Tensor:
    """Replace a box of each image by the same box of its partner, in one pass over memory::

        z_n[c,y,x] = x_{index_n}[c,y,x] if y0 <= y < y1 and x0 <= x < x1, else x_n[c,y,x]

    Source: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features" (ICCV
    2019). Labels are mixed by area: pass the lam of :func:`sample_cutmix` to :func:`mixup_cross_entropy`.

    Args:
        input: x, images (N,ch,H,W): float32, bfloat16, float16, float64, or uint8. Any strides; channels_last stays
            channels_last.
        index: partner of each image, (N,) int64, any map into [0, N).
        box: y0, y1, x0, x1, (4,) int64, with 0 <= y0 <= y1 <= H and 0 <= x0 <= x1 <= W, as :func:`sample_cutmix` draws
            it; or (N,4) with a box for each image.

    Returns:
        z, of input's shape and dtype. Gradients flow to ``input``, and can be differentiated again.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, a box that is not inside the image.
        IndexError: an index outside [0, N) on a CPU. On CUDA, where it cannot be read without waiting for the device,
            it makes that image's box NaN, or 0 for uint8, and a box is clipped to the image.
    """
    _checks.float_tensor("input", input, (*_checks.FLOAT_DTYPES, torch.uint8))
    _checks.image_shape(input.shape, "input")
    _checks.pairing(index, input.shape[0], input.device)
    _checks.box(box, input.shape[0], input.device)
    return _cutmix(input, index, box)


@overload
def mixup_cross_entropy(
    input: Tensor, target_a: Tensor, target_b: Tensor, lam: float | Tensor, *, weight: Tensor | None = None,
    label_smoothing: float = 0.0, lse_square_scale: float = 0.0, ignore_index: int = -100, reduction: str = "mean",
    return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def mixup_cross_entropy(
    input: Tensor, target_a: Tensor, target_b: Tensor, lam: float | Tensor, *, weight: Tensor | None = None,
    label_smoothing: float = 0.0, lse_square_scale: float = 0.0, ignore_index: int = -100, reduction: str = "mean",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def mixup_cross_entropy(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: float | Tensor,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the cross-entropy of mixed samples from both labels, without dense targets, and its gradient with it::

        lam CE(input, target_a) + (1 - lam) CE(input, target_b)

    CE is :func:`torch.nn.functional.cross_entropy`. With ``reduction="mean"`` each of the two is the mean over its own
    targets that are not ``ignore_index``, weighted by ``weight``; a per-sample lam is inside the mean.

    ``lse_square_scale`` adds the z-loss of PaLM (Chowdhery et al., 2022), which keeps the softmax normaliser close to
    1: each CE gains ``lse_square_scale * logsumexp(input_n)^2`` for every target that is not ignored. ``weight`` does
    not enter the mean of these terms. The name is that of flash-attention and Liger-Kernel.

    Args:
        input: logits, (N,C), or (N,C,d1,...) with a prediction at each position.
        target_a: classes of the samples themselves, (N,) or (N,d1,...) int64, in [0, C) or ``ignore_index``.
        target_b: classes of their partners, likewise.
        lam: weight of ``target_a``; ``target_b`` has 1 - lam. A number in [0, 1], or a floating-point tensor of shape
            () or (N,), which must not require grad.
        weight: (C,), weight of each class, floating; must not require grad. It makes plain PyTorch compute the loss.
        label_smoothing: in [0, 1], the share of each target that is spread evenly over all classes.
        lse_square_scale: coefficient of the z-loss, finite, not negative; PaLM's is 1e-4.
        ignore_index: value of a target that is ignored.
        reduction: "mean", "sum" or "none".
        return_lse: also return the logsumexp of each row, to monitor it or to build another loss on it.

    Returns:
        The loss, () or, without reduction, of the targets' shape; float32, also for half-precision logits, or float64
        for float64. The mean over no targets is NaN. With ``return_lse`` (loss, lse): lse has the targets' shape and
        the loss's dtype, and covers ignored rows too. Gradients flow from both to ``input``, and can be differentiated
        again.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit; lam or label_smoothing outside [0, 1]; lse_square_scale negative
            or not finite; an unknown reduction.
        IndexError: a target out of range on a CPU. On CUDA, where it cannot be read without waiting for the device, it
            makes that row's loss and gradient NaN.
    """
    _checks.logits(input, positions=True)
    smoothing, ignored, reduction = _checks.loss_options(label_smoothing, ignore_index, reduction)
    options = (smoothing, _checks.finite("lse_square_scale", lse_square_scale, 0), ignored, reduction)
    _checks.boolean("return_lse", return_lse)
    shape = (*input.shape[:1], *input.shape[2:])
    for name, target in (("target_a", target_a), ("target_b", target_b)):
        _checks.position_classes(name, target, shape, input.device)
    lam = _checks.sample_lam(lam, input.shape[0], input.device, input.dtype)
    if input.dim() > 2:  # each position becomes a row
        lam = lam.view(-1, *[1] * (len(shape) - 1)).expand(shape).flatten() if lam.dim() else lam
        input, target_a, target_b = _as_rows(input), target_a.flatten(), target_b.flatten()
    if weight is None:
        loss, lse = cross_entropy.mixup_cross_entropy(input, target_a, target_b, lam, *options, return_lse)
    else:
        weight = _checks.class_weight("weight", weight, input)
        loss, lse = cross_entropy.weighted_mixup_cross_entropy(input, target_a, target_b, lam, weight, *options)
    loss = loss.view(shape) if reduction == "none" else loss
    return (loss, lse.view(shape)) if return_lse else loss


def _as_rows(logits: Tensor) -> Tensor:
    """Turn (N,C,d1,...) into rows (N*d1*..., C)."""
    return logits.movedim(1, -1).flatten(0, -2)


def mixup_binary_cross_entropy(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: float | Tensor,
    *,
    num_classes: int | None = None,
    label_smoothing: float = 0.0,
    threshold: float | None = None,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Compute the binary cross-entropy of mixed samples from both labels, with one sigmoid for each class::

        q_nc = lam_n [c = a_n] + (1 - lam_n) [c = b_n];  q = (1 - label_smoothing) q + label_smoothing / C
        l_nc = - pos_weight_c q_nc log sigmoid(x_nc) - (1 - q_nc) log sigmoid(-x_nc)

    It equals :func:`torch.nn.functional.binary_cross_entropy_with_logits` of dense targets q, which are never formed.
    The gradient is computed in the same pass. Wightman et al., "ResNet strikes back" (2021), train with it. Their
    ``threshold`` makes q 1 where it exceeds the threshold and 0 elsewhere, as in timm's ``BinaryCrossEntropy``.

    Args:
        input: logits x, (N,C).
        target_a: classes a of the samples themselves, (N,) int64, in [0, C).
        target_b: classes b of their partners, likewise.
        lam: weight of ``target_a``; ``target_b`` has 1 - lam. A number in [0, 1], or a floating-point tensor of shape
            () or (N,), which must not require grad.
        num_classes: C, checked against ``input`` if given.
        label_smoothing: in [0, 1], the share of each target that is spread evenly over all classes.
        threshold: in [0, 1]; None leaves q unchanged.
        pos_weight: (C,), weight of each class's positive term, floating; must not require grad.
        reduction: "mean" (over N*C), "sum" or "none".

    Returns:
        The loss, () or, without reduction, (N,C); float32, also for half-precision logits, or float64 for float64. The
        mean over no samples is NaN. Gradients flow to ``input``, and can be differentiated again.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit; lam, label_smoothing or threshold outside [0, 1]; an unknown
            reduction.
        IndexError: a target out of range on a CPU. On CUDA, where it cannot be read without waiting for the device, it
            makes that row's loss and gradient NaN.
    """
    _checks.logits(input)
    smoothing, _, reduction = _checks.loss_options(label_smoothing, -100, reduction)
    if num_classes is not None and _checks.integer("num_classes", num_classes, 1) != input.shape[1]:
        raise ValueError(f"num_classes must be input's C = {input.shape[1]}, got {num_classes}")
    threshold = None if threshold is None else _checks.fraction("threshold", threshold)
    _checks.classes("target_a", target_a, input.shape[:1], input.device)
    _checks.classes("target_b", target_b, input.shape[:1], input.device)
    lam = _checks.sample_lam(lam, input.shape[0], input.device, input.dtype)
    if pos_weight is not None:
        pos_weight = _checks.class_weight("pos_weight", pos_weight, input)
    return _mixup_binary_cross_entropy(input, target_a, target_b, lam, pos_weight, smoothing, threshold, reduction)


def mixup_accuracy(logits: Tensor, target_a: Tensor, target_b: Tensor, lam: float | Tensor, *, topk: int = 1) -> Tensor:
    """Compute the accuracy on mixed samples, where each label counts with its sample's weight::

        mean_n [lam_n [a_n in top] + (1 - lam_n) [b_n in top]],   top = the topk classes of the largest logits

    Args:
        logits: (N,C).
        target_a: classes of the samples themselves, (N,) int64.
        target_b: classes of their partners, likewise.
        lam: weight of ``target_a``, as :func:`mixup_cross_entropy` takes it.
        topk: number of top classes, 1 to C.

    Returns:
        () in [0, 1], float32 or float64 for float64; NaN without samples. Not differentiable.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it, the value and the requirement.
    """
    _checks.logits(logits, "logits")
    topk = _checks.integer("topk", topk, 1, logits.shape[1])
    _checks.classes("target_a", target_a, logits.shape[:1], logits.device)
    _checks.classes("target_b", target_b, logits.shape[:1], logits.device)
    lam = _checks.sample_lam(lam, logits.shape[0], logits.device, logits.dtype)
    top = logits.detach().topk(topk, dim=1).indices
    hit_a, hit_b = ((top == target[:, None]).any(1).to(lam.dtype) for target in (target_a, target_b))
    return (lam * hit_a + (1 - lam) * hit_b).mean()


def soft_target_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Compute the cross-entropy to a distribution over the classes for each sample, and its gradient in the same pass::

        - sum_c weight_c t_nc log softmax(input_n)_c,    t = (1 - label_smoothing) target + label_smoothing / C

    It equals :func:`torch.nn.functional.cross_entropy` of dense targets; the mean is over N, whatever the weight. For
    mixed pairs :func:`mixup_cross_entropy` takes two labels instead, and so does not read N*C targets.

    Args:
        input: logits, (N,C), or (N,C,d1,...) with a prediction at each position.
        target: dense targets of input's shape, floating, with any sum; must not require grad.
        weight: (C,), weight of each class, floating; must not require grad. It costs a pass over the target.
        label_smoothing: in [0, 1], the share of each target that is spread evenly over all classes.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss, () or, without reduction, (N,) or (N,d1,...); float32, also for half-precision logits, or float64 for
        float64. Gradients flow to ``input``, and can be differentiated again.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, label_smoothing outside [0, 1], an unknown reduction.
    """
    _checks.logits(input, positions=True)
    label_smoothing, _, reduction = _checks.loss_options(label_smoothing, -100, reduction)
    _checks.soft_target(target, input)
    shape = (*input.shape[:1], *input.shape[2:])
    if input.dim() > 2:
        input, target = _as_rows(input), _as_rows(target)
    if weight is not None:
        weight = _checks.class_weight("weight", weight, input)
        target = weight * ((1 - label_smoothing) * target.to(weight.dtype) + label_smoothing / input.shape[1])
        label_smoothing = 0.0
    loss = cross_entropy.soft_target_cross_entropy(input, target, label_smoothing, reduction)
    return loss.view(shape) if reduction == "none" else loss
