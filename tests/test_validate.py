"""`mixfeat check` finds what is wrong: kernels that are broken on purpose do not pass."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import SEED

import mixfeat as mf
from mixfeat import cli, validate

pytestmark = pytest.mark.usefixtures("one_thread")

# operator: those of the CPU library that serve it, each with the place of a result that it would spoil
NATIVE = {
    "patch_conv": {"patch_conv": 0, "patch_conv_backward": 1},
    "pairwise_mixup_loss": {"pairwise_mixup_loss": None},
    "mixup": {"mixup": None, "mixup_backward": None},
    "mixup_cross_entropy": {"mixup_cross_entropy": 1},
    "soft_target_cross_entropy": {"soft_target_cross_entropy": 0},
}


@pytest.mark.parametrize("dtype", validate.DTYPES)
@pytest.mark.parametrize("operator", validate.OPERATORS)
def test_all_is_well(operator, dtype):
    outcome = validate.check(operator, "cpu", dtype, seed=SEED, quick=True)
    assert outcome.failures == []
    assert outcome.passed
    assert outcome.repeats
    assert all(0 <= worst["of budget"] <= 1 for worst in outcome.worst.values())
    assert set(outcome.worst) == {"value", *(f"{name} grad" for name in validate.OPERATORS[operator].differentiated)}


def spoil(monkeypatch, name, place, change):
    native = getattr(torch.ops.mixfeat_cpu, name).default

    def broken(*args):
        results = native(*args)
        result = results if place is None else results[place]
        if result.numel():
            change(result)
        return results

    monkeypatch.setattr(torch.ops.mixfeat_cpu, name, SimpleNamespace(default=broken))


@pytest.mark.parametrize(
    ("operator", "native", "place"), [(o, n, p) for o, natives in NATIVE.items() for n, p in natives.items()]
)
def test_a_broken_kernel_fails(monkeypatch, capsys, operator, native, place):
    """One number off by 0.1%, of the largest."""
    spoil(monkeypatch, native, place, lambda result: result.view(-1)[:1].add_(1e-3 * result.abs().max()))
    outcome = validate.check(operator, "cpu", "float32", seed=SEED, quick=True)
    assert not outcome.passed
    assert any("exceeds its budget" in failure for failure in outcome.failures)
    assert cli.main(["check", "--quick", "--operator", operator, "--backend", "cpu", "--dtype", "float32"]) == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize("operator", NATIVE)
def test_a_kernel_that_leaves_something_unwritten_fails(monkeypatch, operator):
    native, place = next(iter(NATIVE[operator].items()))
    spoil(monkeypatch, native, place, lambda result: result.view(-1)[-1:].fill_(torch.nan))
    assert not validate.check(operator, "cpu", "float32", quick=True).passed


def test_a_kernel_that_does_not_repeat_fails(monkeypatch):
    spoil(monkeypatch, "mixup", None, lambda result: result.mul_(1 + 4e-7 * torch.rand(())))
    outcome = validate.check("mixup", "cpu", "float32", quick=True)
    assert outcome.failures == ["a second call gave other bits"]


def test_a_kernel_that_raises_fails(monkeypatch):
    def broken(*args):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(torch.ops.mixfeat_cpu, "mixup", SimpleNamespace(default=broken))
    outcome = validate.check("mixup", "cpu", "float32", quick=True)
    assert len(outcome.failures) == outcome.cases
    assert "RuntimeError: no such luck" in outcome.failures[0]


def test_command(capsys, tmp_path):
    file = tmp_path / "check.json"
    args = ["--quick", "--operator", "mixup", "--backend", "cpu", "reference", "--seed", "7", "--json", str(file)]
    assert cli.main(["check", *args]) == 0
    output = capsys.readouterr().out
    assert output.count("PASS") == 8
    assert "all 8 checks passed" in output
    document = json.loads(file.read_text())
    assert document["seed"] == 7
    assert [row["operator"] for row in document["checks"]] == ["mixup"] * 8
    assert document["environment"]["torch"] == torch.__version__


def test_command_on_the_interpreter(run_python):
    """Asked for Triton where there is no GPU, it says that it runs the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    pytest.importorskip("triton")
    code = (
        "import sys; from mixfeat import cli\n"
        "sys.exit(cli.main(['check', '--backend', 'triton', '--operator', 'mixup', '--dtype', 'float32']))"
    )
    output = run_python(code, TRITON_INTERPRET=None)
    assert "Triton's interpreter" in output
    assert "all 1 checks passed" in output


@pytest.mark.parametrize("args", [["--backend", "none"], ["--operator", "conv"], ["--dtype", "int8"], ["--seed", "x"]])
def test_command_refuses(args, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["check", "--quick", *args])
    assert f"argument {args[0]}: invalid" in capsys.readouterr().err


def test_command_refuses_what_is_not_to_be_had(capsys, tmp_path):
    requests = {
        "nothing to check: triton has no float64": ["--backend", "triton", "--dtype", "float64"],
        "cannot be written: it is a folder": ["--json", str(tmp_path)],
    }
    if "triton" not in mf.backends.available():
        requests.pop("nothing to check: triton has no float64")
    for message, args in requests.items():
        assert cli.main(["check", "--quick", *args]) == 2
        assert message in capsys.readouterr().err
