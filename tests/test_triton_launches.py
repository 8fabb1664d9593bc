"""Ceilings of ``mixfeat compile-report --shapes``: launches per call, and shapes that leave multiprocessors empty."""

import json
from collections import defaultdict

import pytest

from mixfeat import cli
from mixfeat.operators import OPERATORS

launches = pytest.importorskip("mixfeat.benchmarks.launches")
pytest.importorskip("triton")

# The most launches of any shape. Patches that are not whole vectors are padded first, many pairs come in bands, and a
# mean of many rows counts its targets first.
CEILINGS = {
    ("patch_conv", "forward"): 3,
    ("patch_conv", "forward + backward"): 7,
    ("patch_conv", "mixed, all gradients"): 9,
    ("pairwise_mixup_loss", "forward"): 16,
    ("pairwise_mixup_loss", "forward + backward"): 24,
    ("gradient_descent", "32 steps"): 4,
    ("mixup", "forward"): 1,
    ("mixup", "forward + backward"): 2,
    ("cutmix", "forward"): 1,
    ("cutmix", "forward + backward"): 2,
    ("mixup_cross_entropy", "forward"): 4,
    ("mixup_cross_entropy", "forward + backward"): 5,
    ("soft_target_cross_entropy", "forward"): 2,
    ("soft_target_cross_entropy", "forward + backward"): 3,
    ("mixup_binary_cross_entropy", "forward"): 3,
    ("mixup_binary_cross_entropy", "forward + backward"): 4,
}
# and of usual ones, forward and backward: operator, name of the shape, dtype
USUAL = {
    ("patch_conv", "patches", "bfloat16"): 3,
    ("patch_conv", "image", "bfloat16"): 4,
    ("patch_conv", "paper-10", "float32"): 3,
    ("pairwise_mixup_loss", "paper-10", "float32"): 9,
    ("pairwise_mixup_loss", "theory, R=128", "float32"): 9,
    ("mixup_cross_entropy", "imagenet", "bfloat16"): 3,
}
# Kernels that leave multiprocessors empty; the list may only get shorter. A network is one program of gradient_descent.
UNDERFILLED = {
    "gradient_descent": {"theory, R=8", "theory, R=128"},
    "patch_conv_backward_input_kernel": {"paper-50", "wide"},
}


@pytest.fixture(scope="module")
def rows():
    return [launches.row(call) for call in launches.calls()]


def name(row):
    return row["case"].partition(" (")[0]


def test_few_launches(rows):
    most = defaultdict(int)
    for row in rows:
        most[row["operator"], row["direction"]] = max(most[row["operator"], row["direction"]], row["launches"])
        usual = USUAL.get((row["operator"], name(row), row["dtype"]))
        if usual and row["direction"] == "forward + backward":
            assert row["launches"] <= usual, row
    assert {operator for operator, _ in most} == set(OPERATORS)
    assert most.keys() == CEILINGS.keys()
    assert {key: count for key, count in most.items() if count > CEILINGS[key]} == {}


def test_no_multiprocessor_is_empty_that_has_work(rows):
    found = defaultdict(set)
    for row in rows:
        for underfilled in row["underfilled"]:
            found[underfilled.partition(": ")[2]].add(name(row))
    assert {kernel: shapes for kernel, shapes in found.items() if not shapes <= UNDERFILLED.get(kernel, set())} == {}


def test_least_bytes(rows):
    """No call moves less than its arguments and results, and a mix no more."""
    for row in rows:
        assert row["bytes"] >= row["least_bytes"] > 0
        if row["operator"] in ("mixup", "cutmix") and row["direction"] == "forward":
            assert row["bytes"] == row["least_bytes"]


def test_command(tmp_path, capsys, monkeypatch):
    tiny = [call for call in launches.calls() if call.case.startswith("tiny")]
    monkeypatch.setattr(launches, "calls", lambda: tiny)
    file = tmp_path / "shapes.json"
    assert cli.main(["compile-report", "--shapes", "--kernels", "pairwise_mixup_loss", "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(file.read_text())["calls"]
    assert len(lines) == len(rows) + 4
    assert [row["direction"] for row in rows] == ["forward", "forward + backward", "forward + backward"]
    for row in rows:
        assert row["kernels"].count("pairwise_mixup_loss_gradient_kernel") == (row["direction"] != "forward")
        assert row["programs"]["H100"] > 0
        assert row["instructions"] > row["least_instructions"] > 0
    assert cli.main(["compile-report", "--shapes", "--targets", "sm_90"]) == 2
    assert "--shapes must be without --targets" in capsys.readouterr().err
