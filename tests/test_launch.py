"""Experiments run by several processes: under torchrun, which share a store, and in shards, whose stores are merged."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from mixfeat import cli
from mixfeat.experiments.store import Record, Store, StoreError, merge

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = [
    "--num-classes=3", "--filters-per-class=2", "--num-patches=4", "--num-samples=9", "--steps=400", "--seeds=2",
    "--test-samples=30", "--evaluations=3", "--lr=4", "--device=cpu",
]  # fmt: skip
GRID = ["--x", "degree", "2", "4", "--y", "init_scale", "0.5", "1.5"]


def torchrun(arguments, *, ranks=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [*command, *map(str, arguments)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


def numbers(path):
    """What a JSON file of ``sweep`` or ``reproduce theory`` holds but for how long it took, and where."""
    document = json.loads(path.read_text())
    for row in document.get("cells") or document["results"].values():
        assert row.pop("seconds") >= 0
    del document["environment"]
    return document


@pytest.mark.parametrize(
    ("command", "runs"),
    [(["sweep", *GRID], 12), (["reproduce", "theory"], 3), (["reproduce", "theory", "--methods", "erm"], 1)],
    ids=["sweep", "theory", "fewer runs than ranks"],
)
def test_ranks_share_the_runs(command, runs, tmp_path, capsys):
    """Each run falls to one rank, and the results are those of one process."""
    process = torchrun(["-m", "mixfeat", *command, *SMALL, "--out", tmp_path / "a", "--json", tmp_path / "a.json"])
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("figure: ") == 1
    done = re.findall(rf"rank [01]: (\d+) of {runs}: ", err)
    assert sorted(map(int, done)) == list(range(1, runs + 1))
    assert cli.main([*command, *SMALL, "--out", str(tmp_path / "b"), "--json", str(tmp_path / "b.json")]) == 0
    assert numbers(tmp_path / "a.json") == numbers(tmp_path / "b.json")
    assert not list((tmp_path / "a").glob("*-wal"))


def test_the_documented_launch(tmp_path):
    """The page's command, in the folder that it is typed in, of a small problem."""
    page = (ROOT / "docs" / "distributed.md").read_text()
    (line,) = re.findall(r"^\$ torchrun (.* mixfeat sweep.*)$", page, re.MULTILINE)
    words = shlex.split(line, comments=True)
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, *GRID, *SMALL], cwd=tmp_path, text=True,
        capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert list(tmp_path.rglob("sweep.png"))


def test_a_killed_rank_ends_the_launch_and_nothing_is_lost(tmp_path):
    arguments = [
        "sweep",
        *GRID,
        *SMALL,
        "--steps=1500",
        "--out",
        str(tmp_path / "a"),
        "--json",
        str(tmp_path / "a.json"),
    ]
    code = (
        "import os, sys; from mixfeat import cli; from mixfeat.experiments import theory\n"
        "theory._CHECKPOINT_SECONDS = 0.02\n"
        f"open({str(tmp_path)!r} + '/pid-' + os.environ['RANK'], 'w').write(str(os.getpid()))\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    process = torchrun([script, *arguments])
    store, pid = tmp_path / "a" / "sweep.sqlite-wal", tmp_path / "pid-1"
    while not (pid.exists() and store.exists() and store.stat().st_size > 60_000):  # some checkpoints
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    with pytest.raises(StoreError, match="in use by another process"):
        Store(tmp_path / "a" / "sweep.sqlite", "sweep", {}, resume=True)
    os.kill(int(pid.read_text()), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode
    assert cli.main([*arguments, "--resume"]) == 0
    arguments[-3], arguments[-1] = str(tmp_path / "b"), str(tmp_path / "b.json")
    assert cli.main(arguments) == 0
    assert numbers(tmp_path / "a.json") == numbers(tmp_path / "b.json")


def test_launch_refuses_several_machines(tmp_path, monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["sweep", *GRID, *SMALL, "--out", str(tmp_path)]) == 2
    assert "several machines cannot share one store" in capsys.readouterr().err


def sweep(folder, *options):
    return cli.main(["sweep", *GRID, *SMALL, "--out", str(folder), "--json", f"{folder}.json", *options])


def test_shards_merge_to_the_whole(tmp_path, capsys):
    for shard in range(3):
        assert sweep(tmp_path / str(shard), "--shard", f"{shard}/3") == 0
        assert f"shard {shard}/3: 4 of 12 cells are in " in capsys.readouterr().out
    sources = [tmp_path / "0", tmp_path / "1" / "sweep.sqlite", tmp_path / "2", tmp_path / "0"]
    document = tmp_path / "merge.json"
    command = ["merge", "--out", str(tmp_path / "all"), "--json", str(document), *map(str, sources)]
    assert cli.main(command) == 0
    assert f"12 records of 4 stores are in {tmp_path / 'all' / 'sweep.sqlite'}" in capsys.readouterr().out
    assert json.loads(document.read_text())["records"] == 12
    assert sweep(tmp_path / "all", "--resume") == 0
    assert sweep(tmp_path / "single") == 0
    assert numbers(tmp_path / "all.json") == numbers(tmp_path / "single.json")
    assert cli.main(command) == 2
    assert "is there already: choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize("shard", ["2/2", "3/2", "1/-2", "1", "a/b", "1/0", "1/2/3", ""])
def test_bad_shards(shard, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        sweep(tmp_path, "--shard", shard)
    assert f"--shard: must be I/N with 0 <= I < N, got {shard!r}" in capsys.readouterr().err


def store_of(path, records, settings=None):
    with Store(path, "sweep", settings or {"a": 1}) as store:
        for name, record in records.items():
            store.save(name, record)
    return path


def test_merge_takes_what_is_further(tmp_path):
    def record(finished, step):
        return Record(finished, step, 1.0, {"x": torch.tensor([float(step), torch.nan])})

    one = store_of(tmp_path / "1", {"a": record(False, 3), "b": record(True, 9), "c": record(True, 9)})
    two = store_of(tmp_path / "2", {"a": record(False, 5), "b": record(False, 7), "c": record(True, 9)})
    three = store_of(tmp_path / "3", {"d": record(False, 1), "a": record(False, 4)})
    assert merge(tmp_path / "all", [one, two, three]) == 4
    with Store(tmp_path / "all", "sweep", {"a": 1}, resume=True) as store:
        found = {name: (store.get(name).finished, store.get(name).step) for name in store.names()}
    assert found == {"a": (False, 5), "b": (True, 9), "c": (True, 9), "d": (False, 1)}


def test_merge_refuses(tmp_path):
    done = Record(True, 9, 1.0, {"x": torch.ones(2)})
    good = store_of(tmp_path / "good", {"a": done})
    other = store_of(tmp_path / "other", {"a": done._replace(state={"x": torch.zeros(2)})})
    settings = store_of(tmp_path / "settings", {"b": done}, {"a": 2})
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("no store" * 40)
    cut = tmp_path / "cut"
    cut.write_bytes(good.read_bytes()[:5000])
    for bad, message in [
        (other, "other has another result of a than the stores before it"),
        (settings, r"settings holds a run with other settings \(a 2 there and 1 asked\)"),
        (tmp_path / "missing", "missing is not there"),
        (tmp_path / "text", "text is not a mixfeat store"),
        (cut, "cut is damaged"),
    ]:
        with pytest.raises(StoreError, match=message):
            merge(tmp_path / "all", [good, bad])
        assert not (tmp_path / "all").exists()
        assert not list(tmp_path.glob(".*"))
    for first in (tmp_path / "missing", tmp_path / "empty", tmp_path / "text", cut):
        with pytest.raises(StoreError, match=first.name):
            merge(tmp_path / "all", [first, good])
    with Store(good, "sweep", {"a": 1}, resume=True), pytest.raises(StoreError, match="good is in use"):
        merge(tmp_path / "all", [good])
    assert merge(tmp_path / "all", [good]) == 1


def test_processes_share_a_store(tmp_path):
    """What one saves the others read; who asks for the file alone is told that it is in use, as the others are then."""
    path, record = tmp_path / "store.sqlite", Record(True, 1, 1.0, {"x": torch.ones(2)})
    with Store(path, "t", {}), pytest.raises(StoreError, match="in use"):
        Store(path, "t", {})
    with Store(path, "t", {}, shared=True) as first, Store(path, "t", {}, shared=True) as second:
        first.save("a", record)
        second.save("b", record)
        assert second.get("a").step == first.get("b").step == 1
        with pytest.raises(StoreError, match="in use by another process"):
            Store(path, "t", {}, resume=True)
    with Store(path, "t", {}, resume=True) as store:
        assert store.names() == ["a", "b"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["store.sqlite"]
