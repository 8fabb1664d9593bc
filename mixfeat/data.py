"""Data: the multi-view distribution of the feature-learning theory, images of two features, images cut into patches."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mixfeat import _checks

__all__ = ["MultiViewData", "TwoFeatureImages", "images_to_patches", "multi_view"]


class MultiViewData(NamedTuple):
    """A sample of the multi-view distribution.

    Runs with separate data are stacked by the caller: ``input`` (R,N,P,D), ``target`` (R,N), ``features`` (R,C,2,D).
    """

    input: Tensor  #: (N, P, D) patches
    target: Tensor  #: (N,) int64 classes
    features: Tensor  #: (C, 2, D) orthonormal vectors, ``features[c, l]`` is feature l of class c


def multi_view(
    num_samples: int,
    num_classes: int = 10,
    num_patches: int = 12,
    patch_dim: int | None = None,
    *,
    signal: tuple[float, float] = (0.25, 0.5),
    noise: tuple[float, float] = (0.25, 0.75),
    noise_scale: float = 0.02,
    views: Literal["both"] | int = "both",
    features: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> MultiViewData:
    """Draw from the multi-view distribution of Chidambaram et al. 2023 (arXiv 2210.13512, section 3).

    Every class y has two features (views) v[y,0] and v[y,1]; all features are orthonormal. A point of class y has, at
    two random positions, its signal patches::

        c v[y,0]   and   (signal[0] + signal[1] - c) v[y,1],     c ~ U[signal]

    and in every other patch feature noise, each gamma drawn independently::

        sum over s != y and l of  gamma v[s,l],                  gamma ~ noise_scale * U[noise]

    With ``views=0`` or ``views=1`` both signal patches carry that view only: the test points that tell which features
    a network has learned (:func:`mixfeat.features.learned`). Classes are balanced (their counts differ by at most one)
    and in random order.

    Args:
        num_samples: N >= 0.
        num_classes: C >= 1 (k in the paper).
        num_patches: P >= 2.
        patch_dim: D >= 2 C; by default 2 C, or the features' own.
        signal: range of a signal coefficient; the two coefficients of a point sum to ``signal[0] + signal[1]``.
        noise: range of a noise coefficient, before ``noise_scale``.
        noise_scale: >= 0. The default separates ERM from Midpoint Mixup at C = 10; the authors' code has 10 / C**1.5.
        views: ``"both"``, 0 or 1.
        features: (C, 2, D) orthonormal features; by default drawn uniformly among all orthonormal sets.
        generator: source of all randomness. Draws are made on its device, so that a CPU generator gives the same data
            on every device.
        device: of the result; by default that of ``features``, else of ``generator``, else torch's default.
        dtype: of the result, floating; by default that of ``features``, else torch's default.

    Returns:
        ``MultiViewData(input (N,P,D), target (N,) int64, features (C,2,D))``.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it needs.
    """
    num_samples = _checks.integer("num_samples", num_samples, 0)
    num_classes = _checks.integer("num_classes", num_classes, 1)
    num_patches = _checks.integer("num_patches", num_patches, 2)
    signal_low, signal_high = _checks.interval("signal", signal)
    noise_low, noise_high = _checks.interval("noise", noise)
    noise_scale = _checks.finite("noise_scale", noise_scale, 0)
    views = _views(views)
    _checks.generator(generator)
    if features is not None:
        _check_features(features, num_classes)
    patch_dim = _patch_dim(patch_dim, num_classes, features)
    if dtype is None:
        dtype = torch.get_default_dtype() if features is None else features.dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got {dtype}")
    if device is None:
        source = generator if features is None else features
        device = torch.get_default_device() if source is None else source.device
    draw_device = torch.device(device) if generator is None else generator.device
    compute = torch.float64 if dtype == torch.float64 else torch.float32

    def uniform(*size: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(size, generator=generator, device=draw_device, dtype=compute).mul_(high - low).add_(low)

    if features is None:
        features = _orthonormal(2 * num_classes, patch_dim, generator, draw_device).view(num_classes, 2, patch_dim)
    order = torch.randperm(num_samples, generator=generator, device=draw_device)
    target = order % num_classes

    # a patch is its coefficients over all features, times the features: noise first, then the signal over it
    coefficient = uniform(num_samples, num_patches, num_classes, 2, low=noise_low, high=noise_high).mul_(noise_scale)
    sample = torch.arange(num_samples, device=draw_device)
    coefficient[sample, :, target] = 0
    position = uniform(num_samples, num_patches).argsort(1)[:, :2]
    first = uniform(num_samples, low=signal_low, high=signal_high)
    coefficient[sample[:, None], position] = 0
    for i, value in enumerate((first, signal_low + signal_high - first)):
        coefficient[sample, position[:, i], target, i if views == "both" else views] = value

    basis = features.to(draw_device, compute).flatten(0, 1)
    input = coefficient.flatten(2) @ basis
    return MultiViewData(input.to(device, dtype), target.to(device), features.to(device, dtype))


def images_to_patches(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into the square patches that tile them.

    Args:
        images: (N, channels, H, W), any dtype.
        patch_size: side of a patch; it divides H and W.

    Returns:
        (N, P, D): P = H W / patch_size**2 patches in row-major order, each of D = channels * patch_size**2 values in
        the order (channel, row, column).

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it needs.
    """
    _check_images(images)
    patch_size = _checks.integer("patch_size", patch_size, 1)
    num, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"patch_size must divide the images' height and width, got {patch_size} for {height} x {width}"
        )
    rows, columns = height // patch_size, width // patch_size
    grid = images.reshape(num, channels, rows, patch_size, columns, patch_size).permute(0, 2, 4, 1, 3, 5)
    return grid.reshape(num, rows * columns, channels * patch_size**2)


class TwoFeatureImages:
    """An image data set made to have two features per class (Chidambaram et al. 2023, section 5).

    Classes are paired. Each image x of class y gets for good one image e, drawn uniformly from those of the class that
    is paired with y; the two are concatenated along channels, and the label is y. What is x in one class is e in the
    other, so either half alone tells the class::

        views="both"    [w x, (1 - w) e],   w ~ U[weight] anew at every access  training
        views=0         [x, 0]                                                  the paper's test
        views=1         [0, e]                                                  has the second feature been learned?

    ``data[index]`` is :meth:`batch`: whole batches, made on the images' device without waiting for it. With a
    ``torch.utils.data.DataLoader`` use it as any other data set; fastest is ``batch_size=None`` with a
    ``BatchSampler`` as sampler. Worker processes each have a copy of ``generator``, and so would draw the same:
    with them leave it None.

    Args:
        images: (N, channels, H, W), floating, with any normalisation already done; kept, not copied.
        target: (N,) int64 classes, on the images' device.
        views: ``"both"``, 0 or 1.
        partner_class: (C,) int64, the class paired with each; by default a random pairing, the first thing drawn. Test
            data need that of the training data: ``partner_class=train.partner_class``.
        weight: range of w, within [0, 1]; the paper's is (0, 1). With (0.5, 1) e is the weaker feature of every
            sample.
        generator: source of all randomness. Draws are made on its device; batches wait for nothing if that is the
            images'. By default torch's own there.

    Attributes:
        images, target, views, weight: as given.
        partner_class: (C,) int64.
        partner: (N,) int64, the place of e among the images; None for ``views=0``.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it needs. Among them an odd number of classes,
            and, but for ``views=0``, which needs no e, a class without images.
    """

    def __init__(
        self,
        images: Tensor,
        target: Tensor,
        *,
        views: Literal["both"] | int = "both",
        partner_class: Tensor | None = None,
        weight: tuple[float, float] = (0.0, 1.0),
        generator: torch.Generator | None = None,
    ) -> None:
        _check_images(images)
        if not images.is_floating_point():
            raise TypeError(
                f"images must be of a floating-point type, got {images.dtype}: normalise them first, as in images / 255"
            )
        _check_classes(target, images)
        views = _views(views)
        _checks.generator(generator)
        self.weight = _weight(weight)
        least = int(target.max()) + 1 if len(target) else 0
        if partner_class is not None:
            _check_pairing(partner_class, least)
        elif least % 2:
            raise ValueError(f"target must have an even number of classes, as they are paired, got {least}")
        self.images, self.target, self.views = images, target, views
        self._generator = generator
        if partner_class is None:
            partner_class = _pairing(least, generator, self._draw_device)
        self.partner_class = partner_class.to(images.device)
        self.partner = None if views == 0 else self._draw_partners()

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: int | Sequence[int] | slice | Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`batch`, or for an int one sample, (2 channels, H, W), and its class ()."""
        if isinstance(index, Tensor) and index.dim():
            return self.batch(index)
        if isinstance(index, slice):
            index = range(*index.indices(len(self)))
        if isinstance(index, Sequence) and not isinstance(index, str):
            return self.batch(torch.tensor([_checks.integer("index", i, -(2**63)) for i in index], dtype=torch.int64))
        input, target = self[[index]]  # type: ignore[list-item]
        return input[0], target[0]

    def __getitems__(self, index: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """What a DataLoader asks for: the samples of a batch, one by one."""
        return list(zip(*self[index], strict=True))

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Samples with new weights w.

        Args:
            index: (B,) int64; repeated and negative ones are served as in ``images[index]``.

        Returns:
            input (B, 2 channels, H, W) of the images' dtype, target (B,) int64.

        Raises:
            TypeError, ValueError: an index of another type or shape.
            IndexError: one out of range, as indexing a tensor raises it.
        """
        _checks.int64_tensor("index", index)
        if index.dim() != 1:
            raise ValueError(f"index must be of shape (B,), got {tuple(index.shape)}")
        index = index.to(self.images.device)
        own = self.images[index]
        if self.partner is None:
            halves = [own, torch.zeros_like(own)]
        elif self.views == 1:
            halves = [torch.zeros_like(own), self.images[self.partner[index]]]
        else:
            # in float32 at least: w is not rounded to half precision before it is used
            dtype = torch.promote_types(own.dtype, torch.float32)
            weight = torch.rand(len(index), 1, 1, 1, generator=self._generator, device=self._draw_device, dtype=dtype)
            low, high = self.weight
            weight = weight.mul_(high - low).add_(low).to(own.device)
            halves = [weight * own, (1 - weight) * self.images[self.partner[index]]]
        return torch.cat(halves, 1).to(own.dtype), self.target[index]

    @property
    def _draw_device(self) -> torch.device:
        return self.images.device if self._generator is None else self._generator.device

    def _draw_partners(self) -> Tensor:
        """(N,) the place of an image of the paired class, each as likely as any other."""
        count = self.target.bincount(minlength=len(self.partner_class))
        if not count.all():
            missing = int((count == 0).nonzero()[0])
            raise ValueError(f"target must have images of every class, got none of class {missing}")
        members = self.target.argsort(stable=True)  # grouped by class
        paired = self.partner_class[self.target]
        uniform = torch.rand(len(self), generator=self._generator, device=self._draw_device, dtype=torch.float64)
        within = (uniform.to(paired.device) * count[paired]).long().minimum(count[paired] - 1)
        return members[(count.cumsum(0) - count)[paired] + within]


def _pairing(num_classes: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """(C,) a perfect matching of the classes, all equally likely."""
    first, second = torch.randperm(num_classes, generator=generator, device=device).view(2, num_classes // 2)
    partner_class = torch.empty(num_classes, dtype=torch.int64, device=device)
    partner_class[first], partner_class[second] = second, first
    return partner_class


def _orthonormal(count: int, dim: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    gaussian = torch.randn(dim, count, generator=generator, device=device, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).T.contiguous()  # with the signs of r the set is uniformly distributed


def _check_features(features: Tensor, num_classes: int) -> None:
    _checks.tensor("features", features)
    _checks.floating("features", features)
    if features.dim() != 3 or features.shape[:2] != (num_classes, 2):
        raise ValueError(f"features must be of shape ({num_classes}, 2, patch_dim), got {tuple(features.shape)}")
    flat = features.detach().flatten(0, 1).double()
    error = (flat @ flat.T - torch.eye(len(flat), dtype=flat.dtype, device=flat.device)).abs().max().item()
    tolerance = max(1e-4, 4 * torch.finfo(features.dtype).eps)
    if not error <= tolerance:
        raise ValueError(
            f"features must be orthonormal to within {tolerance:.1g}, got an inner product off by {error:.3g}"
        )


def _check_images(images: Tensor) -> None:
    _checks.tensor("images", images)
    if images.dim() != 4:
        raise ValueError(f"images must have 4 dimensions (N, channels, H, W), got shape {tuple(images.shape)}")


def _check_classes(target: Tensor, images: Tensor) -> None:
    _checks.int64_tensor("target", target)
    if target.shape != images.shape[:1]:
        raise ValueError(f"target must be of shape ({len(images)},), one class per image, got {tuple(target.shape)}")
    _checks.same_device("target", target, images.device, "images'")
    if len(target) and (smallest := int(target.min())) < 0:
        raise ValueError(f"target must not be negative, got {smallest}")


def _check_pairing(partner_class: Tensor, least: int) -> None:
    _checks.int64_tensor("partner_class", partner_class)
    if partner_class.dim() != 1 or len(partner_class) < least:
        raise ValueError(f"partner_class must be of shape (C,), C at least {least}, got {tuple(partner_class.shape)}")
    pairs = partner_class.tolist()
    for c, partner in enumerate(pairs):
        if not 0 <= partner < len(pairs) or partner == c or pairs[partner] != c:
            raise ValueError(f"partner_class must pair each class with another one and that one with it, got {pairs}")


def _views(views: Any) -> Any:
    if isinstance(views, str) and views == "both":
        return views
    try:
        return _checks.integer("views", views, 0, 1)
    except (TypeError, ValueError):
        raise ValueError(f'views must be "both", 0 or 1, got {views!r}') from None


def _patch_dim(patch_dim: int | None, num_classes: int, features: Tensor | None) -> int:
    least = 2 * num_classes
    if patch_dim is None:
        return least if features is None else features.shape[2]
    patch_dim = _checks.integer("patch_dim", patch_dim, 1)
    if patch_dim < least:
        raise ValueError(f"patch_dim must be at least 2 * num_classes = {least}, got {patch_dim}")
    if features is not None and patch_dim != features.shape[2]:
        raise ValueError(f"patch_dim must be that of features ({features.shape[2]}), got {patch_dim}")
    return patch_dim


def _weight(value: Any) -> tuple[float, float]:
    low, high = _checks.interval("weight", value)
    if low < 0 or high > 1:
        raise ValueError(f"weight must be within [0, 1], got ({low}, {high})")
    return low, high
