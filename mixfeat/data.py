"""Data: the distributions of feature-learning theory, images with two features per class, images cut into patches."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mixfeat import _checks

__all__ = [
    "CommonRareData", "MultiViewData", "SignalNoiseData", "TwoFeatureImages", "common_rare", "images_to_patches",
    "multi_view", "signal_noise",
]  # fmt: skip


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
    positions: Literal["random", "fixed"] = "random",
    patches_per_feature: int = 1,
    single_view: float = 0.0,
    off_class: float = 0.0,
    off_class_signal: tuple[float, float] = (0.1, 0.2),
    noise_std: float = 0.0,
    features: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> MultiViewData:
    """Draw from the multi-view distribution of Chidambaram et al. 2023 (arXiv 2210.13512, section 3).

    Every class y has two features (views) v[y,0] and v[y,1]; all features are orthonormal. A point of class y has its
    signal patches at two random positions::

        c v[y,0]   and   (signal[0] + signal[1] - c) v[y,1],     c ~ U[signal]

    Every other patch is feature noise, with each gamma drawn independently::

        sum over s != y and l of  gamma v[s,l],                  gamma ~ noise_scale * U[noise]

    With ``views=0`` or ``views=1`` both signal patches carry that view only: such test points show which features a
    network has learned (:func:`mixfeat.features.learned`). Classes are balanced (their counts differ by at most one)
    and in random order.

    The other options come from the distribution of Allen-Zhu and Li (arXiv 2012.09816). The paper leaves open how the
    coefficient of a feature is spread over its patches; here it is spread evenly.

    Args:
        num_samples: N >= 0.
        num_classes: C >= 1 (k in the paper).
        num_patches: P >= 2 patches_per_feature; with off_class, P >= 2 C patches_per_feature.
        patch_dim: D >= 2 C; by default that of ``features``, else 2 C.
        signal: range of a signal coefficient; the two coefficients of a point sum to ``signal[0] + signal[1]``.
        noise: range of a noise coefficient, before ``noise_scale``.
        noise_scale: >= 0. The default separates ERM from Midpoint Mixup at C = 10; the authors' code has 10 / C**1.5.
        views: ``"both"``, 0 or 1.
        positions: positions of the signal patches: ``"random"`` in each sample, or ``"fixed"``, view 0 first, then
            view 1.
        patches_per_feature: number of patches over which the coefficient of each feature is spread evenly.
        single_view: probability that a sample carries only one of its views, each equally likely. Needs
            ``views="both"``.
        off_class: probability that a sample carries a given feature of another class. Such a feature has its own
            patches at random positions, and its coefficient is drawn from U[off_class_signal].
        off_class_signal: range of that coefficient, summed over the feature's patches.
        noise_std: standard deviation of Gaussian noise added to every entry of every patch, >= 0.
        features: (C, 2, D) orthonormal features; by default drawn uniformly among all orthonormal sets.
        generator: source of all randomness. Draws are made on its device, so a CPU generator gives the same data on
            every device.
        device: device of the result; by default that of ``features``, else of ``generator``, else torch's default.
        dtype: floating dtype of the result; by default that of ``features``, else torch's default.

    Returns:
        ``MultiViewData(input (N,P,D), target (N,) int64, features (C,2,D))``.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it, the value and the requirement.
    """
    num_samples = _checks.integer("num_samples", num_samples, 0)
    num_classes = _checks.integer("num_classes", num_classes, 1)
    patches_per_feature = _checks.integer("patches_per_feature", patches_per_feature, 1)
    off_class = _checks.fraction("off_class", off_class)
    num_patches = _checks.integer("num_patches", num_patches, 2)
    if num_patches < (least := 2 * patches_per_feature * (num_classes if off_class else 1)):
        raise ValueError(
            f"num_patches must be at least {least}, so that each feature has {patches_per_feature} of its own, "
            f"got {num_patches}"
        )
    signal_low, signal_high = _checks.interval("signal", signal)
    noise_low, noise_high = _checks.interval("noise", noise)
    noise_scale = _checks.finite("noise_scale", noise_scale, 0)
    views = _views(views)
    _check_positions(positions)
    single_view = _checks.fraction("single_view", single_view)
    if single_view and views != "both":
        raise ValueError(f'single_view needs views="both", got {single_view} with views={views}')
    off_low, off_high = _checks.interval("off_class_signal", off_class_signal)
    noise_std = _checks.finite("noise_std", noise_std, 0)
    _checks.generator(generator)
    if features is not None:
        _check_features(features, num_classes)
    patch_dim = _patch_dim(patch_dim, num_classes, features)
    draw = _Draw(generator, device, dtype, features)

    if features is None:
        features = draw.orthonormal(2 * num_classes, patch_dim).view(num_classes, 2, patch_dim)
    target = draw.permutation(num_samples) % num_classes

    # a patch is its coefficients times the features; the signal overwrites the noise
    coefficient = draw.uniform(num_samples, num_patches, num_classes, 2, low=noise_low, high=noise_high)
    coefficient.mul_(noise_scale)
    sample = torch.arange(num_samples, device=draw.device)
    coefficient[sample, :, target] = 0
    order = draw.uniform(num_samples, num_patches).argsort(1)
    if positions == "fixed":
        order[:] = torch.arange(num_patches, device=draw.device)
    position = order[:, : 2 * patches_per_feature].view(num_samples, 2, patches_per_feature)
    first = draw.uniform(num_samples, low=signal_low, high=signal_high)
    view = torch.tensor([0, 1] if views == "both" else [views, views], device=draw.device).expand(num_samples, 2)
    if single_view:
        only = (draw.uniform(num_samples) < 0.5).long()
        view = torch.where((draw.uniform(num_samples) < single_view)[:, None], only[:, None], view)
    coefficient[sample[:, None, None], position] = 0
    total = torch.stack([first, signal_low + signal_high - first], 1) / patches_per_feature
    coefficient[sample[:, None, None], position, target[:, None, None], view[..., None]] = total[..., None]

    if off_class:
        # each feature of the other classes owns some of the remaining positions, whether it is present or not
        others = torch.arange(1, num_classes, device=draw.device)
        other = ((target[:, None] + others) % num_classes).repeat_interleave(2 * patches_per_feature, 1)
        places = order[:, 2 * patches_per_feature :]
        if positions == "fixed":
            places = places.gather(1, draw.uniform(*places.shape).argsort(1))
        shape = (num_samples, 2 * (num_classes - 1))
        value = draw.uniform(*shape, low=off_low, high=off_high) / patches_per_feature
        value = value.repeat_interleave(patches_per_feature, 1)
        present = (draw.uniform(*shape) < off_class).repeat_interleave(patches_per_feature, 1)
        feature = torch.arange(2, device=draw.device).repeat_interleave(patches_per_feature).repeat(num_classes - 1)
        row, column = present.nonzero(as_tuple=True)
        coefficient[row, places[row, column]] = 0
        coefficient[row, places[row, column], other[row, column], feature[column]] = value[row, column]

    basis = features.to(draw.device, draw.compute).flatten(0, 1)
    input = coefficient.flatten(2) @ basis
    if noise_std:
        input += draw.normal(*input.shape).mul_(noise_std)
    return MultiViewData(draw.place(input), target.to(draw.target), draw.place(features))


class SignalNoiseData(NamedTuple):
    """A sample of the signal-noise distribution.

    :func:`mixfeat.features.alignment` of its features is the theory's signal learning, and
    :func:`mixfeat.features.noise_memorization` takes its noise.
    """

    input: Tensor  #: (N, P, D) patches
    target: Tensor  #: (N,) int64 classes after the flips: 1 for y = +1, 0 for y = -1
    features: Tensor  #: (2, V, D) signals of each class: -mu and mu, V = 1; for XOR ±(a - b) and ±(a + b), V = 2
    noise: Tensor  #: (N, P - 1, D) noise patches
    clean_target: Tensor  #: (N,) int64 classes before the flips, as the signal patches have them


def signal_noise(
    num_samples: int,
    patch_dim: int,
    num_patches: int = 2,
    *,
    signal: float = 1.0,
    noise_std: float = 1.0,
    xor: bool = False,
    flip: float = 0.0,
    positions: Literal["random", "fixed"] = "random",
    features: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SignalNoiseData:
    """Draw from the signal-noise distribution of the theory of benign overfitting.

    A point of class y in {-1, +1} has one signal patch and P - 1 noise patches, which are orthogonal to the signals::

        y mu,   |mu| = signal         and         xi ~ N(0, noise_std^2 (I - mu mu^T / |mu|^2))

    This is the distribution of Cao et al. 2022 (arXiv 2202.06526). ``flip`` gives wrong labels with that probability,
    as in Kou et al. 2023 (arXiv 2303.04145). With ``xor``, as in Meng et al. 2024, a and b are orthogonal vectors of
    equal length, and the signal patch is ±(a + b) for y = +1 and ±(a - b) for y = -1, with either sign equally likely.
    Classes are balanced before the flips, in random order. The signal-to-noise ratio is signal / (noise_std sqrt(D)).

    The network of these papers, ``F[y] = 1/M sum_{p,m} max(<w[y,m], x[p]>, 0)^q``, is
    ``TwoLayerPatchCNN(2, M, D, PowerReLU(q, scale=1 / M))``. Their logistic loss of ``y (F[+1] - F[-1])`` is the
    cross-entropy of its logits.

    Args:
        num_samples: N >= 0.
        patch_dim: D >= 2, or with ``xor`` D >= 3: the noise needs a dimension beside the signals.
        num_patches: P >= 2, one of them the signal.
        signal: length of a signal patch, > 0.
        noise_std: standard deviation of each entry of the noise, >= 0.
        xor: draw from four signals instead of two.
        flip: probability in [0, 1] that ``target`` is the other class.
        positions: position of the signal patch: ``"random"`` in each sample, or ``"fixed"``, the first.
        features: (2, V, D) signals of an earlier draw, for test data; they replace ``signal``. By default their
            directions are drawn uniformly.
        generator, device, dtype: as :func:`multi_view` takes them.

    Returns:
        ``SignalNoiseData(input (N,P,D), target (N,), features (2,V,D), noise (N,P-1,D), clean_target (N,))``.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it, the value and the requirement.
    """
    num_samples = _checks.integer("num_samples", num_samples, 0)
    _checks.boolean("xor", xor)
    patch_dim = _checks.integer("patch_dim", patch_dim, 3 if xor else 2)
    num_patches = _checks.integer("num_patches", num_patches, 2)
    signal = _checks.positive("signal", signal)
    noise_std = _checks.finite("noise_std", noise_std, 0)
    flip = _checks.fraction("flip", flip)
    _check_positions(positions)
    _checks.generator(generator)
    views = 2 if xor else 1
    if features is not None:
        _check_signals(features, views, patch_dim)
    draw = _Draw(generator, device, dtype, features)

    if features is None:
        a = draw.orthonormal(views, patch_dim)  # mu; with xor a and b, whose difference and sum are orthogonal too
        first = torch.stack([a[0] - a[1], a[0] + a[1]]) / 2**0.5 if xor else torch.cat([-a, a])
        features = signal * (torch.stack([first, -first], 1) if xor else first[:, None])
    clean = draw.permutation(num_samples) % 2
    which = (draw.uniform(num_samples) * views).long().clamp(max=views - 1)
    patch = features.to(draw.device, draw.compute)[clean, which]

    noise = draw.normal(num_samples, num_patches - 1, patch_dim)
    directions = torch.nn.functional.normalize(features[:, 0] if xor else features[1], dim=1)
    directions = directions.to(draw.device, draw.compute)
    noise = (noise - noise @ directions.T @ directions) * noise_std
    input = torch.cat([patch[:, None], noise], 1)
    if positions == "random":  # the signal changes places with any patch, itself included
        place = (draw.uniform(num_samples) * num_patches).long().clamp(max=num_patches - 1)
        sample = torch.arange(num_samples, device=draw.device)
        input[sample, 0] = input[sample, place]
        input[sample, place] = patch
    target = clean if not flip else torch.where(draw.uniform(num_samples) < flip, 1 - clean, clean)
    classes = target.to(draw.target), clean.to(draw.target)
    return SignalNoiseData(draw.place(input), classes[0], draw.place(features), draw.place(noise), classes[1])


class CommonRareData(NamedTuple):
    """A sample of the distribution of common and rare features."""

    input: Tensor  #: (N, P, D) patches
    target: Tensor  #: (N,) int64 classes, 0 or 1
    features: Tensor  #: (2, 2, D) ``features[c, 0]`` is the common feature of class c, ``features[c, 1]`` the rare one
    rare: Tensor  #: (N,) bool, whether a sample carries the rare feature


def common_rare(
    num_samples: int,
    patch_dim: int,
    num_patches: int = 5,
    *,
    rare: float = 0.1,
    signal: float = 1.0,
    feature_noise: float = 0.1,
    num_feature_noise: int = 1,
    noise_std: float = 0.1,
    positions: Literal["random", "fixed"] = "random",
    features: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> CommonRareData:
    """Draw from the distribution of common and rare features of Zou et al. 2023 (arXiv 2303.08433).

    Each of two classes has a common feature v[y,0] and a rare one v[y,1], all four orthogonal and of length ``signal``.
    A point of class y has::

        one patch                     v[y,1] with probability rare, else v[y,0]
        num_feature_noise patches     feature_noise v[s,0], s either class, drawn for each patch
        the others                    xi ~ N(0, noise_std^2 (I - projection onto the four features))

    The paper does not say which features the feature noise has; we draw it from the common ones. Classes are balanced
    and in random order. ``rare=0`` and ``rare=1`` give the test points of :func:`mixfeat.features.learned`.

    Args:
        num_samples: N >= 0.
        patch_dim: D >= 5.
        num_patches: P >= 1 + num_feature_noise.
        rare: probability in [0, 1] of the rare feature (rho in the paper).
        signal: length of the features, > 0.
        feature_noise: coefficient of the feature noise, >= 0 (alpha in the paper).
        num_feature_noise: number of patches of feature noise, >= 0 (b in the paper).
        noise_std: standard deviation of each entry of the noise patches, >= 0 (sigma_p in the paper).
        positions: positions of the patches: ``"random"`` in each sample, or ``"fixed"``, in the order above.
        features: (2, 2, D) features of an earlier draw, for test data; they replace ``signal``.
        generator, device, dtype: as :func:`multi_view` takes them.

    Returns:
        ``CommonRareData(input (N,P,D), target (N,), features (2,2,D), rare (N,) bool)``.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it, the value and the requirement.
    """
    num_samples = _checks.integer("num_samples", num_samples, 0)
    patch_dim = _checks.integer("patch_dim", patch_dim, 5)
    num_feature_noise = _checks.integer("num_feature_noise", num_feature_noise, 0)
    num_patches = _checks.integer("num_patches", num_patches, 1 + num_feature_noise)
    rare = _checks.fraction("rare", rare)
    signal = _checks.positive("signal", signal)
    feature_noise = _checks.finite("feature_noise", feature_noise, 0)
    noise_std = _checks.finite("noise_std", noise_std, 0)
    _check_positions(positions)
    _checks.generator(generator)
    if features is not None:
        _check_orthogonal(features, patch_dim)
    draw = _Draw(generator, device, dtype, features)

    if features is None:
        features = signal * draw.orthonormal(4, patch_dim).view(2, 2, patch_dim)
    target = draw.permutation(num_samples) % 2
    is_rare = draw.uniform(num_samples) < rare
    vectors = features.to(draw.device, draw.compute)
    noise_class = (draw.uniform(num_samples, num_feature_noise) < 0.5).long()
    noise = draw.normal(num_samples, num_patches - 1 - num_feature_noise, patch_dim).mul_(noise_std)
    directions = torch.nn.functional.normalize(vectors.flatten(0, 1), dim=1)
    noise = noise - noise @ directions.T @ directions
    input = torch.cat([vectors[target, is_rare.long()][:, None], feature_noise * vectors[noise_class, 0], noise], 1)
    if positions == "random":
        order = draw.uniform(num_samples, num_patches).argsort(1)
        input = input.gather(1, order[..., None].expand_as(input))
    return CommonRareData(draw.place(input), target.to(draw.target), draw.place(features), is_rare.to(draw.target))


def images_to_patches(images: Tensor, patch_size: int | tuple[int, int]) -> Tensor:
    """Cut images into the patches that tile them.

    Args:
        images: (N, channels, H, W), any dtype.
        patch_size: side of a square patch, or (height, width); they divide H and W.

    Returns:
        (N, P, D): P = H W / (height * width) patches in row-major order. Each has D = channels * height * width values
        in the order (channel, row, column).

    Raises:
        TypeError, ValueError: an invalid argument; the message names it, the value and the requirement.
    """
    _check_images(images)
    sides = patch_size if isinstance(patch_size, tuple) and len(patch_size) == 2 else (patch_size, patch_size)
    down, right = (_checks.integer("patch_size", side, 1) for side in sides)
    num, channels, height, width = images.shape
    if height % down or width % right:
        raise ValueError(
            f"patch_size must divide the images' height and width, got {patch_size} for {height} x {width}"
        )
    rows, columns = height // down, width // right
    grid = images.reshape(num, channels, rows, down, columns, right).permute(0, 2, 4, 1, 3, 5)
    return grid.reshape(num, rows * columns, channels * down * right)


class TwoFeatureImages:
    """An image data set with two features per class (Chidambaram et al. 2023, section 5).

    Classes are paired. Each image x of class y is permanently paired with one image e, drawn uniformly from the class
    that is paired with y. The two are concatenated along channels, and the label is y. Either half alone determines
    the class::

        views="both"    [w x, (1 - w) e],   w ~ U[weight] at every access       training
        views=0         [x, 0]                                                  the paper's test
        views=1         [0, e]                                                  test of the second feature

    ``data[index]`` is :meth:`batch`: it makes whole batches on the images' device, without waiting for it. A
    ``torch.utils.data.DataLoader`` takes it as any other data set, and is fastest with ``batch_size=None`` and a
    ``BatchSampler`` as sampler. Leave ``generator`` None with worker processes: each has a copy of it, and all would
    draw the same numbers.

    Args:
        images: (N, channels, H, W), floating, already normalised; referenced, not copied.
        target: (N,) int64 classes, on the images' device.
        views: ``"both"``, 0 or 1.
        partner_class: (C,) int64, the class paired with each class; by default a random pairing, drawn before anything
            else. Test data need that of the training data: ``partner_class=train.partner_class``.
        weight: range of w, within [0, 1]; the paper's is (0, 1). With (0.5, 1) e is the weaker feature of every
            sample.
        generator: source of all randomness; by default torch's on the images' device. Draws are made on its device; if
            that is the images', batches never wait for the device.

    Attributes:
        images, target, views, weight: as given.
        partner_class: (C,) int64.
        partner: (N,) int64, the index of e among the images; None for ``views=0``.

    Raises:
        TypeError, ValueError: an invalid argument, an odd number of classes, or, unless ``views=0``, a class without
            images; the message names the argument, the value and the requirement.
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
        """Return :meth:`batch` of the index, or for an int one sample (2 channels, H, W) and its class ()."""
        if isinstance(index, Tensor) and index.dim():
            return self.batch(index)
        if isinstance(index, slice):
            index = range(*index.indices(len(self)))
        if isinstance(index, Sequence) and not isinstance(index, str):
            return self.batch(torch.tensor([_checks.integer("index", i, -(2**63)) for i in index], dtype=torch.int64))
        input, target = self[[index]]  # type: ignore[list-item]
        return input[0], target[0]

    def __getitems__(self, index: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Return the samples of a batch one by one, as a DataLoader asks for them."""
        return list(zip(*self[index], strict=True))

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return samples with new weights w.

        Args:
            index: (B,) int64; indices may repeat or be negative, as in ``images[index]``.

        Returns:
            input (B, 2 channels, H, W) of the images' dtype, target (B,) int64.

        Raises:
            TypeError, ValueError: an index of another type or shape.
            IndexError: an index out of range, as indexing a tensor raises it.
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
            # float32 at least: w must not be rounded to half precision before it is used
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
        """Draw for each image the index of an image of the paired class, (N,), all equally likely."""
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
    """Draw a perfect matching of the classes, (C,), all equally likely."""
    first, second = torch.randperm(num_classes, generator=generator, device=device).view(2, num_classes // 2)
    partner_class = torch.empty(num_classes, dtype=torch.int64, device=device)
    partner_class[first], partner_class[second] = second, first
    return partner_class


class _Draw:
    """Random tensors: drawn on the generator's device, in float32 at least, then moved to the result's."""

    def __init__(self, generator: torch.Generator | None, device: Any, dtype: Any, features: Tensor | None) -> None:
        if dtype is None:
            dtype = torch.get_default_dtype() if features is None else features.dtype
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {dtype}")
        if device is None:
            source = generator if features is None else features
            device = torch.get_default_device() if source is None else source.device
        self.target = torch.device(device)
        self.device = self.target if generator is None else generator.device
        self.compute = torch.float64 if dtype == torch.float64 else torch.float32
        self._generator, self._dtype = generator, dtype

    def uniform(self, *size: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        options: Any = {"generator": self._generator, "device": self.device, "dtype": self.compute}
        return torch.rand(size, **options).mul_(high - low).add_(low)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._generator, device=self.device, dtype=self.compute)

    def permutation(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self._generator, device=self.device)

    def orthonormal(self, count: int, dim: int) -> Tensor:
        """Draw orthonormal vectors (count, dim) in float64, uniformly among all orthonormal sets."""
        gaussian = torch.randn(dim, count, generator=self._generator, device=self.device, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        return (q * r.diagonal().sign()).T.contiguous()  # the signs of r make the distribution uniform

    def place(self, value: Tensor) -> Tensor:
        return value.to(self.target, self._dtype)


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


def _check_signals(features: Tensor, views: int, patch_dim: int) -> None:
    """Check signals as :func:`signal_noise` returns them: opposite, and for XOR a + b and a - b of equal length."""
    _checks.tensor("features", features)
    _checks.floating("features", features)
    if features.shape != (2, views, patch_dim):
        raise ValueError(f"features must be of shape (2, {views}, {patch_dim}), got {tuple(features.shape)}")
    minus, plus = features.detach().double()
    opposite = (plus, minus) if views == 1 else (features[:, 0], features[:, 1])
    length = features.detach().double().norm(dim=-1)
    tolerance = max(1e-4, 4 * torch.finfo(features.dtype).eps) * length.amax()
    if not ((opposite[0] + opposite[1]).abs().amax() <= tolerance and 0 < length.amin() < torch.inf):
        raise ValueError("features must be signals of both signs, as signal_noise returns them, got others")
    if views == 2 and not (plus[0] @ minus[0]).abs() <= tolerance * length.amax():
        raise ValueError("features must be those of two orthogonal vectors of equal length, got others")


def _check_orthogonal(features: Tensor, patch_dim: int) -> None:
    _checks.tensor("features", features)
    _checks.floating("features", features)
    if features.shape != (2, 2, patch_dim):
        raise ValueError(f"features must be of shape (2, 2, {patch_dim}), got {tuple(features.shape)}")
    flat = features.detach().flatten(0, 1).double()
    product = flat @ flat.T
    square = product.diagonal()
    tolerance = max(1e-4, 4 * torch.finfo(features.dtype).eps) * square.amax()
    if not (square.amin() > 0 and (product - square.diag()).abs().amax() <= tolerance):
        raise ValueError("features must be orthogonal and not 0, got others")


def _check_positions(positions: Any) -> None:
    if positions not in ("random", "fixed"):
        raise ValueError(f'positions must be "random" or "fixed", got {positions!r}')


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
