"""mixup_cross_entropy, forward + backward, against what users write."""

import pytest
import torch

import mixfeat as mf
from benchmarks import baselines, harness

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
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
        def run():
            x.grad = None
            f(x, a, b, lam).backward()

        return run

    contenders = {
        "mixfeat": mf.mixup_cross_entropy,
        "compile of two": torch.compile(baselines.two_cross_entropies, dynamic=False),
        "compile of dense": torch.compile(baselines.dense_cross_entropy, dynamic=False),
        "two": baselines.two_cross_entropies,
        "dense": baselines.dense_cross_entropy,
    }
    with torch.no_grad():
        truth = baselines.two_cross_entropies(x.double(), a, b, lam.double()).item()
    for f in contenders.values():
        assert f(x, a, b, lam).item() == pytest.approx(truth, rel=1e-5 if dtype == torch.float32 else 2e-2)
    timing = harness.compare({key: step(f) for key, f in contenders.items()})
    benchmark.pedantic(step(mf.mixup_cross_entropy), rounds=5)
    ours, bytes = timing["mixfeat"].p50, 2 * x.nbytes
    copies = harness.copy_rates(bytes, DEVICE)
    row = {
        "shape": f"mixup_cross_entropy {name} {(samples, classes)}",
        "dtype": str(dtype).removeprefix("torch."),
        "ms": ours * 1e3,
        **{f"x {key}": timing[key].p50 / ours for key in list(contenders)[1:]},
        "GB/s": bytes / ours / 1e9,
        "of a copy to new memory": bytes / ours / copies["new"],
    }
    harness.record(capsys, row)
