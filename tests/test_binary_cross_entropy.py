"""mixup_binary_cross_entropy and mixup_accuracy, beyond what the table of operators covers."""

import math

import pytest
import torch
import torch.nn.functional as F

import mixfeat as mf

X, Y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_is_the_loss_of_dense_targets(backend, device, smoothing, threshold):
    """As timm's BinaryCrossEntropy forms them: smoothed one-hot targets, mixed, then compared with the threshold."""
    x, lam = torch.randn(9, 5, device=device), torch.rand(9, device=device)
    a, b = torch.randint(5, (2, 9), device=device)
    off, on = smoothing / 5, 1 - smoothing + smoothing / 5
    one_hot = [torch.full_like(x, off).scatter_(1, y[:, None], on) for y in (a, b)]
    dense = lam[:, None] * one_hot[0] + (1 - lam[:, None]) * one_hot[1]
    dense = dense if threshold is None else (dense > threshold).float()
    found = mf.mixup_binary_cross_entropy(x, a, b, lam, label_smoothing=smoothing, threshold=threshold, num_classes=5)
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(x, dense))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinities_are_those_of_pytorch(backend, device, dtype):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("triton has no float64")
    numbers = [-math.inf, -1e30, -100.0, -1.0, 0.0, 1e-30, 1.0, 100.0, 1e30, math.inf, math.nan]
    x = torch.tensor(numbers, dtype=dtype, device=device)[:, None].expand(-1, 3)
    y = torch.zeros(len(x), dtype=torch.int64, device=device)
    for lam in (0.0, 0.5, 1.0):
        for weight in (None, torch.tensor([2.0, 0.5, 1.0], dtype=dtype, device=device)):
            leaves = [x.clone().requires_grad_() for _ in range(2)]
            q = torch.zeros_like(x)
            q[:, 0], q[:, 1] = lam, 1 - lam
            mine = mf.mixup_binary_cross_entropy(leaves[0], y, y + 1, lam, pos_weight=weight, reduction="none")
            theirs = F.binary_cross_entropy_with_logits(leaves[1], q, pos_weight=weight, reduction="none")
            torch.testing.assert_close(mine, theirs, equal_nan=True)
            grads = [
                torch.autograd.grad(v.where(v.isfinite(), 0).sum(), t)[0]
                for v, t in zip((mine, theirs), leaves, strict=True)
            ]
            finite = theirs.isfinite()
            torch.testing.assert_close(*(grad.where(finite, 0) for grad in grads))


def test_small_losses_keep_their_digits(backend, device):
    """Of confident logits each loss is e^-|x|, which 1 + e^-|x| would round away."""
    x = torch.tensor([[-30.0, -60.0, -17.0]], device=device)
    y = torch.tensor([0], device=device)
    loss = mf.mixup_binary_cross_entropy(-x, y, y, 1.0, reduction="none", label_smoothing=0.0)[0, :1]
    torch.testing.assert_close(loss, torch.exp(x[0, :1]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("key", ["target_a", "target_b"])
@pytest.mark.parametrize("value", [-1, 5])
def test_target_out_of_range(backend, device, key, value):
    x = torch.randn(4, 5, device=device, requires_grad=True)
    targets = {name: torch.zeros(4, dtype=torch.int64, device=device) for name in ("target_a", "target_b")}
    targets[key][2] = value
    if device.type == "cpu":
        with pytest.raises(IndexError, match=rf"{key} must lie in \[0, 5\), got {value}"):
            mf.mixup_binary_cross_entropy(x, **targets, lam=0.5)
        return
    loss = mf.mixup_binary_cross_entropy(x, **targets, lam=0.5, reduction="none")
    assert loss[2].isnan().all()
    assert loss[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((X[0], Y, Y, 0.5), {}, ValueError, r"input must have shape \(N,C\) with C at least 1, got \(3,\)"),
        ((X, Y[:2], Y, 0.5), {}, ValueError, r"target_a must have shape \(4,\)"),
        ((X, Y, Y.float(), 0.5), {}, TypeError, "target_b must be an int64 tensor of classes"),
        ((X, Y, Y, 1.5), {}, ValueError, r"lam must be in \[0, 1\], got 1.5"),
        ((X, Y, Y, 0.5), {"num_classes": 4}, ValueError, "num_classes must be input's C = 3, got 4"),
        ((X, Y, Y, 0.5), {"threshold": 2}, ValueError, r"threshold must be in \[0, 1\], got 2"),
        ((X, Y, Y, 0.5), {"label_smoothing": -1}, ValueError, r"label_smoothing must be in \[0, 1\], got -1"),
        ((X, Y, Y, 0.5), {"pos_weight": [1, 2, 3]}, TypeError, "pos_weight must be a floating-point tensor, got list"),
        (
            (X, Y, Y, 0.5),
            {"pos_weight": torch.ones(4)},
            ValueError,
            r"pos_weight must have shape \(3,\), .*, got \(4,\)",
        ),
        ((X, Y, Y, 0.5), {"reduction": "max"}, ValueError, "reduction must be"),
    ],
)
def test_refuses(args, options, error, message):
    with pytest.raises(error, match=message):
        mf.mixup_binary_cross_entropy(*args, **options)


def test_accuracy_counts_both_labels(device):
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 3.0, 2.0]], device=device)
    a, b = torch.tensor([0, 2, 0], device=device), torch.tensor([1, 2, 1], device=device)
    lam = torch.tensor([0.7, 0.4, 0.9], device=device)
    torch.testing.assert_close(mf.mixup_accuracy(logits, a, b, lam).item(), (0.7 + 1.0 + 0.1) / 3, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        mf.mixup_accuracy(logits, a, b, lam, topk=2).item(), (1 + 1 + 0.1) / 3, rtol=1e-6, atol=0
    )
    assert mf.mixup_accuracy(logits, a, b, 0.25, topk=3) == 1
    with pytest.raises(ValueError, match="topk must be at most 3, got 4"):
        mf.mixup_accuracy(logits, a, b, lam, topk=4)
    with pytest.raises(ValueError, match=r"logits must have shape \(N,C\)"):
        mf.mixup_accuracy(logits[0], a, b, lam)
