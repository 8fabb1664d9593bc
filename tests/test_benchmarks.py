"""What `mixfeat bench` makes of its results; the timing itself is not for tests."""

import copy
import json
import re

import pytest
import torch
from conftest import ROOT
from mixfeat.benchmarks import harness, results

from mixfeat import cli


def row(seconds, **changes):
    timing = {"p20": 0.9 * seconds, "p50": seconds, "p80": 1.1 * seconds}
    slower = {name: 3 * value for name, value in timing.items()}
    return {
        "suite": "mixup", "case": "paper (2, 3)", "direction": "forward", "dtype": "float32",
        "timings": {"mixfeat": timing, "eager": slower}, "work": {"bytes": 4e6},
        "limit": {"name": "a copy", "seconds": 1e-3}, "peak_bytes": {"mixfeat": 2**20, "eager": 3 * 2**20},
        "figures": {"threads": 2}, **changes,
    }  # fmt: skip


@pytest.fixture
def document():
    facts = {"version": "1", "commit": "abc", "device": "this", "torch": "2", "triton": None, "date": "2026-01-01"}
    return {**facts, "rows": [row(2e-3), row(4e-3, direction="backward", dtype="bfloat16", limit=None, peak_bytes={})]}


def test_row_in_words(document):
    text = results.describe(document["rows"][0])
    assert text.startswith("mixup paper (2, 3) forward float32:  2 ms  eager 3.00x  2e9 bytes/s  50% of a copy")
    assert "peak mixfeat 1.0 MiB, eager 3.0 MiB" in text


def test_tables(document):
    text = results.tables(document)
    assert "| paper (2, 3), forward            | 2 ms    | 3.0x       | 50%       | 1.0 of 3.0 MiB" in text
    assert "| paper (2, 3), backward, bfloat16 | 4 ms    | 3.0x       |           |  " in text
    assert "- `mixup`, paper (2, 3), forward: threads 2" in text


@pytest.mark.parametrize(("factor", "slower"), [(1.0, 0), (1.15, 0), (1.5, 1), (0.5, 0)])
def test_comparison_with_an_earlier_run(document, factor, slower):
    """Slower counts where it is beyond the spread of both runs."""
    now = copy.deepcopy(document)
    now["rows"][0]["timings"]["mixfeat"] = row(factor * 2e-3)["timings"]["mixfeat"]
    lines = results.compare(now, document)
    assert len(lines) == slower
    assert all("mixup paper (2, 3) forward float32: 2 ms -> 3 ms (1.50x)" in line for line in lines)
    with pytest.raises(ValueError, match="one device: this here, that there"):
        results.compare(now, document | {"device": "that"})


def test_command_without_a_run(document, tmp_path, capsys):
    old, new, figure = (tmp_path / name for name in ("old.json", "new.json", "figure.png"))
    old.write_text(json.dumps(document))
    document["rows"][0] = row(4e-3)
    new.write_text(json.dumps(document))
    assert cli.main(["bench", "--results", str(new), "--compare", str(old), "--plot", str(figure)]) == 1
    assert "2 ms -> 4 ms (2.00x)" in capsys.readouterr().out
    assert figure.read_bytes()[:4] == b"\x89PNG"
    assert cli.main(["bench", "--results", str(old), "--compare", str(old)]) == 0
    assert "nothing is slower" in capsys.readouterr().out


def test_command_runs_a_suite(tmp_path, monkeypatch):
    out = tmp_path / "bench.json"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cli.main(["bench", "--suite", "scaling", "--seconds", "0.01", "--out", str(out)]) == 0
    document = results.load(out)
    assert len(document["rows"]) == 8
    for found in document["rows"]:
        assert set(found) == set(row(1.0))
        assert -0.5 < found["figures"]["exponent"] < 2.5


def test_what_there_is_when_the_time_is_up(tmp_path, capfd):
    out = tmp_path / "bench.json"
    assert cli.main(["bench", "--suite", "scaling", "--limit", "0.5", "--out", str(out)]) == 1
    assert "stopped after 0.5 s" in capfd.readouterr().out
    assert results.load(out)["rows"] == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--suite", "none"], "--suite must be of cross_entropy, mixup, .*, got none"),
        (["--limit", "nan"], "--limit must be finite and positive, got nan"),
        (["--seconds", "0"], "--seconds must be finite and positive, got 0.0"),
        (["--results", "/no/such.json"], r"/no/such.json cannot be read: .*No such file"),
        (["--compare", str(ROOT / "pyproject.toml")], "pyproject.toml cannot be read: "),
        (["--results", str(ROOT / "constraints.txt")], "constraints.txt cannot be read: "),
    ],
)
def test_command_refuses(args, message, capsys):
    assert cli.main(["bench", *args]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_file_of_something_else(tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text('{"version": 1}')
    assert cli.main(["bench", "--results", str(file)]) == 2
    assert "holds no results of `mixfeat bench`: it lacks commit, device" in capsys.readouterr().err


def test_peak_of_memory():
    """What is let go counts no more; what was there before does not count."""

    def run():
        a = torch.empty(1 << 20, device=harness.DEVICE)  # 4 MiB
        del a
        return torch.empty(1 << 19, device=harness.DEVICE), torch.empty(1 << 19, device=harness.DEVICE)

    assert 4 << 20 <= harness.peak_bytes({"run": run})["run"] < 4.1 * 2**20


def test_readme_has_the_committed_results():
    """`python -m mixfeat.benchmarks.results` writes them there."""
    documents = [results.load(path) for path in sorted((ROOT / "benchmarks/results").glob("bench-*.json"))]
    text = (ROOT / "README.md").read_text()
    assert documents
    assert results.with_tables(text, documents) == text
