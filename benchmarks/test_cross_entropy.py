"""The losses of mixed samples against what users write."""

import functools

import pytest
import torch
import torch.nn.functional as F

import mixfeat as mf

from . import baselines, harness, peers
from .limits import Work, copy_limit
from .shapes import LOGITS, cases, named
from .timing import DEVICE

#: FLOP per logit: a maximum, a difference, an exponential, a sum; the gradient adds a product and a difference.
FLOP = {"forward": 4, "forward + backward": 6}
#: An exponential, a logarithm, two products, three sums; the gradient adds a quotient, a product and two differences.
BINARY_FLOP = {"forward": 7, "forward + backward": 11}
#: Features that a classifier takes.
HIDDEN = 512
BOTH, FORWARD = ("forward + backward",), ("forward",)
#: A loss is used with its gradient: only a few cases are timed without.
HALF = ("imagenet", "vocabulary", "vocabulary-256", "cifar")
CASES = cases(LOGITS, HALF, BOTH) + cases(["imagenet", "vocabulary"], (), FORWARD)
SOFT_CASES = cases(["imagenet", "cifar"], ("imagenet",), BOTH) + cases(["imagenet"], (), FORWARD)


def time_formulas(bench, case, formulas, makers, x, targets, target_bytes, flop=FLOP):
    """Time ``formulas`` and what ``makers`` make, of logits ``x`` and ``targets``: ``target_bytes`` must be read."""
    others, missing = peers.gather(makers)
    direction, formulas = case.direction, {**formulas, **others, **baselines.AGAINST}
    contenders = {key: harness.directed(direction, functools.partial(f, x, *targets), x) for key, f in formulas.items()}
    names = ("target",) if len(targets) == 1 else ("target_a", "target_b", "lam")
    truth = harness.truth(case, "input", input=x, **dict(zip(names, targets, strict=True)))
    harness.check(contenders, truth, case.dtype)
    bytes = x.nbytes * (1 + (direction != "forward")) + target_bytes  # the gradient is written
    work = Work({"FLOP": flop[direction] * x.numel(), "bytes": bytes}, copy_limit(bytes))
    bench(case, contenders, work=work, missing=missing)


def draw_targets(samples, classes):
    """Draw both labels, the second as timm pairs samples, and lam."""
    target = torch.randint(classes, (samples,), device=DEVICE)
    return target, target.flip(0), torch.tensor(0.3, device=DEVICE)


@pytest.mark.parametrize(("name", "dtype", "direction"), CASES)
def test_mixup_cross_entropy(bench, name, dtype, direction):
    samples, classes = LOGITS[name]
    x = torch.randn(samples, classes, device=DEVICE).to(dtype).requires_grad_()
    targets = draw_targets(samples, classes)
    formulas = {
        "mixfeat": mf.mixup_cross_entropy,
        "torch.compile": baselines.compiled(baselines.two_cross_entropies),
        "logsumexp, compiled": baselines.compiled(baselines.logsumexp_cross_entropy),
        "naive": baselines.two_cross_entropies,
        "logsumexp": baselines.logsumexp_cross_entropy,
        "dense": baselines.dense_cross_entropy,
    }
    case = harness.Case("mixup_cross_entropy", f"{name} {(samples, classes)}", direction, dtype)
    time_formulas(bench, case, formulas, peers.LOSSES, x, targets, 16 * samples)


@pytest.mark.parametrize(("name", "dtype", "direction"), SOFT_CASES)
def test_soft_target_cross_entropy(bench, name, dtype, direction):
    samples, classes = LOGITS[name]
    x = torch.randn(samples, classes, device=DEVICE).to(dtype).requires_grad_()
    target = torch.rand(samples, classes, device=DEVICE).softmax(1).to(dtype)
    formulas = {
        "mixfeat": mf.soft_target_cross_entropy,
        "torch.compile": baselines.compiled(F.cross_entropy),
        "logsumexp, compiled": baselines.compiled(baselines.logsumexp_soft_cross_entropy),
        "naive": F.cross_entropy,
        "logsumexp": baselines.logsumexp_soft_cross_entropy,
    }
    case = harness.Case("soft_target_cross_entropy", f"{name} {(samples, classes)}", direction, dtype)
    time_formulas(bench, case, formulas, peers.SOFT_LOSSES, x, (target,), target.nbytes)


@pytest.mark.parametrize(("name", "dtype", "direction"), SOFT_CASES)
def test_mixup_binary_cross_entropy(bench, name, dtype, direction):
    samples, classes = LOGITS[name]
    x = torch.randn(samples, classes, device=DEVICE).to(dtype).requires_grad_()
    targets = draw_targets(samples, classes)
    formulas = {
        "mixfeat": mf.mixup_binary_cross_entropy,
        "torch.compile": baselines.compiled(baselines.sparse_binary_cross_entropy),
        "dense, compiled": baselines.compiled(baselines.dense_binary_cross_entropy),
        "naive": baselines.dense_binary_cross_entropy,
        "best eager": baselines.sparse_binary_cross_entropy,
    }
    case = harness.Case("mixup_binary_cross_entropy", f"{name} {(samples, classes)}", direction, dtype)
    time_formulas(bench, case, formulas, peers.BINARY_LOSSES, x, targets, 16 * samples, BINARY_FLOP)


@pytest.mark.parametrize("name", named("imagenet"))
def test_classifier(bench, name):
    """Time the loss with the classifier's product before it, which others fuse."""
    samples, classes = LOGITS[name]
    hidden = torch.randn(samples, HIDDEN, device=DEVICE, requires_grad=True)
    weight = torch.randn(classes, HIDDEN, device=DEVICE) / HIDDEN**0.5
    targets = draw_targets(samples, classes)

    def head(loss):
        return lambda hidden, weight, *targets: loss(hidden @ weight.t(), *targets)

    others, missing = peers.gather(peers.HEADS)
    formulas = {
        "mixfeat": head(mf.mixup_cross_entropy),
        "torch.compile": baselines.compiled(head(baselines.logsumexp_cross_entropy)),
        "naive": head(baselines.two_cross_entropies),
        **others,
    }
    contenders = {
        key: harness.directed("forward + backward", functools.partial(f, hidden, weight, *targets), hidden)
        for key, f in formulas.items()
    }
    harness.check(contenders, contenders["naive"](), torch.float32)
    case = f"{name}, of {HIDDEN} features {(samples, classes)}"
    bench(harness.Case("mixup_cross_entropy", case, "forward + backward"), contenders, missing=missing)
