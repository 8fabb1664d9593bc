"""The losses of mixed samples against what users write."""

import functools

import pytest
import torch
import torch.nn.functional as F

import mixfeat as mf

from . import baselines, harness
from .limits import Work, copy_limit
from .shapes import LOGITS, cases
from .timing import DEVICE

#: FLOP per logit: a maximum, a difference, an exponential, a sum; the gradient adds a product and a difference.
FLOP = {"forward": 4, "forward + backward": 6}
#: An exponential, a logarithm, two products, three sums; the gradient adds a quotient, a product and two differences.
BINARY_FLOP = {"forward": 7, "forward + backward": 11}
BOTH, FORWARD = ("forward + backward",), ("forward",)
#: A loss is used with its gradient: only a few cases are timed without.
CASES = cases(LOGITS, ("imagenet", "vocabulary", "cifar"), BOTH) + cases(["imagenet", "vocabulary"], (), FORWARD)
SOFT_CASES = cases(["imagenet", "cifar"], ("imagenet",), BOTH) + cases(["imagenet"], (), FORWARD)


def time_formulas(bench, case, formulas, x, targets, target_bytes, flop=FLOP):
    """Time ``formulas`` of logits ``x`` and ``targets``, from which ``target_bytes`` must be read."""
    direction, formulas = case.direction, {**formulas, **baselines.AGAINST}
    contenders = {key: harness.directed(direction, functools.partial(f, x, *targets), x) for key, f in formulas.items()}
    exact = x.detach().double().requires_grad_()
    doubles = [t.double() if t.is_floating_point() else t for t in targets]
    truth = harness.directed(direction, functools.partial(formulas["naive"], exact, *doubles), exact)
    harness.check(contenders, truth(), case.dtype)
    bytes = x.nbytes * (1 + (direction != "forward")) + target_bytes  # the gradient is written
    bench(case, contenders, work=Work({"FLOP": flop[direction] * x.numel(), "bytes": bytes}, copy_limit(bytes)))


@pytest.mark.parametrize(("name", "dtype", "direction"), CASES)
def test_mixup_cross_entropy(bench, name, dtype, direction):
    samples, classes = LOGITS[name]
    x = torch.randn(samples, classes, device=DEVICE).to(dtype).requires_grad_()
    targets = (*torch.randint(classes, (2, samples), device=DEVICE), torch.tensor(0.3, device=DEVICE))
    formulas = {
        "mixfeat": mf.mixup_cross_entropy,
        "torch.compile": baselines.compiled(baselines.two_cross_entropies),
        "timm, compiled": baselines.compiled(baselines.dense_cross_entropy),
        "naive": baselines.two_cross_entropies,
        "timm": baselines.dense_cross_entropy,
    }
    case = harness.Case("mixup_cross_entropy", f"{name} {(samples, classes)}", direction, dtype)
    time_formulas(bench, case, formulas, x, targets, 16 * samples)


@pytest.mark.parametrize(("name", "dtype", "direction"), SOFT_CASES)
def test_soft_target_cross_entropy(bench, name, dtype, direction):
    samples, classes = LOGITS[name]
    x = torch.randn(samples, classes, device=DEVICE).to(dtype).requires_grad_()
    target = torch.rand(samples, classes, device=DEVICE).softmax(1).to(dtype)
    formulas = {
        "mixfeat": mf.soft_target_cross_entropy,
        "torch.compile": baselines.compiled(F.cross_entropy),
        "timm, compiled": baselines.compiled(baselines.soft_cross_entropy_timm),
        "naive": F.cross_entropy,
        "timm": baselines.soft_cross_entropy_timm,
    }
    case = harness.Case("soft_target_cross_entropy", f"{name} {(samples, classes)}", direction, dtype)
    time_formulas(bench, case, formulas, x, (target,), target.nbytes)


@pytest.mark.parametrize(("name", "dtype", "direction"), SOFT_CASES)
def test_mixup_binary_cross_entropy(bench, name, dtype, direction):
    samples, classes = LOGITS[name]
    x = torch.randn(samples, classes, device=DEVICE).to(dtype).requires_grad_()
    targets = (*torch.randint(classes, (2, samples), device=DEVICE), torch.tensor(0.3, device=DEVICE))
    formulas = {
        "mixfeat": mf.mixup_binary_cross_entropy,
        "torch.compile": baselines.compiled(baselines.sparse_binary_cross_entropy),
        "timm, compiled": baselines.compiled(baselines.dense_binary_cross_entropy),
        "naive": baselines.dense_binary_cross_entropy,
        "best eager": baselines.sparse_binary_cross_entropy,
    }
    case = harness.Case("mixup_binary_cross_entropy", f"{name} {(samples, classes)}", direction, dtype)
    time_formulas(bench, case, formulas, x, targets, 16 * samples, BINARY_FLOP)
