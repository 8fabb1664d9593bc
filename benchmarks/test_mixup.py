"""mixup against what users write and against a copy; the cost of mixing in a training step."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mixfeat as mf

from . import baselines, harness, peers
from .limits import Work, copy_limit, of_old_copies
from .shapes import BATCHES, cases
from .timing import CUDA, DEVICE

#: Images need no gradient; activations of a hidden layer do.
CASES = cases(BATCHES, ("imagenet", "hidden", "cifar"), ("forward",)) + cases(
    ["hidden"], ("hidden",), ("forward + backward",)
)


@pytest.mark.parametrize(("name", "dtype", "direction"), CASES)
def test_operator(bench, name, dtype, direction):
    shape, backward = BATCHES[name], direction != "forward"
    x = torch.rand(shape, device=DEVICE).to(dtype).requires_grad_(backward)
    grad = torch.rand(shape, device=DEVICE).to(dtype)
    index, lam = mf.sample_mixup(shape[0], lam=0.3, device=DEVICE)
    formulas = {
        "mixfeat": mf.mixup,
        "torch.compile": baselines.compiled(baselines.mixup),
        "best eager": baselines.mixup_lerp,
        "naive": baselines.mixup,
        **baselines.AGAINST,
    }
    contenders = {
        key: harness.directed(direction, functools.partial(f, x, index, lam), x, grad) for key, f in formulas.items()
    }
    case = harness.Case("mixup", f"{name} {shape}", direction, dtype)
    harness.check(contenders, harness.truth(case, "input", grad, input=x, index=index, lam=lam), dtype)
    others, missing = ({}, {}) if backward else peers.mixers(peers.MIXUP, x)  # which are for images
    contenders |= others
    bytes = 3 * x.nbytes * (1 + backward)  # two samples read, one written; the same for the gradient
    bench(
        case, contenders, figures=of_old_copies(bytes),
        missing=missing, work=Work({"FLOP": 3 * x.numel() * (1 + backward), "bytes": bytes}, copy_limit(bytes)),
    )  # fmt: skip


@pytest.mark.parametrize("name", [name for name in ("imagenet", "cifar") if name in BATCHES])
def test_bytes(bench, name):
    """Time the mixing of images as they are stored, into float32."""
    shape = BATCHES[name]
    x = torch.randint(256, shape, dtype=torch.uint8, device=DEVICE)
    index, lam = mf.sample_mixup(shape[0], lam=0.3, device=DEVICE)
    makers = {} if CUDA else {"OpenCV": peers.mixup_of_bytes}
    others, missing = peers.gather(makers)
    formulas = {
        "mixfeat": mf.mixup,
        "torch.compile": baselines.compiled(baselines.mixup),
        "best eager": baselines.mixup_of_bytes,
        "naive": baselines.mixup,
        **others,
    }
    contenders = {key: functools.partial(f, x, index, lam) for key, f in formulas.items()}
    harness.check(contenders, baselines.mixup(x.double(), index, lam.double()), torch.float32)
    bytes = x.numel() * (2 + 4)  # two samples read, one written
    bench(
        harness.Case("mixup", f"{name} {shape}", "forward", torch.uint8), contenders, missing=missing,
        work=Work({"FLOP": 3 * x.numel(), "bytes": bytes}, copy_limit(bytes)),
    )  # fmt: skip


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))
        return F.relu(y + self.short(x))


def test_training_step_of_a_small_resnet(bench):
    """Compare a step with Mixup and its loss to the same step without mixing."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 100),
    ).to(DEVICE)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.rand(128, 3, 32, 32, device=DEVICE), torch.randint(100, (128,), device=DEVICE)
    mix, mixed_loss = mf.Mixup(), mf.MixupCrossEntropyLoss()

    def step(loss):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    def ours():
        images, target = mix(x, y)
        return mixed_loss(model(images), target)

    def naive():
        index, lam = torch.randperm(len(x), device=DEVICE), torch.distributions.Beta(1.0, 1.0).sample().to(DEVICE)
        return baselines.two_cross_entropies(model(baselines.mixup(x, index, lam)), y, y[index], lam)

    def plain():
        return F.cross_entropy(model(x), y)

    losses = {"mixfeat": ours, "naive": naive, "no mixing": plain}
    contenders = {name: functools.partial(step, loss) for name, loss in losses.items()}
    bench(harness.Case("mixup", "small ResNet (128, 3, 32, 32)", "training step"), contenders, share=8, memory=False)
