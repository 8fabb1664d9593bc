"""Which features a patch-wise network has learned, measured from its weights and from its test accuracy."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mixfeat import _checks
from mixfeat.activations import Activation
from mixfeat.data import MultiViewData

__all__ = ["alignment", "feature_variance", "learned", "noise_memorization"]


def alignment(weight: Tensor, features: Tensor) -> Tensor:
    """Return the alignment of each class's best filter with each of its features.

    ::

        alignment[c, v] = max_m <weight[c, m], features[c, v]>

    On :class:`mixfeat.data.SignalNoiseData` it is the signal learning of Cao et al. 2022, max_m <w[y,m], y mu>. On
    :class:`mixfeat.data.CommonRareData` it measures the common feature (v = 0) and the rare one (v = 1).

    Args:
        weight: (..., C, M, D), e.g. ``model.weight``; floating.
        features: (..., C, V, D), e.g. ``MultiViewData.features``, with any number of views V; leading dimensions
            broadcast against those of ``weight``.

    Returns:
        (..., C, V), of the dtype to which both promote. No gradient.

    Raises:
        TypeError, ValueError: a tensor that is not floating, or shapes that do not agree.
    """
    _check_tensor("weight", weight, "C, M, D")
    _check_tensor("features", features, "C, V, D")
    if weight.shape[-3] != features.shape[-3] or weight.shape[-1] != features.shape[-1]:
        raise ValueError(
            "features must have the classes C and the patch dimension D of weight, "
            f"got {tuple(features.shape)} for weight {tuple(weight.shape)}"
        )
    _check_broadcast("features'", features, weight)
    dtype = torch.promote_types(weight.dtype, features.dtype)
    with torch.no_grad():
        return (weight.to(dtype) @ features.to(dtype).mT).amax(-2)


def noise_memorization(weight: Tensor, noise: Tensor, target: Tensor) -> Tensor:
    """Return how strongly the filters of each class have memorized the noise of one of its samples (Cao et al. 2022).

    ::

        noise_memorization[c] = max over m, and over samples n of class c and their noise patches p, of
                                <weight[c, m], noise[n, p]>

    Args:
        weight: (..., C, M, D), e.g. ``model.weight``; floating.
        noise: (..., N, P, D), e.g. ``SignalNoiseData.noise``; leading dimensions broadcast against those of ``weight``.
        target: (N,) int64, classes of the samples, in [0, C).

    Returns:
        (..., C), of the dtype to which both promote; -inf for a class without samples. No gradient.

    Raises:
        TypeError, ValueError, IndexError: an invalid argument; the message names it, the value and the requirement.
    """
    _check_tensor("weight", weight, "C, M, D")
    _check_tensor("noise", noise, "N, P, D")
    if weight.shape[-1] != noise.shape[-1] or not noise.shape[-2]:
        raise ValueError(
            "noise must have the patch dimension D of weight and at least one patch, "
            f"got {tuple(noise.shape)} for weight {tuple(weight.shape)}"
        )
    _check_broadcast("noise's", noise, weight)
    _check_classes(target, noise.shape[-3], weight)
    dtype = torch.promote_types(weight.dtype, noise.dtype)
    classes = range(weight.shape[-3])
    with torch.no_grad():
        noise = noise.to(dtype)
        best = [
            (noise[..., target == c, :, :].flatten(-3, -2) @ weight[..., c, :, :].to(dtype).mT).flatten(-2)
            for c in classes
        ]
        empty = weight.new_full((1,), -torch.inf, dtype=dtype)
        return torch.stack([torch.cat([b, empty.expand(*b.shape[:-1], 1)], -1).amax(-1) for b in best], -1)


def feature_variance(weight: Tensor, input: Tensor, target: Tensor, features: Tensor, activation: Activation) -> Tensor:
    """Return the variance of each class's output over its samples that is due to each of its features alone.

    ::

        output[n, c, v] = sum_{p,m} phi(<weight[c, m], the part of input[n, p] along features[c, v]>)
        feature_variance[c, v] = the variance of output[n, c, v] over the samples n of class c

    Training with label smoothing or Mixup prefers features of low variance (Chidambaram and Ge 2024, arXiv
    2402.06855). The definition by projection is ours.

    Args:
        weight: (..., C, M, D), e.g. ``model.weight``; floating.
        input: (N,P,D), the samples.
        target: (N,) int64, their classes, in [0, C).
        features: (C,V,D), none of them 0.
        activation: phi.

    Returns:
        (..., C, V), of the dtype to which all promote: the biased variance; NaN for a class without samples. No
        gradient.

    Raises:
        TypeError, ValueError, IndexError: an invalid argument; the message names it, the value and the requirement.
    """
    _check_tensor("weight", weight, "C, M, D")
    _check_tensor("features", features, "C, V, D")
    _check_tensor("input", input, "N, P, D")
    _checks.activation(activation)
    classes, _, patch_dim = weight.shape[-3:]
    if features.dim() != 3 or (features.shape[0], features.shape[2]) != (classes, patch_dim):
        raise ValueError(
            "features must be (C,V,D) with the classes C and the patch dimension D of weight, "
            f"got {tuple(features.shape)} for weight {tuple(weight.shape)}"
        )
    if input.dim() != 3 or input.shape[2] != patch_dim:
        raise ValueError(
            "input must be (N,P,D) with the patch dimension D of weight, "
            f"got {tuple(input.shape)} for weight {tuple(weight.shape)}"
        )
    _check_classes(target, len(input), weight)
    dtype = torch.promote_types(torch.promote_types(weight.dtype, features.dtype), input.dtype)
    weight, features, input = (t.detach().to(dtype) for t in (weight, features, input))
    variances = []
    for c in range(classes):
        share = input[target == c] @ features[c].mT / features[c].square().sum(-1)  # (n, P, V)
        along = weight[..., c, :, :] @ features[c].mT  # (..., M, V)
        output = activation(along[..., None, None, :, :] * share[:, :, None, :]).sum((-3, -2))  # (..., n, V)
        variances.append(output.var(-2, correction=0))
    return torch.stack(variances, -2)


def learned(
    model: Callable[[Tensor], Tensor], data_of_each_view: Sequence[MultiViewData], threshold: float = 0.9
) -> Tensor:
    """Find which features of which classes the model has learned (Chidambaram et al. 2023).

    Feature v of class c is learned when more than ``threshold`` of the test points of class c whose signal patches all
    carry that view (``multi_view(..., views=v)``) are classified as c. A tie for the largest logit counts as wrong.

    Args:
        model: maps patches (N,P,D) to logits (N,C), or to (R,N,C) if it holds R networks, which see the same input
            (N,P,D) or each its own (R,N,P,D). A module is evaluated in eval mode, then returned to its mode.
        data_of_each_view: test points of view 0, view 1, ...: each a :class:`mixfeat.data.MultiViewData`, or an object
            with ``input`` and ``target`` (N,) or (R,N). Every class must occur.
        threshold: accuracy above which a feature counts as learned, in [0, 1).

    Returns:
        bool (C, V), or (R, C, V).

    Raises:
        TypeError, ValueError: an invalid argument; the message names it, the value and the requirement.
    """
    threshold = _checks.real("threshold", threshold)
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be in [0, 1), got {threshold}")
    if isinstance(data_of_each_view, Tensor | MultiViewData) or not isinstance(data_of_each_view, Sequence):
        raise TypeError(
            f"data_of_each_view must be a sequence with the data of each view, got {type(data_of_each_view).__name__}"
        )
    if not data_of_each_view:
        raise ValueError("data_of_each_view must hold the data of at least one view, got none")
    modes = {m: m.training for m in model.modules()} if isinstance(model, torch.nn.Module) else {}
    try:
        if isinstance(model, torch.nn.Module):
            model.eval()
        with torch.no_grad():
            views = [_accuracy_of_classes(model, data, i) > threshold for i, data in enumerate(data_of_each_view)]
    finally:
        for module, training in modes.items():
            module.training = training
    return torch.stack(views, dim=-1)


def _accuracy_of_classes(model: Callable[[Tensor], Tensor], data: Any, view: int) -> Tensor:
    logits = model(data.input)
    target = data.target
    if logits.shape[:-1] != target.shape and logits.shape[-2:-1] != target.shape:
        raise ValueError(
            f"data_of_each_view[{view}].target must have one class per row of the logits {tuple(logits.shape)}, "
            f"got shape {tuple(target.shape)}"
        )
    target = target.expand(logits.shape[:-1]).unsqueeze(-1)
    rest = logits.scatter(-1, target, -torch.inf).amax(-1, keepdim=True)
    correct = logits.gather(-1, target) > rest
    member = torch.zeros(logits.shape, device=logits.device, dtype=torch.float64).scatter_(-1, target, 1)
    count = member.sum(-2)
    if not (count > 0).all():
        missing = int((count == 0).nonzero()[0, -1])
        raise ValueError(f"data_of_each_view[{view}] must have test points of every class, got none of class {missing}")
    return (member * correct).sum(-2) / count


def _check_tensor(name: str, value: Any, last: str) -> None:
    _checks.tensor(name, value)
    _checks.floating(name, value)
    if value.dim() < 3:
        shape = tuple(value.shape)
        raise ValueError(f"{name} must have at least 3 dimensions (..., {last}), got shape {shape}")
    if name == "weight" and not value.shape[-2]:
        raise ValueError(f"weight must have at least one filter per class, got shape {tuple(value.shape)}")


def _check_broadcast(whose: str, value: Tensor, weight: Tensor) -> None:
    try:
        torch.broadcast_shapes(weight.shape[:-3], value.shape[:-3])
    except RuntimeError:
        raise ValueError(
            f"{whose} leading dimensions must broadcast against weight's, "
            f"got {tuple(value.shape)} for weight {tuple(weight.shape)}"
        ) from None


def _check_classes(target: Any, samples: int, weight: Tensor) -> None:
    _checks.classes("target", target, (samples,), weight.device)
    _checks.class_values(target, weight.shape[-3])
