"""The public operators: each checks its arguments, then calls the operator of the same name in :mod:`mixfeat.ops`."""

from __future__ import annotations

import sys
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mixfeat import ops
from mixfeat.activations import Activation

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # not there in every build of PyTorch

__all__ = [
    "beta_quadrature", "gradient_descent", "mixup", "mixup_cross_entropy", "pairwise_mixup_loss", "patch_conv",
    "sample_mixup", "soft_target_cross_entropy",
]  # fmt: skip

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

    Mixing, convolution, activation and the sum over patches and filters are one operator::

        z_n    = lam_n x_n + (1 - lam_n) x_{index_n}
        g[n,c] = sum_{p,m} phi(<w[c,m], z[n,p]>)

    The pre-activations are never stored: the backward pass computes them again, but for up to 32 MiB of slopes phi'
    that the CPU backend keeps.

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
    input, weight = _check_network(input, weight, activation)
    if index is not None or lam is not None:
        lam = _check_mixing(index, lam, input.shape[-3], input.device, input.dtype)
    return ops.patch_conv(input, weight, index, lam, activation.polynomial)


def pairwise_mixup_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    activation: Activation,
    *,
    lam: float | Tensor = 0.5,
    lam_weight: Tensor | None = None,
    group: ProcessGroup | Literal["world"] | None = None,
) -> Tensor:
    r"""The Mixup objective over all N^2 ordered pairs of samples: exact, in memory linear in N::

        L     = 1/N^2 sum_{i,j} [lam CE(g(z_ij), y_i) + (1 - lam) CE(g(z_ij), y_j)]
        z_ij  = lam x_i + (1 - lam) x_j
        g(z)_c = sum_{p,m} phi(<w[c,m], z[p]>)

    eq. 2.2 of Chidambaram et al. (ICML 2023), i = j included, and with quadrature nodes its expectation over lam.
    Mixing commutes with the convolution: N samples are convolved, and only the activations of their pairs are
    evaluated, tile by tile, with the gradient in the same pass. At lam = 1/2, as for a node and its mirror image, pairs
    (i, j) and (j, i) share their work.

    Args:
        input: x, (N,P,D); or (R,N,P,D), data of R networks. Any strides.
        weight: w, (C,M,D); or (R,C,M,D), R independent networks.
        target: y, classes in [0, C), (N,) int64; or (R,N), where the runs' data differ.
        activation: phi.
        lam: weight of the first sample of a pair: a number in [0, 1], 1/2 being Midpoint Mixup; or (K,) nodes on the
            CPU, over which ``lam_weight`` takes the mean. :func:`beta_quadrature` gives those of Beta(alpha, alpha).
        lam_weight: (K,) weights of the nodes, on the CPU, of sum 1.
        group: ranks of torch.distributed among which the samples are spread, "world" for all processes. Every rank
            calls with its own samples, any number of them, and with the same weight and settings; pairs are formed of
            the samples of all. Pre-activations travel, in a ring, while others are worked on.

    Returns:
        L, (), or (R,) if input or weight has the run dimension; float32, or float64 for float64. Without samples it is
        0, with zero gradients (where the mean of no cross-entropies would be NaN), so that an empty part of a sharded
        data set adds nothing. With a group all ranks get the same number.

    With a group of W ranks, gradients are those of the sum of the losses of all ranks, W L, through the samples of this
    one. So the average over ranks of the gradient to ``weight``, which DistributedDataParallel takes, is that of L.
    Every rank must scale its loss alike. Ranks wait for each other: a call cannot be part of a CUDA graph.

    Gradients flow to ``input`` and ``weight``; differentiating twice raises. Under autocast input and weight are cast
    as they are for a linear layer. The convolution follows ``torch.get_float32_matmul_precision()``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, fewer than 2 classes, lam outside [0, 1], lam_weight without
            nodes or nodes without it, or weights that do not sum to 1.
        IndexError: a target outside [0, C) on a CPU. On CUDA, where it cannot be read without waiting for the device,
            it makes loss and gradients NaN.
        RuntimeError: group without torch.distributed initialised; another rank that died, or took longer than the
            group's timeout.

    With a group these are raised by every rank: one whose arguments are fine has a ValueError that says which rank
    refused its own and why, or which settings differ.
    """
    name = "" if group is None else ops.group_name(group)
    try:
        input, weight, nodes, node_weights = _check_pairwise(input, weight, target, activation, lam, lam_weight)
    except Exception as error:
        if name:
            ops.refuse(name, error)
        raise
    loss = ops.pairwise_mixup_loss(input, weight, target, nodes, node_weights, activation.polynomial, name)
    return loss if input.dim() == 4 or weight.dim() == 4 else loss[0]


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
) -> tuple[Tensor, Tensor]:
    r"""Train networks by full-batch gradient descent, all steps in one call, as a loop of :class:`torch.optim.SGD`::

        for t in range(steps):
            loss[t] = L(w)
            v = momentum v + dL/dw + weight_decay w        # v = 0 before the first step
            w = w - lr v

    L is :func:`pairwise_mixup_loss`, or, with ``lam=None``, the mean cross-entropy of the samples as they are (ERM).
    Every run descends on its own loss, and one that leaves the finite numbers does not disturb the others: from then
    on its losses are not finite.

    On the CPU backend the loop is native code. A thread takes many steps of one network at a time, and all threads are
    busy while there are as many networks.

    Args:
        input: x, (N,P,D); or (R,N,P,D), data of R networks. Any strides.
        weight: the initial w, (C,M,D); or (R,C,M,D), R independent networks.
        target: y, classes in [0, C), (N,) int64; or (R,N), where the runs' data differ.
        activation: phi.
        lam: None for plain cross-entropy; otherwise as :func:`pairwise_mixup_loss` takes it, 1/2 being Midpoint Mixup.
        lam_weight: (K,) weights of the nodes, on the CPU, of sum 1.
        lr: step size: a finite number, not negative; or a floating-point tensor on the CPU, (steps,) for a schedule,
            (R,) for a step size of each run, or their outer shape: (R,steps), (R,1) or (1,steps). Where R = steps > 1
            one dimension would be ambiguous, and is refused.
        steps: number of steps; with 0 the weight is returned as it is.
        momentum: in [0, 1).
        weight_decay: finite, not negative. It is not part of the loss returned.

    Returns:
        (weight, loss): weight after the last step, (C,M,D), or (R,C,M,D) if input or weight has the run dimension, of
        weight's dtype; loss before each step's update, (steps,) or (R,steps), float32, or float64 for float64.

    A run of half precision is computed in float32, its weight included, which is rounded when it is returned. Autocast
    changes nothing but that input is cast to weight's dtype. A run may be cut in pieces: without momentum, and in
    float32 or float64, the result is the same, bit for bit; momentum starts at 0 with every call.

    Not differentiable: the backward pass raises. Nothing is mutated.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, fewer than 2 classes; lam outside [0, 1], or lam_weight that does
            not fit it; lr negative, not finite or of a wrong shape; steps < 0; momentum outside [0, 1); weight_decay
            negative or not finite.
        IndexError: a target outside [0, C) on a CPU. On CUDA, where it cannot be read without waiting for the device,
            it makes that run's loss and weight NaN.
    """
    if isinstance(input, Tensor) and isinstance(weight, Tensor) and torch.is_autocast_enabled(input.device.type):
        input = input.to(weight.dtype)
        with torch.autocast(input.device.type, enabled=False):
            return gradient_descent(
                input, weight, target, activation, lam=lam, lam_weight=lam_weight, lr=lr, steps=steps,
                momentum=momentum, weight_decay=weight_decay,
            )  # fmt: skip
    _, _, nodes, node_weights = _check_pairwise(
        input, weight, target, activation, 0.5 if lam is None else lam, lam_weight
    )
    _check_integer("steps", steps, 0)
    for name, value in (("momentum", momentum), ("weight_decay", weight_decay)):
        _check_not_negative(name, value)
    if momentum >= 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    runs = input.shape[:-3] or weight.shape[:-3]
    rates = _check_lr(lr, runs, steps)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    trained, loss, _ = ops.gradient_descent(
        input.to(dtype), weight.to(dtype), target, None if lam is None else nodes, node_weights, activation.polynomial,
        rates, steps, float(momentum), float(weight_decay),
    )  # fmt: skip
    trained = trained.to(weight.dtype)
    return (trained, loss) if runs else (trained[0], loss[0])


def beta_quadrature(
    alpha: float, num_nodes: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Nodes and weights that average over lam ~ Beta(alpha, alpha), exactly for polynomials up to degree 2K - 1.

    Gauss-Jacobi quadrature on [0, 1], by the eigenvalues of the Jacobi matrix (Golub and Welsch, 1969). Nodes are
    ascending and symmetric about 1/2; alpha = 1 is Gauss-Legendre.

    Args:
        alpha: parameter of the distribution, > 0.
        num_nodes: K, at least 1.
        dtype: floating-point dtype of the results.
        device: of the results; :func:`pairwise_mixup_loss` takes them on the CPU.

    Returns:
        (lam, lam_weight), both (K,); weights are not negative and sum to 1.

    Raises:
        TypeError, ValueError: an alpha that is not a positive finite number, a num_nodes that is no positive integer, a
            dtype that is not floating-point.
    """
    _check_alpha(alpha)
    _check_integer("num_nodes", num_nodes, 1)
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
    """Draw a partner for each sample of a batch, and how much of itself each keeps: what :func:`mixup` takes.

    Everything is drawn on the device, and nothing waits for it.

    Args:
        num_samples: N >= 0, odd numbers included.
        alpha: lam ~ Beta(alpha, alpha), alpha > 0; 1 is uniform. Small alpha leaves most samples almost as they are.
        lam: this number in [0, 1] instead of a draw; 0.5 is Midpoint Mixup.
        per_sample: a lam for each sample instead of one for all.
        generator: source of all randomness. Draws are made on its device, so that a CPU generator gives the same on
            every device.
        device: of the results; by default that of ``generator``, else torch's default.

    Returns:
        (index, lam): partners (N,) int64, a random permutation; lam (), or (N,) if ``per_sample``, float32.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it needs.
    """
    _check_integer("num_samples", num_samples, 0)
    _check_sampling(alpha, lam, generator)
    if device is None:
        # of an empty tensor, because torch.compile cannot trace torch.get_default_device
        device = torch.empty(0).device if generator is None else generator.device
    source = torch.device(device) if generator is None else generator.device
    index = torch.randperm(num_samples, generator=generator, device=source)
    shape = (num_samples,) if per_sample else ()
    if lam is None:
        # Gamma(a) is Gamma(a + 1) U^(1/a): logarithms stay finite where, for small a, most draws would be 0
        concentration = torch.full((2, *shape), alpha + 1.0, dtype=torch.float64, device=source)
        uniform = torch.rand(concentration.shape, generator=generator, dtype=torch.float64, device=source)
        gamma = torch._standard_gamma(concentration, generator=generator)
        first, second = (gamma.log() + (1 - uniform).log() / alpha).unbind()
        weight = torch.sigmoid(first - second).float()
    else:
        weight = torch.full(shape, float(lam), dtype=torch.float32, device=device)
    return index.to(device), weight.to(device)


def mixup(input: Tensor, index: Tensor, lam: float | Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Interpolate each sample of a batch with its partner, in one pass over memory::

        z_n = lam_n x_n + (1 - lam_n) x_{index_n}

    Zhang et al., "mixup: Beyond Empirical Risk Minimization" (ICLR 2018). On hidden activations, inside a network's
    forward, it is Manifold Mixup.

    Args:
        input: x, (N, ...): float32, bfloat16, float16, float64, or uint8, as images are stored. Any strides; the result
            has the memory format of the samples (channels_last stays channels_last).
        index: partner of each sample, (N,) int64, any map into [0, N).
        lam: weight of the sample itself; its partner has 1 - lam. A number in [0, 1], or a floating-point tensor of
            shape () or (N,), which must not require grad and is not rounded to a half-precision input's dtype.
        dtype: of the result, floating; by default input's, for uint8 torch's default. Values are not scaled: those of
            uint8 stay in [0, 255].

    Returns:
        z, of input's shape. Gradients flow to ``input``; differentiating twice raises.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, lam outside [0, 1].
        IndexError: an index outside [0, N) on a CPU. On CUDA, where it cannot be read without waiting for the device,
            it makes that sample NaN.
    """
    _check_is_tensor("input", input)
    if input.dtype not in (*_DTYPES, torch.uint8):
        raise TypeError(f"input must be float32, bfloat16, float16, float64 or uint8, got {input.dtype}")
    if input.dim() == 0:
        raise ValueError("input must have shape (N, ...), got ()")
    if dtype is None:
        dtype = torch.get_default_dtype() if input.dtype == torch.uint8 else input.dtype
    if dtype not in _DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    if dtype != input.dtype and input.dtype != torch.uint8:
        raise TypeError(f"dtype must be input's, {input.dtype}, unless input is uint8; got {dtype}")
    lam = _check_mixing(index, lam, input.shape[0], input.device, dtype)
    return ops.mixup(input, index, lam, dtype)


def mixup_cross_entropy(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: float | Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of mixed samples, with the labels of both: no dense target, and the gradient in the same pass::

        lam CE(input, target_a) + (1 - lam) CE(input, target_b)

    with CE that of :func:`torch.nn.functional.cross_entropy`. With ``reduction="mean"`` each of the two is the mean
    over its own targets that are not ``ignore_index``, a per-sample lam being inside it.

    Args:
        input: logits, (N,C).
        target_a: classes of the samples themselves, (N,) int64, in [0, C) or ``ignore_index``.
        target_b: classes of their partners, likewise.
        lam: weight of ``target_a``; ``target_b`` has 1 - lam. A number in [0, 1], or a floating-point tensor of shape
            () or (N,), which must not require grad.
        label_smoothing: in [0, 1]; this much of each target goes to all classes alike.
        ignore_index: a target that does not count.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss, () or, without reduction, (N,); float32, also for half-precision logits, or float64 for float64. The
        mean over no targets is NaN. Gradients flow to ``input``; differentiating twice raises.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit; lam or label_smoothing outside [0, 1]; no such reduction.
        IndexError: a target out of range on a CPU. On CUDA, where it cannot be read without waiting for the device, it
            makes that row's loss and gradient NaN.
    """
    _check_logits(input)
    _check_loss_options(label_smoothing, ignore_index, reduction)
    for name, target in (("target_a", target_a), ("target_b", target_b)):
        _check_target(target, input.shape[:1], input.device, name)
    lam = _check_lam(lam, input.shape[0], input.device, input.dtype)
    return ops.mixup_cross_entropy(input, target_a, target_b, lam, float(label_smoothing), ignore_index, reduction)


def soft_target_cross_entropy(
    input: Tensor, target: Tensor, *, label_smoothing: float = 0.0, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy to a distribution over the classes for each sample, with the gradient in the same pass::

        - sum_c t_nc log softmax(input_n)_c,    t = (1 - label_smoothing) target + label_smoothing / C

    as :func:`torch.nn.functional.cross_entropy` of dense targets, the mean being over N. What dense targets say of a
    mixed pair :func:`mixup_cross_entropy` takes as two labels, without reading N*C numbers.

    Args:
        input: logits, (N,C).
        target: (N,C), floating, of any sum; must not require grad.
        label_smoothing: in [0, 1].
        reduction: "mean", "sum" or "none".

    Returns:
        The loss, () or, without reduction, (N,); float32, also for half-precision logits, or float64 for float64.
        Gradients flow to ``input``; differentiating twice raises.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, label_smoothing outside [0, 1], no such reduction.
    """
    _check_logits(input)
    _check_loss_options(label_smoothing, -100, reduction)
    if not _is_dense(target) or target.dtype not in _DTYPES:
        raise TypeError(f"target must be a floating-point tensor of probabilities, got {_kind(target)}")
    if target.shape != input.shape:
        raise ValueError(f"target must have input's shape {tuple(input.shape)}, got {tuple(target.shape)}")
    if target.device != input.device:
        raise ValueError(f"target must be on input's device {input.device}, got {target.device}")
    if target.requires_grad:
        raise ValueError("target must not require grad: gradients flow to input only (detach it)")
    return ops.soft_target_cross_entropy(input, target, float(label_smoothing), reduction)


def _check_network(input: Tensor, weight: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Check samples against filters; returns both, cast as autocast says."""
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
    return input, weight


def _check_pairwise(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    activation: Activation,
    lam: float | Tensor,
    lam_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    input, weight = _check_network(input, weight, activation)
    num_samples, num_classes = input.shape[-3], weight.shape[-3]
    if num_classes < 2:
        raise ValueError(
            f"weight must have at least 2 classes (C) for a cross-entropy, got shape {tuple(weight.shape)}"
        )
    runs = input.shape[:-3] or weight.shape[:-3]
    _check_target(target, (*runs, num_samples), input.device)
    return input, weight, *_check_nodes(lam, lam_weight)


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _kind(value: Any) -> str:
    """What a message says of something of the wrong kind."""
    if isinstance(value, Tensor):
        return str(value.dtype if value.layout == torch.strided else value.layout)
    return type(value).__name__


def _check_is_tensor(name: str, value: Tensor) -> None:
    if not _is_dense(value):
        raise TypeError(f"{name} must be a tensor, got {_kind(value)}")


def _check_integer(name: str, value: int, least: int) -> None:
    """Refuse what is no integer of 64 bits, or less than ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value >= 2**63:
        raise ValueError(f"{name} must be less than 2**63, got {value}")


def _check_tensor(name: str, value: Tensor, shape: str) -> None:
    _check_is_tensor(name, value)
    if value.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    if not 3 <= value.dim() <= 4:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")


def _check_mixing(
    index: Tensor | None, lam: float | Tensor | None, samples: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Check partners and their weights for ``samples`` samples; returns lam as kernels take it."""
    if index is None:
        raise ValueError(f"index is needed where lam is given (lam = {lam})")
    if lam is None:
        raise ValueError("lam is needed where index is given; lam = 0.5 is Midpoint Mixup")
    if not _is_dense(index) or index.dtype != torch.int64:
        raise TypeError(f"index must be an int64 tensor, got {_kind(index)}")
    if index.shape != (samples,):
        raise ValueError(f"index must have shape ({samples},), one partner for each sample, got {tuple(index.shape)}")
    if index.device != device:
        raise ValueError(f"index must be on input's device {device}, got {index.device}")
    return _check_lam(lam, samples, device, dtype)


def _check_lam(lam: float | Tensor, samples: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Check the weights of ``samples`` samples; returns them in float32, or float64 for float64."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if not isinstance(lam, Tensor):
        if isinstance(lam, bool) or not isinstance(lam, Real):
            raise TypeError(f"lam must be a number or a tensor, got {lam!r}")
        if not 0 <= lam <= 1:
            raise ValueError(f"lam must be in [0, 1], got {lam}")
        return torch.full((), float(lam), dtype=dtype, device=device)
    if not _is_dense(lam) or not lam.is_floating_point():
        raise TypeError(f"lam must be a floating-point tensor, got {_kind(lam)}")
    if lam.shape != () and lam.shape != (samples,):
        raise ValueError(f"lam must have shape () or ({samples},), got {tuple(lam.shape)}")
    if lam.device != device:
        raise ValueError(f"lam must be on input's device {device}, got {lam.device}")
    if lam.requires_grad:
        raise ValueError("lam must not require grad: it is a constant of the loss")
    return lam.to(dtype)


def _check_not_negative(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{name} must be finite and not negative, got {value}")


def _check_lr(lr: float | Tensor, runs: torch.Size, steps: int) -> Tensor:
    """Step sizes as float64 on the CPU, (1 or R, 1 or steps); the operator checks the values of a tensor."""
    if not isinstance(lr, Tensor):
        _check_not_negative("lr", lr)
        return torch.full((1, 1), float(lr), dtype=torch.float64)
    if not _is_dense(lr) or not lr.is_floating_point():
        raise TypeError(f"lr must be a number or a floating-point tensor, got {_kind(lr)}")
    if lr.device.type != "cpu":
        raise ValueError(f"lr must be on the CPU: reading its values from {lr.device} would wait for the device")
    if lr.requires_grad:
        raise ValueError("lr must not require grad: gradient_descent is not differentiable")
    num_runs = runs[0] if runs else 1
    lr = lr.double()
    if lr.dim() == 0:
        return lr.view(1, 1)
    if lr.dim() == 2 and lr.shape[0] in (1, num_runs) and lr.shape[1] in (1, steps):
        return lr
    fits_runs, fits_steps = (lr.shape == shape for shape in (runs, (steps,)))
    if fits_runs and fits_steps and steps > 1:
        raise ValueError(
            f"lr of shape ({steps},) is ambiguous where R = steps: give (R,1) for the runs' or (1,steps) for the steps'"
        )
    if fits_runs or fits_steps:
        return lr[:, None] if fits_runs else lr[None]
    wanted = f"({steps},) for the steps" + (f" or ({num_runs},) for the runs" if runs else "")
    raise ValueError(f"lr must be a number, {wanted}, or have both dimensions; got shape {tuple(lr.shape)}")


def _check_alpha(alpha: float) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise TypeError(f"alpha must be a number, got {alpha!r}")
    if not 0 < alpha <= sys.float_info.max:
        raise ValueError(f"alpha must be finite and positive, got {alpha} (for Midpoint Mixup pass lam=0.5 instead)")


def _check_sampling(alpha: float, lam: float | None, generator: torch.Generator | None) -> None:
    _check_alpha(alpha)
    if lam is not None:
        if isinstance(lam, bool) or not isinstance(lam, Real):
            raise TypeError(f"lam must be a number, got {lam!r}")
        if not 0 <= lam <= 1:
            raise ValueError(f"lam must be in [0, 1], got {lam}")
    _check_generator(generator)


def _check_generator(generator: torch.Generator | None) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")


def _check_logits(input: Tensor) -> None:
    _check_is_tensor("input", input)
    if input.dtype not in _DTYPES:
        raise TypeError(f"input must be float32, bfloat16, float16 or float64, got {input.dtype}")
    if input.dim() != 2 or input.shape[1] == 0:
        raise ValueError(f"input must have shape (N,C) with C at least 1, got {tuple(input.shape)}")


def _check_loss_options(label_smoothing: float, ignore_index: int, reduction: str) -> None:
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, Real):
        raise TypeError(f"label_smoothing must be a number, got {label_smoothing!r}")
    _check_integer("ignore_index", ignore_index, -(2**63))
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def _check_target(target: Tensor, shape: tuple[int, ...], device: torch.device, name: str = "target") -> None:
    if not _is_dense(target) or target.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor of classes, got {_kind(target)}")
    if target.shape != shape and target.shape != shape[-1:]:
        shapes = " or ".join(str(tuple(s)) for s in dict.fromkeys((shape[-1:], shape)))
        raise ValueError(f"{name} must have shape {shapes}, one class for each sample, got {tuple(target.shape)}")
    if target.device != device:
        raise ValueError(f"{name} must be on input's device {device}, got {target.device}")


def _check_nodes(lam: float | Tensor, lam_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Nodes and weights as (K,) tensors on the CPU; the operator checks their values."""
    if not isinstance(lam, Tensor):
        if isinstance(lam, bool) or not isinstance(lam, Real):
            raise TypeError(f"lam must be a number, or a tensor of nodes with lam_weight, got {lam!r}")
        if not 0 <= lam <= 1:
            raise ValueError(f"lam must be in [0, 1], got {lam}")
        lam = torch.full((), float(lam), dtype=torch.float64)
    if lam_weight is None:
        if lam.dim() != 0:
            raise ValueError(f"lam_weight is needed where lam is a tensor of nodes (lam has shape {tuple(lam.shape)})")
        lam, lam_weight = lam[None], torch.ones(1, dtype=torch.float64)
    elif lam.dim() != 1 or lam.shape[0] == 0:
        raise ValueError(f"lam must be a tensor of nodes (K,) where lam_weight is given, got shape {tuple(lam.shape)}")
    for name, value in (("lam", lam), ("lam_weight", lam_weight)):
        if not _is_dense(value) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {_kind(value)}")
        if value.shape != lam.shape:
            raise ValueError(f"{name} must have lam's shape {tuple(lam.shape)}, got {tuple(value.shape)}")
        if value.device.type != "cpu":
            raise ValueError(
                f"{name} must be on the CPU: its values decide which pairs are visited, and reading them from "
                f"{value.device} would wait for the device"
            )
        if value.requires_grad:
            raise ValueError(f"{name} must not require grad: gradients flow to input and weight only")
    return lam, lam_weight
