"""cutmix against what users write, and against a copy."""

import functools

import pytest
import torch

import mixfeat as mf

from . import baselines, harness
from .limits import Work, copy_limit, copy_rates
from .shapes import BATCHES, cases
from .timing import DEVICE, measure

#: Images need no gradient.
CASES = cases(("imagenet", "cifar", "tiny"), ("imagenet", "cifar"), ("forward",))


@pytest.mark.parametrize(("name", "dtype", "direction"), CASES)
def test_operator(benchmark, capsys, name, dtype, direction):
    shape = BATCHES[name]
    x = torch.rand(shape, device=DEVICE).to(dtype)
    index = torch.randperm(shape[0], device=DEVICE)
    height, width = shape[2:]
    box = torch.tensor([height // 5, 7 * height // 8, width // 6, 5 * width // 6], device=DEVICE)  # half of the image
    formulas = {
        "mixfeat": mf.cutmix,
        "torch.compile": baselines.compiled(baselines.cutmix_where),
        "best eager": baselines.cutmix,
        "naive": baselines.cutmix_where,
    }
    contenders = {key: functools.partial(f, x, index, box) for key, f in formulas.items()}
    harness.check(contenders, baselines.cutmix_where(x.double(), index, box), dtype)
    measured = measure(contenders)
    benchmark.pedantic(contenders["mixfeat"], rounds=5)
    bytes = 2 * x.nbytes  # each pixel is read once, and written
    of_copy = bytes / copy_rates(bytes)["old"] / measured.timings["mixfeat"].p50
    harness.record(
        capsys, harness.Case("cutmix", f"{name} {shape}", direction, dtype), measured=measured,
        memory=harness.peak_bytes(contenders), work=Work({"bytes": bytes}, copy_limit(bytes)),
        figures={"of a copy into memory that is there": of_copy},
    )  # fmt: skip
