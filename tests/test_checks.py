"""NumPy's integers and floats are numbers wherever a number is taken, and True is none."""

import numpy as np
import pytest
import torch

import mixfeat as mf
from mixfeat.experiments import theory

THREE, HALF, TENTH = np.int64(3), np.float32(0.5), np.float64(0.1)
X, W, Y, INDEX = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
PHI = mf.PolyReLU(4, 0.5)
LOGITS, SOFT = torch.randn(3, 5), torch.rand(3, 5)

#: each call, given an integer and a number
CALLS = {
    "PolyReLU": lambda n, a: mf.PolyReLU(n, a),
    "Power": lambda n, a: mf.Power(n),
    "TwoLayerPatchCNN": lambda n, a: mf.TwoLayerPatchCNN(n, n, n, PHI, num_runs=n, init_std=a).weight.shape,
    "Mixup": lambda n, a: mf.Mixup(a, lam=a, num_classes=n)(X, Y)[1].shape,
    "MixupCrossEntropyLoss": lambda n, a: mf.MixupCrossEntropyLoss(a, n)(LOGITS, (Y, INDEX, a)),
    "PairwiseMixupLoss": lambda n, a: mf.PairwiseMixupLoss(a).lam,
    "patch_conv": lambda n, a: mf.patch_conv(X, W, PHI, index=INDEX, lam=a),
    "pairwise_mixup_loss": lambda n, a: mf.pairwise_mixup_loss(X, W, Y, PHI, lam=a),
    "gradient_descent": lambda n, a: mf.gradient_descent(
        X, W, Y, PHI, lam=a, lr=a, steps=n, momentum=a, weight_decay=a
    )[1],
    "mixup": lambda n, a: mf.mixup(X, INDEX, a),
    "soft_target_cross_entropy": lambda n, a: mf.soft_target_cross_entropy(
        LOGITS, LOGITS.softmax(1), label_smoothing=a
    ),
    "beta_quadrature": lambda n, a: mf.beta_quadrature(a, n)[0],
    "sample_mixup": lambda n, a: mf.sample_mixup(n, a, lam=a)[1],
    "multi_view": lambda n, a: mf.data.multi_view(n, n, n, signal=(a, a), noise_scale=a).input.shape,
    "images_to_patches": lambda n, a: mf.data.images_to_patches(torch.zeros(1, 1, 3, 3), n).shape,
    "Settings": lambda n, a: theory.Settings(num_classes=n, num_samples=n, lr=a, steps=n, evaluations=n).to_dict(),
}


@pytest.mark.parametrize("name", CALLS)
def test_numbers_of_numpy_are_numbers(name):
    torch.manual_seed(0)
    result = CALLS[name](THREE, HALF)
    torch.manual_seed(0)
    expected = CALLS[name](3, 0.5)
    if isinstance(result, torch.Tensor):
        torch.testing.assert_close(result, expected)
    else:
        assert result == expected


@pytest.mark.parametrize("name", CALLS)
def test_true_is_no_number(name):
    with pytest.raises(TypeError, match=r"must be (an integer|a number)"):
        CALLS[name](True, True)
