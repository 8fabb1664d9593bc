"""cutmix against what users write, and against a copy."""

import functools

import pytest
import torch

import mixfeat as mf

from . import baselines, harness, peers
from .limits import Work, copy_limit, of_old_copies
from .shapes import BATCHES, cases
from .timing import DEVICE, Contender

#: Images need no gradient.
CASES = cases([name for name in ("imagenet", "cifar", "tiny") if name in BATCHES], ("imagenet", "cifar"), ("forward",))


@pytest.mark.parametrize(("name", "dtype", "direction"), CASES)
def test_operator(bench, name, dtype, direction):
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
        **baselines.AGAINST,
    }
    contenders: dict[str, Contender] = {key: functools.partial(f, x, index, box) for key, f in formulas.items()}
    case = harness.Case("cutmix", f"{name} {shape}", direction, dtype)
    harness.check(contenders, harness.truth(case, "input", input=x, index=index, box=box), dtype)
    others, missing = peers.mixers(peers.CUTMIX, x)
    contenders |= others
    bytes = 2 * x.nbytes  # each pixel is read once, and written
    bench(
        case, contenders, figures=of_old_copies(bytes),
        missing=missing, work=Work({"bytes": bytes}, copy_limit(bytes)),
    )  # fmt: skip
