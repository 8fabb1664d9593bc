"""Ours against other mixers: their formulas in docs/coming-from.md, and their own classes where they are installed."""

import functools

import pytest
import torch
import torch.nn.functional as F

import mixfeat as mf
from mixfeat.benchmarks import peers

CLASSES = 5


@pytest.fixture
def batch():
    return torch.rand(12, 3, 4, 4), torch.randint(CLASSES, (12,)), torch.randn(12, CLASSES, requires_grad=True)


def assert_same(ours, theirs, logits):
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))


@pytest.mark.parametrize("mode", ["batch", "elem"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_timm(batch, mode, smoothing):
    images, labels, logits = batch
    lam = torch.rand(()) if mode == "batch" else torch.rand(12)
    share = lam.view(-1, 1, 1, 1)
    their_images = images * share + images.flip(0) * (1 - share)
    off = smoothing / CLASSES
    smooth = torch.full((12, CLASSES), off).scatter_(1, labels[:, None], 1 - smoothing + off)
    their_target = smooth * lam.view(-1, 1) + smooth.flip(0) * (1 - lam.view(-1, 1))
    their_loss = torch.sum(-their_target * F.log_softmax(logits, dim=-1), dim=-1).mean()

    index = torch.arange(12).flip(0)
    torch.testing.assert_close(mf.mixup(images, index, lam), their_images)
    loss = mf.MixupCrossEntropyLoss(label_smoothing=smoothing)(logits, (labels, labels[index], lam))
    assert_same(loss, their_loss, logits)
    their_loss = torch.sum(-their_target * F.log_softmax(logits, dim=-1), dim=-1).mean()
    assert_same(mf.soft_target_cross_entropy(logits, their_target), their_loss, logits)


def test_torchvision(batch):
    images, labels, logits = batch
    lam = 0.3
    one_hot = F.one_hot(labels, CLASSES).float()
    their_images = images.roll(1, 0) * (1 - lam) + images * lam
    their_target = one_hot.roll(1, 0) * (1 - lam) + one_hot * lam

    index = torch.arange(12).roll(1)
    torch.testing.assert_close(mf.mixup(images, index, lam), their_images)
    loss = mf.mixup_cross_entropy(logits, labels, labels[index], lam)
    assert_same(loss, F.cross_entropy(logits, their_target), logits)


def test_kornia(batch):
    """Its lambda is the partner's."""
    images, labels, logits = batch
    theirs, index = torch.rand(12), torch.randperm(12)
    share = theirs.view(-1, 1, 1, 1)
    their_images = images * (1 - share) + images[index] * share
    losses = [F.cross_entropy(logits, target, reduction="none") for target in (labels, labels[index])]
    their_loss = ((1 - theirs) * losses[0] + theirs * losses[1]).mean()

    torch.testing.assert_close(mf.mixup(images, index, 1 - theirs), their_images)
    assert_same(mf.mixup_cross_entropy(logits, labels, labels[index], 1 - theirs), their_loss, logits)


@pytest.mark.parametrize("alpha", [0, 1])
def test_the_authors(batch, alpha):
    """alpha = 0 is midpoint; a partner for each sample from the whole data set, one lam, two cross-entropies."""
    images, labels, logits = batch
    lam = 0.5 if alpha == 0 else 0.8
    partner = torch.randint(12, (12,))
    their_loss = lam * F.cross_entropy(logits, labels) + (1 - lam) * F.cross_entropy(logits, labels[partner])
    their_images = lam * images + (1 - lam) * images[partner]

    torch.testing.assert_close(mf.mixup(images, partner, lam), their_images)
    assert_same(mf.mixup_cross_entropy(logits, labels, labels[partner], lam), their_loss, logits)


def test_dense_targets_add_up_where_both_are_of_one_class(batch):
    """Where the second share is assigned instead of added, as in FFCV's one-hot step, such a pair loses 1 - lam."""
    images, _, _ = batch
    labels = torch.full((12,), 3)
    _, target = mf.Mixup(num_classes=CLASSES)(images, labels)
    torch.testing.assert_close(target, F.one_hot(labels, CLASSES).float())


def test_labels_are_never_cast():
    """Classes that half precision cannot hold (999 in bfloat16 is 1000) stay what they are."""
    images, labels = torch.rand(7, 2).bfloat16(), torch.full((7,), 999)
    _, (first, second, lam) = mf.Mixup()(images, labels)
    assert (first == 999).all()
    assert (second == 999).all()
    assert first.dtype == second.dtype == torch.int64
    assert lam.dtype == torch.float32


MIXERS = {
    **{f"{name} MixUp": make for name, make in peers.MIXUP.items()},
    **{f"{name} CutMix": make for name, make in peers.CUTMIX.items()},
    **{f"timm {mode}": functools.partial(peers.MIXUP["timm"], mode=mode) for mode in ("elem", "pair")},
}


@pytest.mark.parametrize("name", MIXERS)
def test_their_own_classes(name):
    """What the real class mixes is what ours mixes for the partners and lam that its labels tell."""
    _, missing = peers.mixers({name: MIXERS[name]}, torch.rand(8, 3, 6, 5))
    if missing:
        pytest.skip(f"needs the extra peers: {missing[name]}")
