"""Logits that are infinite, NaN or huge: every combination goes where PyTorch's own cross-entropy lets it go."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import mixfeat as mf

VALUES = [-math.inf, math.inf, math.nan, 5e37, -5e37, 0.0, 1.5]  # sums of the huge ones stay finite
#: rows of three logits, all combinations
LOGITS = torch.tensor(list(itertools.product(VALUES, repeat=3)))


def results(f, x):
    x = x.clone().requires_grad_()
    loss = f(x)
    return loss.detach(), *torch.autograd.grad(loss.sum(), x)


def assert_same(result, expected):
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by the interpreter's numpy
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("target", [(0, 0, 0), (1, 0, 0), (0, 0.5, 0.5), (0.2, 0.3, 0.5)], ids=str)
def test_soft_targets(backend, device, target, label_smoothing):
    x = LOGITS.to(device)
    t = torch.tensor(target, dtype=torch.float32, device=device).expand(len(x), 3)
    ours = results(lambda x: mf.soft_target_cross_entropy(x, t, label_smoothing=label_smoothing, reduction="none"), x)
    expected = results(lambda x: F.cross_entropy(x, t, label_smoothing=label_smoothing, reduction="none"), x)
    assert_same(ours, expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("partner", [0, 2])
def test_two_labels(backend, device, partner, label_smoothing):
    x = LOGITS.to(device)
    a, b = (torch.full((len(x),), y, device=device) for y in (0, partner))
    options = {"label_smoothing": label_smoothing, "reduction": "none"}
    ours = results(lambda x: mf.mixup_cross_entropy(x, a, b, 0.25, **options), x)
    expected = results(lambda x: 0.25 * F.cross_entropy(x, a, **options) + 0.75 * F.cross_entropy(x, b, **options), x)
    assert_same(ours, expected)
