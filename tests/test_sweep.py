"""The phase diagram: its cells are runs of the theory experiment; how it refuses, is killed and goes on."""

import json
import math
import re
import sys

import processes
import pytest
import torch

import mixfeat as mf
from mixfeat import cli
from mixfeat.experiments import engine, sweep, theory
from mixfeat.experiments.engine import Results

pytestmark = pytest.mark.usefixtures("one_thread")
FIXED = {
    "num_classes": 3, "filters_per_class": 2, "num_patches": 4, "num_samples": 9, "steps": 60, "seeds": 2,
    "test_samples": 30, "evaluations": 3, "lr": 4.0, "device": "cpu",
}  # fmt: skip
SMALL = [f"--{name.replace('_', '-')}={value}" for name, value in FIXED.items()]
GRID = ["--x", "degree", "2", "4", "--y", "init_scale", "0.5", "1.5"]


@pytest.fixture
def run(tmp_path, capsys):
    """Run ``sweep`` small, in the test's folder; gives (exit status, stdout, stderr)."""

    def run(*options, out=tmp_path / "out", grid=GRID):
        try:
            status = cli.main(["sweep", *grid, *SMALL, "--jobs=1", "--out", str(out), *map(str, options)])
        except SystemExit as stop:  # argparse
            status = stop.code
        return status, *capsys.readouterr()

    return run


def assert_refused(result, message):
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.startswith("mixfeat sweep: error: ")
    assert err.count("\n") == 1
    assert message in err


def numbers(path):
    """What a sweep's JSON file holds but for how long it took."""
    document = json.loads(path.read_text())
    for cell in document["cells"]:
        assert cell.pop("seconds") >= 0
    return {key: document[key] for key in ("settings", "x", "y", "tables", "cells")}


def test_cells_are_runs_of_the_theory_experiment(run, tmp_path):
    target = tmp_path / "deep" / "sweep.json"
    status, out, err = run("--json", target)
    assert status == 0, err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["runs", "sweep.png"]
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert f"figure: {tmp_path / 'out' / 'sweep.png'}" in out
    assert out.count("init_scale \\ degree") == 3
    assert "24 of 24: erm: degree 4, init_scale 1.5, seed 1: " in err
    assert len(list((tmp_path / "out" / "runs").glob("*.run"))) == 24

    document = json.loads(target.read_text())
    assert document["x"] == {"name": "degree", "values": [2, 4]}
    assert document["y"] == {"name": "init_scale", "values": [0.5, 1.5]}
    assert document["environment"]["torch"] == document["settings"]["torch"] == torch.__version__
    assert len(document["cells"]) == 12
    for cell in document["cells"]:
        settings = theory.Settings(**{**FIXED, "degree": cell["degree"], "init_scale": cell["init_scale"]})
        expected = theory.summarise(settings, theory.train(settings, cell["method"]))
        assert not cell["diverged"]
        for key in ("train_accuracy", "classes_with_both", "alignment_ratio", "loss"):
            assert cell[key] == expected[key]
        row, column = [0.5, 1.5].index(cell["init_scale"]), [2, 4].index(cell["degree"])
        for quantity in sweep.QUANTITIES:
            mean = sum(expected[quantity]) / len(expected[quantity])
            assert document["tables"][cell["method"]][quantity][row][column] == pytest.approx(mean)


def test_grid_can_grow(run, monkeypatch):
    assert run("--methods", "erm")[0] == 0
    trained, advance = set(), theory._advance
    monkeypatch.setattr(theory, "_advance", lambda runs, *args: trained.add(runs[0].name) or advance(runs, *args))
    wider = ["--x", "degree", "4", "3", "2", "--y", "init_scale", "1.5", "0.5"]
    status, out, _ = run("--methods", "midpoint", "erm", "--resume", grid=wider)
    assert status == 0
    assert trained == {
        f"{method}-degree-{x}-init_scale-{y}-seed-{seed}"
        for y in (1.5, 0.5) for x in (4, 3, 2) for method in ("erm", "midpoint") for seed in (0, 1)
        if method == "midpoint" or x == 3
    }  # fmt: skip
    assert out.index("ERM") < out.index("Midpoint")


def test_the_fine_grid():
    """Every file of its 3600 runs has a name of its own."""
    preset = sweep.PRESETS["fine"]
    grid = sweep.Sweep(sweep.Axis.of("--x", *preset.x), sweep.Axis.of("--y", *preset.y), {"seeds": preset.seeds})
    assert (grid.x.values, len(grid.y.values)) == (tuple(range(2, 12)), 12)
    names = [run.name for cell in grid.cells() for run in cell.runs]
    assert len({name.casefold() for name in names}) == len(names) == 3600
    assert all(re.fullmatch(r"[\w.-]+", name) and len(name) < 100 for name in names)


def test_a_preset_gives_way_to_options(run, tmp_path):
    assert run("--preset", "fine", "--methods", "erm", "--json", tmp_path / "a.json")[0] == 0
    document = json.loads((tmp_path / "a.json").read_text())
    assert (document["settings"]["seeds"], len(document["cells"])) == (2, 4)


def test_any_two_numeric_settings():
    """Also those on which defaults of others depend, and those that the sweep has defaults for."""
    points = sweep.Sweep(sweep.Axis.of("x", "num_classes", 2, "4"), sweep.Axis.of("y", "steps", "10", 20)).points
    assert [(s.num_classes, s.patch_dim, s.rho, s.steps) for s in points.values()] == [
        (2, 4, 0.5, 10), (4, 8, 0.25, 10), (2, 4, 0.5, 20), (4, 8, 0.25, 20),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--x", "magic", "1"], "--x must be one of num_classes, filters_per_class, "),
        (["--x", "device", "1"], "got 'device'"),
        (["--x", "signal", "1"], "got 'signal'"),
        (["--x", "degree"], "--x: degree needs at least one value, got none"),
        (["--y"], "argument --y: expected at least one argument"),
        (["--x", "init_scale", "0.5"], "x and y must be different settings, got init_scale for both"),
        (["--x", "degree", "2", "4", "2"], "--x: the values of degree must differ, got 2 twice"),
        (["--y", "init_scale", "0.5", "0.50"], "--y: the values of init_scale must differ, got 0.5 twice"),
        (["--x", "degree", "2.5"], "--x: a value of degree must be an integer, got '2.5'"),
        (["--y", "init_scale", "big"], "--y: a value of init_scale must be a finite number, got 'big'"),
        (["--y", "init_scale", "nan"], "--y: a value of init_scale must be a finite number, got 'nan'"),
        (["--y", "init_scale", "inf"], "--y: a value of init_scale must be a finite number, got 'inf'"),
        (["--x", "degree", "2", "17"], "degree 17, init_scale 0.5: degree must be "),
        (["--y", "init_scale", "0.5", "0"], "degree 2, init_scale 0.0: init_scale must be positive, got 0.0"),
        (["--y", "lr", "1"], "lr varies, so it cannot be set to 4.0 as well"),
        (["--steps", "2"], "degree 2, init_scale 0.5: steps must be at least evaluations = 3, got 2"),
        (["--methods", "magic"], "argument --methods: invalid choice: 'magic'"),
        (["--device", "abacus"], "device must be a torch device of this machine, got 'abacus'"),
        (["--device", "meta"], "device must be a torch device of this machine, got 'meta'"),
    ],
)
def test_bad_requests(run, options, message, tmp_path):
    assert_refused(run(*options), message)
    assert not (tmp_path / "out").exists()


def test_results_that_cannot_be_used_stay_as_they_were(run, tmp_path):
    runs = tmp_path / "out" / "runs"
    assert run("--methods", "erm")[0] == 0
    content = {path: path.read_bytes() for path in runs.iterdir()}
    assert_refused(run("--methods", "erm"), "runs already has results: pass --resume to continue")
    assert_refused(run("--resume", "--seed", 5), "has results with other settings (seed 0 there and 5 asked)")
    swapped = ["--x", "init_scale", "0.5", "--y", "degree", "2"]
    assert_refused(run("--resume", grid=swapped), "(x degree there and init_scale asked, y init_scale there and degree")
    with mf.backend("reference"):
        assert_refused(run("--resume"), "(backend cpu there and reference asked)")
    assert {path: path.read_bytes() for path in runs.iterdir()} == content
    with Results(tmp_path / "theory" / "runs", "theory", {}) as results:
        results.save("erm", engine.Record(False, 1, 0.0, {}))
    assert_refused(run("--resume", out=tmp_path / "theory"), "belongs to the experiment 'theory', not 'sweep'")
    damaged = next(runs.glob("*.run"))
    damaged.write_bytes(content[damaged][:-1])
    assert_refused(run("--resume"), f"{damaged} is damaged")
    assert damaged.read_bytes() == content[damaged][:-1]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "sweep.sqlite").touch()
    assert_refused(run("--resume", out=tmp_path / "old"), "sweep.sqlite has results of an older mixfeat: move it away")


def test_one_sweep_at_a_time(tmp_path):
    with Results(tmp_path / "out" / "runs", "sweep", {}):
        command = ["sweep", *SMALL, "--out", str(tmp_path / "out")]
        code = f"import sys; from mixfeat import cli; sys.exit(cli.main({command}))"
        (ended,) = processes.run(code)
    assert ended.status == 2
    assert "is in use by another process" in ended.stderr


def test_divergence_is_recorded_and_the_sweep_goes_on(run, tmp_path, monkeypatch):
    grid = ["--x", "degree", "2", "4", "--y", "rho", "0.1", "1e-30"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    draw = theory._draw

    def diverge(settings):
        data, tests, weight = draw(settings)
        if (settings.degree, settings.rho, settings.seed) == (4, 1e-30, 1):
            weight[0, 0, 0] = torch.inf
        return data, tests, weight

    monkeypatch.setattr(theory, "_draw", diverge)
    status, out, err = run("--json", tmp_path / "a.json", "--methods", "erm", "midpoint", grid=grid)
    assert status == 0, err
    assert "nan (nan)" in out
    assert "960/960" in err
    document = json.loads((tmp_path / "a.json").read_text())
    diverged = [(c["method"], c["degree"], c["rho"]) for c in document["cells"] if c["diverged"]]
    assert diverged == [("midpoint", 4, 1e-30), ("erm", 4, 1e-30)]
    assert document["cells"][-1]["classes_with_both"] is None
    assert document["tables"]["midpoint"]["alignment_ratio"][1][1] is None
    assert math.isfinite(document["tables"]["erm"]["alignment_ratio"][1][0])
    monkeypatch.undo()
    status, again, _ = run("--json", tmp_path / "b.json", "--methods", "erm", "midpoint", "--resume", grid=grid)
    assert (status, again) == (0, out)
    assert numbers(tmp_path / "a.json") == numbers(tmp_path / "b.json")
