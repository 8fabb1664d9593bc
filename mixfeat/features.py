"""Which features a patch-wise network has learned: directly from its weights, and by what it classifies."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mixfeat import _checks
from mixfeat.data import MultiViewData

__all__ = ["alignment", "learned"]


def alignment(weight: Tensor, features: Tensor) -> Tensor:
    """How well the best filter of each class points along each of its features.

    ::

        alignment[c, v] = max_m <weight[c, m], features[c, v]>

    Args:
        weight: (..., C, M, D), e.g. ``model.weight``; floating.
        features: (..., C, V, D), e.g. ``MultiViewData.features``; leading dimensions broadcast against
            those of ``weight``.

    Returns:
        (..., C, V), of the dtype to which both promote. No gradient.

    Raises:
        TypeError, ValueError: for anything but floating tensors whose shapes agree.
    """
    for name, value, last in (("weight", weight, "C, M, D"), ("features", features, "C, V, D")):
        _checks.tensor(name, value)
        _checks.floating(name, value)
        if value.dim() < 3:
            raise ValueError(f"{name} must have at least 3 dimensions (..., {last}), got shape {tuple(value.shape)}")
    if weight.shape[-3] != features.shape[-3] or weight.shape[-1] != features.shape[-1]:
        raise ValueError(
            "features must have the classes C and the patch dimension D of weight, "
            f"got {tuple(features.shape)} for weight {tuple(weight.shape)}"
        )
    if not weight.shape[-2]:
        raise ValueError(f"weight must have at least one filter per class, got shape {tuple(weight.shape)}")
    try:
        torch.broadcast_shapes(weight.shape[:-3], features.shape[:-3])
    except RuntimeError:
        raise ValueError(
            "features' leading dimensions must broadcast against weight's, "
            f"got {tuple(features.shape)} for weight {tuple(weight.shape)}"
        ) from None
    dtype = torch.promote_types(weight.dtype, features.dtype)
    with torch.no_grad():
        return (weight.to(dtype) @ features.to(dtype).mT).amax(-2)


def learned(
    model: Callable[[Tensor], Tensor], data_of_each_view: Sequence[MultiViewData], threshold: float = 0.9
) -> Tensor:
    """Which features of which classes the model has learned (Chidambaram et al. 2023).

    Feature v of class c is learned when more than ``threshold`` of the test points of class c whose signal patches all
    carry that view (``multi_view(..., views=v)``) are classified as c. A tie for the largest logit counts as wrong.

    Args:
        model: from patches to logits: (N,P,D) to (N,C), or to (R,N,C) if it holds R networks, which see the same input
            (N,P,D) or each its own (R,N,P,D). A module is evaluated in eval mode and put back as it was.
        data_of_each_view: test points of view 0, view 1, ...: each a :class:`mixfeat.data.MultiViewData`, or anything
            with ``input`` and ``target`` (N,) or (R,N). Every class must occur.
        threshold: in [0, 1).

    Returns:
        bool (C, V), or (R, C, V).

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it needs.
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
