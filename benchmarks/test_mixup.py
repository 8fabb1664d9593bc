"""mixup, against what users write, and against a copy; and what mixing adds to a training step."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mixfeat as mf

from . import baselines, harness
from .harness import DEVICE, Limit

SHAPES = {"imagenet": (256, 3, 224, 224), "cifar": (512, 3, 32, 32), "hidden": (128, 256, 14, 14)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_mixup(benchmark, capsys, name, dtype):
    shape = SHAPES[name]
    x = torch.rand(shape, device=DEVICE).to(dtype)
    index, lam = mf.sample_mixup(shape[0], lam=0.3, device=DEVICE)
    functions = {
        "mixfeat": mf.mixup,
        "torch.compile": torch.compile(baselines.mixup, dynamic=False),
        "lerp": baselines.mixup_lerp,
        "lam * x + (1 - lam) * x[index]": baselines.mixup,
        "torchvision": baselines.mixup_torchvision,
        "timm": baselines.mixup_timm,
    }
    truth = torch.lerp(x[index].double(), x.double(), 0.3)
    for key, f in functions.items():
        if key not in ("timm", "torchvision"):  # which pair in their own way
            assert (f(x, index, lam).double() - truth).norm() / truth.norm() < (1e-6 if x.itemsize == 4 else 1e-2)
    theirs = x.clone()  # overwritten by timm's
    contenders = {key: functools.partial(f, theirs if key == "timm" else x, index, lam) for key, f in functions.items()}
    timings = harness.compare(contenders)
    benchmark.pedantic(contenders["mixfeat"], rounds=5)
    bytes = 3 * x.nbytes  # two samples read, one written
    copies = harness.copy_rates(bytes)
    harness.record(
        capsys, "mixup", f"{name} {shape}", "forward", dtype=dtype, timings=timings,
        memory=harness.peak_bytes(contenders), work={"bytes": bytes}, limit=Limit("a copy", bytes / copies["new"]),
        figures={"of a copy into memory that is there": bytes / copies["old"] / timings["mixfeat"].p50},
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


def test_training_step_of_a_small_resnet(benchmark, capsys):
    """With Mixup and its loss, against the same step without."""
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

    def mixed():
        images, target = mix(x, y)
        return mixed_loss(model(images), target)

    def plain():
        return F.cross_entropy(model(x), y)

    # the plain step against itself says how well the machine can tell steps apart
    contenders = {"mixed": lambda: step(mixed), "plain": lambda: step(plain), "again": lambda: step(plain)}
    timing = harness.compare(contenders, share=6)
    benchmark.pedantic(contenders["mixed"], rounds=3)
    ms = {name: 1e3 * found.p50 for name, found in timing.items()}
    figures = {
        "ms": ms["mixed"],
        "of the step without mixing": ms["mixed"] / ms["plain"],
        "that step against itself": ms["again"] / ms["plain"],
    }
    harness.record(capsys, "mixup", "small ResNet, N=128", "training step", figures=figures)
