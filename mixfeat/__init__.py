"""Fused kernels for Mixup training of 2-layer patch-wise convolutional networks with polynomial activations."""

from mixfeat import backends, data, features, functional, nn, reference
from mixfeat.activations import Identity, PolyReLU, Power, PowerReLU, ReLU
from mixfeat.backends import backend
from mixfeat.functional import (
    beta_quadrature,
    gradient_descent,
    mixup,
    mixup_cross_entropy,
    pairwise_mixup_loss,
    patch_conv,
    sample_mixup,
    soft_target_cross_entropy,
)
from mixfeat.nn import Mixup, MixupCrossEntropyLoss, PairwiseMixupLoss, TwoLayerPatchCNN

__version__ = "0.1.0"

__all__ = [
    "Identity",
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
    "beta_quadrature",
    "data",
    "features",
    "functional",
    "gradient_descent",
    "mixup",
    "mixup_cross_entropy",
    "nn",
    "pairwise_mixup_loss",
    "patch_conv",
    "reference",
    "sample_mixup",
    "soft_target_cross_entropy",
]
