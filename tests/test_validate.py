"""`mixfeat check` finds what is wrong: kernels that are broken on purpose do not pass."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from conftest import SEED

import mixfeat as mf
from mixfeat import cli, operators, validate

pytestmark = pytest.mark.usefixtures("one_thread")

# operator: those of the CPU library that serve it, each with the place of a result that it would spoil
NATIVE = {
    "patch_conv": {"patch_conv": 0, "patch_conv_backward": 1},
    "pairwise_mixup_loss": {"pairwise_mixup_loss": None},
    "mixup": {"mixup": None, "mixup_backward": None},
    "mixup_cross_entropy": {"mixup_cross_entropy": 2},
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


def test_command_of_a_users_problem(capsys, tmp_path):
    """Every operator that the problem has, at its shape; the report of a failure too."""
    files = {name: tmp_path / f"check.{name}" for name in ("json", "junit")}
    command = ["check", "--shape", "7,3,5,4,2", "--backend", "cpu", "--dtype", "float32"]
    options = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    assert cli.main([*command, "--activation", "PowerReLU(3, scale=0.5)", *options]) == 0
    document = json.loads(files["json"].read_text())
    assert document["shape"] == [7, 3, 5, 4, 2]
    assert document["activation"] == "PowerReLU(degree=3, scale=0.5)"
    shapes = {row["operator"]: row["worst"]["value"]["shape"] for row in document["checks"]}
    assert set(shapes) == set(validate.OPERATORS) - {"cutmix"}
    assert shapes["patch_conv"].startswith("N7xP3xD5xC4xM2")
    assert "PowerReLU(degree=3, scale=0.5)" in shapes["pairwise_mixup_loss"]
    assert "7x3x5" in shapes["mixup"].replace("N", "")
    assert shapes["mixup_cross_entropy"].startswith("N7xC4")
    suite = ElementTree.parse(files["junit"]).getroot()
    assert (suite.tag, suite.get("tests"), suite.get("failures")) == ("testsuite", str(len(shapes)), "0")
    assert {case.get("classname") for case in suite} == {f"mixfeat.{name}" for name in shapes}


def test_report_of_a_failure(tmp_path, monkeypatch):
    file = tmp_path / "check.xml"
    broken = replace(validate.OPERATORS["mixup"], function=lambda **_: torch.zeros(()))
    monkeypatch.setitem(validate.OPERATORS, "mixup", broken)
    command = [
        "check",
        "--quick",
        "--operator",
        "mixup",
        "--backend",
        "cpu",
        "--dtype",
        "float32",
        "--junit",
        str(file),
    ]
    assert cli.main(command) == 1
    (case,) = ElementTree.parse(file).getroot()
    (failure,) = case
    assert failure.tag == "failure"
    assert failure.get("message") in failure.text


def test_seconds_bring_new_inputs():
    """At least one round; then others, until the time is up."""
    shape = (3, 2, 4, 3, 2)
    once = validate.check("mixup", "cpu", "float32", shape=shape)
    often = validate.check("mixup", "cpu", "float32", shape=shape, seconds=0.3)
    assert once.passed
    assert often.passed
    assert often.cases > once.cases == 3
    assert often.seconds >= 0.3


def test_reference_of_many_pairs(monkeypatch):
    """Rows of pairs at a time give what all pairs at once do."""
    entry = validate.OPERATORS["pairwise_mixup_loss"]
    (case, *_) = entry.problem((7, 3, 5, 4, 2))
    arguments = entry.arguments(case, torch.float64, "cpu", torch.Generator().manual_seed(SEED))
    whole = entry.results(entry.formula, arguments)
    monkeypatch.setattr(operators, "_MOST_IN_PAIRS", 2 * (7 * 15 + 7 * 3 * 8))  # two rows
    blocks = entry.results(entry.formula, arguments)
    for name, value in whole.items():
        torch.testing.assert_close(blocks[name], value)


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Sine()", "needs one of .*PolyReLU, .*, as in 'PolyReLU(8, 0.1)', got 'Sine()'"),
        ("PolyReLU(8, open('x'))", "needs one of .*, got \"PolyReLU(8, open('x'))\""),
        ("mixfeat.ReLU()", "needs one of .*, got 'mixfeat.ReLU()'"),
        ("(", "needs one of .*, got '('"),
        ("PolyReLU(0, 0.1)", "'PolyReLU(0, 0.1)': degree must be between 1 and 16, got 0"),
        ("Power(2, 3, 4)", "'Power(2, 3, 4)': .*argument"),
    ],
)
def test_activations_that_are_none(text, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["check", "--activation", text])
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), capsys.readouterr().err)


def test_command_refuses_what_is_not_to_be_had(capsys, tmp_path):
    requests = {
        "nothing to check: cuda trains networks in float32, and triton has no float64": [
            "--backend",
            "triton",
            "--dtype",
            "float64",
        ],
        f"--json {tmp_path} cannot be written: it is a folder": ["--json", str(tmp_path)],
        f"--junit {tmp_path} cannot be written: it is a folder": ["--junit", str(tmp_path)],
        "--seconds must be finite and positive, got nan": ["--seconds", "nan"],
        "--shape must be without --operator cutmix": ["--shape", "1,2,3,4,5", "--operator", "cutmix"],
        "--activation must be with an operator that has one, got mixup": [
            "--activation",
            "ReLU",
            "--operator",
            "mixup",
        ],
    }
    if "triton" not in mf.backends.available():
        requests.pop("nothing to check: cuda trains networks in float32, and triton has no float64")
    for message, args in requests.items():
        assert cli.main(["check", "--quick", *args]) == 2
        assert message in capsys.readouterr().err
