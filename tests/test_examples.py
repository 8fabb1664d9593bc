"""examples/: every script runs, and finds what it shows; the notebook runs cell by cell."""

import json
import re
import runpy
import sys

import pytest
from conftest import ROOT

FOLDER = ROOT / "examples"


@pytest.fixture
def run(monkeypatch, capsys, one_thread):
    """Run a script as its user does, with small settings; returns what it prints."""
    pytest.importorskip("sklearn", reason="needs pip install '.[images]'")
    monkeypatch.setenv("MPLBACKEND", "agg")

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def numbers(line):
    return [float(word) for word in re.findall(r"\d+\.?\d*", line)]


def test_every_example_is_run_here_and_short():
    text = (ROOT / "tests/test_examples.py").read_text()
    for path in FOLDER.glob("*"):
        assert f'"{path.name}"' in text
        assert path.suffix != ".py" or len(path.read_text().splitlines()) <= 60


@pytest.mark.parametrize("arguments", [(), ("--prob", 0)], ids=["mixed", "as they are"])
def test_digits(run, arguments):
    """Chance is 10%."""
    accuracy = run("digits_mixup.py", "--epochs", 2, *arguments).splitlines()[-1]
    assert numbers(accuracy)[0] > 0.3, accuracy


def test_theorem(run):
    output = run("midpoint_theorem.py", "--classes", 5, "--steps", 1000)
    erm, midpoint = (numbers(line)[0] for line in output.splitlines())
    assert erm < midpoint, output


def test_phase_diagram(run, tmp_path):
    arguments = ("--classes", 4, "--points", 3, "--steps", 1000, "--out", tmp_path / "phase.png")
    output = run("phase_diagram.py", *arguments)
    erm, midpoint = (numbers(grid) for grid in re.findall(r"\[\[.*?\]\]", output, re.DOTALL))
    assert len(erm) == len(midpoint) == 9
    assert sum(erm) < sum(midpoint), output
    assert (tmp_path / "phase.png").stat().st_size > 1000


def test_notebook(monkeypatch, one_thread):
    """Each cell runs after those above it, the settings being smaller; outputs are there, and small."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((FOLDER / "phase_diagram.ipynb").read_text())
    assert notebook["nbformat"] == 4
    names, ids = {}, set()
    for cell in notebook["cells"]:
        ids.add(cell["id"])
        if cell["cell_type"] == "code":
            assert cell["execution_count"]
            exec("".join(cell["source"]), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                assert {"classes", "points", "steps"} <= names.keys()
                names |= {"classes": 4, "points": 2, "steps": 300}
    assert len(ids) == len(notebook["cells"])
    assert set(names["shares"]) == {"ERM", "Midpoint Mixup"}
    images = [o["data"] for c in notebook["cells"] for o in c.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert len(images) == 1
    assert (FOLDER / "phase_diagram.ipynb").stat().st_size < 100_000
