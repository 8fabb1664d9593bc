"""Other packages' own classes and functions as contenders, where they can be imported.

Classes that mix a batch draw partners and lam themselves. What they drew is read off the labels that they return, and
their images are compared with mixfeat's for the same draw.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

import mixfeat as mf
from mixfeat.activations import PolyReLU

from .timing import CUDA, Contender

__all__ = [
    "BINARY_LOSSES", "CUTMIX", "HEADS", "LOSSES", "MIXUP", "PAIRS", "SOFT_LOSSES", "MissingError", "gather", "mixers",
    "mixup_of_bytes",
]  # fmt: skip

#: A function that mixes a batch and its labels, and one that reads partners and lam off the mixed labels.
Mixer = tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], Callable[[Tensor], tuple[Tensor, Tensor]]]
T = TypeVar("T")


class MissingError(Exception):
    """A package cannot serve a case; the message says why."""


def gather(makers: Mapping[str, Callable[[], T]]) -> tuple[dict[str, T], dict[str, str]]:
    """Make what can be made; return it, and for the rest the reason."""
    found, missing = {}, {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except (ImportError, MissingError) as error:
            missing[name] = str(error)
    return found, missing


# images


def _read_dense(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Read partners and lam off mixed labels (N,N) of samples that have a class each."""
    lam = targets.diagonal()
    return (targets - lam.diag()).argmax(1), lam


def _timm(classes: int, **options: float) -> Mixer:
    from timm.data.mixup import Mixup

    return Mixup(label_smoothing=0.0, num_classes=classes, **options), _read_dense


def _torchvision(classes: int, kind: str) -> Mixer:
    from torchvision.transforms import v2

    return getattr(v2, kind)(alpha=1.0, num_classes=classes), _read_dense


def _kornia_mixup(classes: int) -> Mixer:
    from kornia.augmentation import RandomMixUpV2

    mix = RandomMixUpV2(p=1.0, data_keys=["input", "class"])
    return mix, lambda targets: (targets[:, 1].long(), 1 - targets[:, 2])  # theirs is the partner's share


def _kornia_cutmix(classes: int) -> Mixer:
    from kornia.augmentation import RandomCutMixV2

    mix = RandomCutMixV2(p=1.0, data_keys=["input", "class"], use_correct_lambda=True)
    return mix, lambda targets: (targets[0, :, 1].long(), targets[0, :, 2])


#: What makes a mixer for a number of classes.
MIXUP: dict[str, Callable[[int], Mixer]] = {
    "timm": functools.partial(_timm, mixup_alpha=1.0),
    "torchvision": functools.partial(_torchvision, kind="MixUp"),
    "kornia": _kornia_mixup,
}
CUTMIX: dict[str, Callable[[int], Mixer]] = {
    "timm": functools.partial(_timm, mixup_alpha=0.0, cutmix_alpha=1.0),
    "torchvision": functools.partial(_torchvision, kind="CutMix"),
    "kornia": _kornia_cutmix,
}


def mixers(makers: Mapping[str, Callable[[int], Mixer]], x: Tensor) -> tuple[dict[str, Contender], dict[str, str]]:
    """Make contenders that mix images ``x`` (N,C,H,W) of 10 classes, each compared with mixfeat; see :func:`gather`."""
    labels, scratch = torch.randint(10, x.shape[:1], device=x.device), x.detach().clone()  # timm overwrites its input

    def contender(name: str) -> Contender:
        if x.dim() != 4 or (name == "timm" and len(x) % 2):
            raise MissingError("takes images (N,C,H,W), timm an even number")
        mix, _ = makers[name](10)
        _check_mixer(name, makers[name](len(x)), torch.rand(x.shape, device=x.device))
        return lambda: mix(scratch, labels)[0]

    return gather({name: functools.partial(contender, name) for name in makers})


def _check_mixer(name: str, mixer: Mixer, x: Tensor) -> None:
    """Fail if the mixed batch differs from mixfeat's of the same draw, by mixup or else by cutmix."""
    mix, read = mixer
    mixed, targets = mix(x.clone(), torch.arange(len(x), device=x.device))
    index, lam = read(targets)
    if torch.allclose(mixed, mf.mixup(x, index, lam), 1e-4, 1e-5):
        return
    inside = (mixed != x).any(1)  # the pixels of the partner, in a box that surrounds them
    sides = inside.any(2).int(), inside.any(1).int()
    edges = [edge for side in sides for edge in (side.argmax(1), side.shape[1] - side.flip(1).argmax(1))]
    box = torch.stack(edges, 1) * inside.any(2).any(1)[:, None]
    same = index == torch.arange(len(x), device=x.device)  # whatever their lam
    share = (1 - inside.float().mean((1, 2))).where(~same, lam)
    right = torch.allclose(mixed, mf.cutmix(x, index, box), 1e-4, 1e-5) and torch.allclose(share, lam, 1e-3, 1e-3)
    assert right, f"{name} mixes otherwise than its labels say"


def mixup_of_bytes() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return mixup of bytes into float32 by OpenCV's ``addWeighted``: sample by sample, so that nothing is gathered."""
    import cv2

    def mixup(input: Tensor, index: Tensor, lam: Tensor) -> Tensor:
        images, output = input.flatten(1).numpy(), torch.empty(input.shape)
        share, rows = lam.item(), output.flatten(1).numpy()
        for row, image, partner in zip(rows, images, index.tolist(), strict=True):
            cv2.addWeighted(image, share, images[partner], 1 - share, 0, dst=row, dtype=cv2.CV_32F)
        return output

    return mixup


# losses


def _twice(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Make the loss of mixed samples of a loss of one label."""
    return lambda input, a, b, lam: lam * loss(input, a) + (1 - lam) * loss(input, b)


def _on_a_gpu() -> None:
    if not CUDA:
        raise MissingError("needs a GPU")


def _timm_loss() -> Callable[..., Tensor]:
    """Return timm's loss of a batch whose second labels are the first in reverse, as timm pairs samples."""
    from timm.data.mixup import mixup_target
    from timm.loss import SoftTargetCrossEntropy

    loss = SoftTargetCrossEntropy()
    return lambda input, a, b, lam: loss(input, mixup_target(a, input.shape[1], lam, 0.0).to(input.dtype))


def _timm_binary_loss() -> Callable[..., Tensor]:
    from timm.data.mixup import mixup_target
    from timm.loss import BinaryCrossEntropy

    loss = BinaryCrossEntropy(smoothing=0.0)
    return lambda input, a, b, lam: loss(input, mixup_target(a, input.shape[1], lam, 0.0).to(input.dtype))


def _timm_soft_loss() -> Callable[..., Tensor]:
    from timm.loss import SoftTargetCrossEntropy

    return SoftTargetCrossEntropy()


def _liger() -> Callable[..., Tensor]:
    _on_a_gpu()
    from liger_kernel.transformers.functional import liger_cross_entropy

    return _twice(lambda input, target: liger_cross_entropy(input.clone(), target))  # the gradient goes over its input


def _quack() -> Callable[..., Tensor]:
    _on_a_gpu()
    from quack.cross_entropy import cross_entropy

    return _twice(cross_entropy)


def _flash_attention() -> Callable[..., Tensor]:
    _on_a_gpu()
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return _twice(lambda input, target: cross_entropy_loss(input, target)[0].mean())


def _cut_cross_entropy() -> Callable[..., Tensor]:
    """Return Apple's loss of hidden features (N,D) and a classifier (C,D), which never forms the logits."""
    _on_a_gpu()
    from cut_cross_entropy import linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
        return lam * linear_cross_entropy(hidden, weight, a) + (1 - lam) * linear_cross_entropy(hidden, weight, b)

    return loss


def _keops() -> Callable[..., Tensor]:
    """Return the midpoint loss of all pairs as a reduction by KeOps, which never stores them.

    KeOps compiles a formula for the numbers of classes and features; those of its gradient take minutes.
    """
    from pykeops.torch import Vi, Vj

    def loss(input: Tensor, weight: Tensor, target: Tensor, activation: PolyReLU) -> Tensor:
        rho, degree = activation.rho, activation.degree
        s = torch.einsum("npd,cmd->cnpm", input, weight).flatten(2) * (0.5 / rho)
        label = F.one_hot(target, len(weight)).to(s).t()[..., None].contiguous()
        total: Any = 0
        own: Any = 0
        for of_class, is_class in zip(s, label, strict=True):
            t = Vi(of_class) + Vj(of_class)
            logit = (t.clamp(0, 1) ** degree / degree + (t - 1).relu()).sum(-1) * rho
            total, own = logit.exp() + total, logit * Vi(is_class) + own
        return (total.log() - own).sum(1).mean() / len(input)  # symmetric: the label of i stands for that of j too

    return loss


PAIRS = {"KeOps": _keops}
LOSSES = {"timm": _timm_loss, "Liger": _liger, "quack": _quack, "flash-attention": _flash_attention}
BINARY_LOSSES = {"timm": _timm_binary_loss}
SOFT_LOSSES = {"timm": _timm_soft_loss}
HEADS = {"cut-cross-entropy": _cut_cross_entropy}
