"""Named shapes of all suites, the most telling first: ``mixfeat bench --filter NAME`` selects them by name.

Most have more samples on a GPU. Batches of images and logits have the sizes of current networks.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

__all__ = [
    "BATCHES", "FORWARD", "LOGITS", "NETWORKS", "THEORY", "YOURS", "Network", "cases", "logits", "named", "networks",
    "take_place",
]  # fmt: skip


class Network(NamedTuple):
    """Sizes of a batch and of the network that it goes through."""

    samples: int
    patches: int
    patch_dim: int
    classes: int
    filters: int

    @property
    def evaluations(self) -> int:
        """Count the evaluations of the activation for all samples."""
        return self.samples * self.patches * self.classes * self.filters

    @property
    def pair_evaluations(self) -> int:
        """Count the evaluations of the activation for the N(N+1)/2 pairs that symmetry leaves of N^2."""
        return (self.samples + 1) * self.evaluations // 2

    @property
    def products(self) -> int:
        """Count the multiply-adds of the convolution."""
        return self.patch_dim * self.evaluations


def networks(gpu: bool) -> dict[str, Network]:
    """Return the named networks, of a GPU's or of a CPU's size."""
    more = 8 if gpu else 1
    medium = {"paper-10-medium": Network(1024, 12, 20, 10, 10)} if gpu else {}
    return {
        "paper-10": Network(256, 12, 20, 10, 10),  # paper-k: k classes, k filters each; 2k features as a basis
        **medium,
        "paper-10-large": Network(4096 if gpu else 1024, 12, 20, 10, 10),
        "image": Network(256 if gpu else 64, 196, 768, 10, 16),  # 224 x 224 x 3 in patches of 16 x 16
        "patches": Network(1024 * more, 16, 64, 10, 16),  # many small images
        "paper-50": Network(64 * more, 12, 100, 50, 50),
        "paper-20": Network(128 * more, 12, 40, 20, 20),
        "wide": Network(64 * more, 12, 64, 10, 256),
        "tiny": Network(2, 3, 4, 2, 2),  # the overhead of a call
    }


def logits(gpu: bool) -> dict[str, tuple[int, int]]:
    """Return samples and classes of the named logits, of a GPU's or of a CPU's size."""
    return {
        "imagenet": (1024, 1000),
        "vocabulary": (4096 if gpu else 256, 50257),
        **({"vocabulary-256": (256, 50257)} if gpu else {}),
        "cifar": (512, 10),
        "paper-50": (1024 if gpu else 128, 50),
        "tiny": (2, 10),
    }


NETWORKS = networks(torch.cuda.is_available())
#: The defaults of ``mixfeat reproduce theory``, which trains many networks at once.
THEORY = Network(50, 8, 20, 10, 5)

#: Networks that are timed without their gradient too, which is how few are used.
FORWARD = ("paper-10", "image", "tiny")

#: Shapes of mixed batches: images, activations of a hidden layer, the paper's samples.
BATCHES: dict[str, tuple[int, ...]] = {
    "imagenet": (256, 3, 224, 224),
    "hidden": (128, 256, 14, 14),
    "cifar": (512, 3, 32, 32),
    "paper-10": (256, 12, 20),
    "tiny": (2, 3, 8, 8),
}

LOGITS = logits(torch.cuda.is_available())

#: Name of the shapes of a user's problem.
YOURS = "yours"


def take_place(problem: Network) -> None:
    """Time a user's problem in place of the named shapes: call it before the suites are imported."""
    samples, patches, patch_dim, classes, _ = problem
    for table in (NETWORKS, BATCHES, LOGITS):
        table.clear()
    NETWORKS[YOURS], BATCHES[YOURS], LOGITS[YOURS] = problem, (samples, patches, patch_dim), (samples, classes)


def named(*names: str) -> list[str]:
    """List ``names``, or the user's problem if it replaces them."""
    return [YOURS] if names and YOURS in NETWORKS else list(names)


def cases(
    names: Sequence[str] | Mapping[str, Any],
    half: Sequence[str] = (),
    directions: Sequence[str] = ("forward + backward", "forward"),
) -> list[Any]:
    """List parameters ``name, dtype, direction`` of a suite: ``names`` in float32, ``half`` in bfloat16 too."""
    import pytest  # compile-report --shapes does without it

    names, half = named(*names), named(*half)
    dtypes = [(name, dtype) for name in names for dtype in (torch.float32, torch.bfloat16)[: 1 + (name in half)]]
    return [
        pytest.param(name, dtype, direction, id="-".join((name, str(dtype).removeprefix("torch."), direction)))
        for name, dtype in dtypes
        for direction in directions
    ]
