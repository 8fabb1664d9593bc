"""Fused kernels for Mixup training of 2-layer patch-wise convolutional networks with polynomial activations."""

from mixfeat import backends, data, features, functional, nn, reference
from mixfeat.activations import Identity, LeakyReLU, PolyReLU, Power, PowerReLU, ReLU
from mixfeat.backends import backend
from mixfeat.functional import *  # noqa: F403  (the operators, which functional.__all__ lists)
from mixfeat.nn import Mixup, MixupCrossEntropyLoss, PairwiseMixupLoss, TwoLayerPatchCNN

__version__ = "0.2.0"

__all__ = [
    "Identity",
    "LeakyReLU",
    "Mixup",
    "MixupCrossEntropyLoss",
    "PairwiseMixupLoss",
    "PolyReLU",
    "Power",
    "PowerReLU",
    "ReLU",
    "TwoLayerPatchCNN",
    "__version__",
    "backend",
    "backends",
    "data",
    "features",
    "functional",
    "nn",
    "reference",
]
__all__ += functional.__all__
