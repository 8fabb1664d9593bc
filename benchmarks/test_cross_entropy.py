"""mixup_cross_entropy, forward + backward, against what users write."""

import pytest
import torch

import mixfeat as mf

from . import baselines, harness
from .harness import CUDA, DEVICE, Limit

SHAPES = {
    "imagenet": (1024, 1000),
    "vocabulary": (4096 if CUDA else 256, 50257),
    "cifar": (512, 10),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_mixup_cross_entropy(benchmark, capsys, name, dtype):
    samples, classes = SHAPES[name]
    x = torch.randn(samples, classes, device=DEVICE).to(dtype).requires_grad_()
    a, b = torch.randint(classes, (2, samples), device=DEVICE)
    lam = torch.tensor(0.3, device=DEVICE)

    def step(f):
        return lambda: torch.autograd.grad(f(x, a, b, lam), x)

    functions = {
        "mixfeat": mf.mixup_cross_entropy,
        "torch.compile of two": torch.compile(baselines.two_cross_entropies, dynamic=False),
        "torch.compile of dense targets": torch.compile(baselines.dense_cross_entropy, dynamic=False),
        "two F.cross_entropy": baselines.two_cross_entropies,
        "dense targets": baselines.dense_cross_entropy,
    }
    with torch.no_grad():
        truth = baselines.two_cross_entropies(x.double(), a, b, lam.double()).item()
    for f in functions.values():
        assert f(x, a, b, lam).item() == pytest.approx(truth, rel=1e-5 if dtype == torch.float32 else 2e-2)
    contenders = {key: step(f) for key, f in functions.items()}
    timings = harness.compare(contenders)
    benchmark.pedantic(contenders["mixfeat"], rounds=5)
    bytes = 2 * x.nbytes  # logits read, gradient written
    harness.record(
        capsys, "mixup_cross_entropy", f"{name} {(samples, classes)}", "forward + backward", dtype=dtype,
        timings=timings, memory=harness.peak_bytes(contenders), work={"bytes": bytes},
        limit=Limit("a copy", bytes / harness.copy_rates(bytes)["new"]),
    )  # fmt: skip
