"""The engine: records survive everything that happens to files and processes, and no division of work changes one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import processes
import pytest
import torch
from conftest import ROOT

import mixfeat as mf
from mixfeat.experiments import engine
from mixfeat.experiments.common import BaseSettings
from mixfeat.experiments.engine import Record, Results, ResultsError

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Settings(BaseSettings):
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True)
class Walk:
    """A run that adds numbers of its own generator, one a step; its state holds the generator's state."""

    name: str
    steps: int = 20
    pause: float = 0.0
    dies: tuple[str, int] | None = None  # a folder in which to count deaths, and how many to die

    settings: ClassVar = Settings()
    group: ClassVar = None

    @property
    def label(self):
        return f"walk {self.name}"

    @staticmethod
    def advance(runs: "Sequence[Walk]", records, seconds):
        return [run._advance(record, seconds) for run, record in zip(runs, records, strict=True)]

    def _advance(self, record, seconds):
        if self.dies:
            folder, times = self.dies
            deaths = len(os.listdir(folder))
            if deaths < times:
                Path(folder, str(deaths)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        generator = torch.Generator().manual_seed(len(self.name))
        total = torch.zeros(())
        if record:
            generator.set_state(record.state["generator"])
            total = record.state["total"]
        step, started = record.step if record else 0, time.monotonic()
        while step < self.steps:
            total = total + torch.randn((), generator=generator)
            step += 1
            time.sleep(self.pause)
            if time.monotonic() - started >= seconds:
                break
        state = {"total": total, "generator": generator.get_state(), "pid": torch.tensor(os.getpid())}
        return Record(step == self.steps, step, time.monotonic() - started, state)


def totals(records):
    return {name: record.state["total"].item() for name, record in records.items()}


def expected(*names, steps=20):
    return {n: sum(torch.randn((), generator=g) for _ in range(steps)).item()
            for n in names for g in [torch.Generator().manual_seed(len(n))]}  # fmt: skip


# results


def record_of(step, size=3):
    return Record(False, step, 1.5, {"weight": torch.full((size,), float(step)), "learned": torch.tensor([True])})


def assert_same(a, b):
    assert a[:3] == b[:3]
    assert a.state.keys() == b.state.keys()
    for name in a.state:
        assert torch.equal(a.state[name], b.state[name]), name


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_results_keep_records(tmp_path):
    with Results(tmp_path / "deep" / "runs", "theory", {"lr": 1}) as results:
        assert results.get("erm") is None
        results.save("erm", record_of(1))
        results.save("erm", record_of(2))
        results.save("midpoint", record_of(3))
    with Results(tmp_path / "deep" / "runs", "theory", {"lr": 1}, resume=True) as results:
        assert_same(results.get("erm"), record_of(2))
        assert_same(results.get("midpoint"), record_of(3))
    names = {path.name for path in (tmp_path / "deep" / "runs").iterdir()}
    assert names - {".lock"} == {"settings.json", "erm.run", "midpoint.run"}


def test_results_of_a_command_that_saved_nothing_are_new(tmp_path):
    Results(tmp_path, "theory", {"lr": 1}).close()
    with Results(tmp_path, "theory", {"lr": 2}) as results:
        results.save("erm", record_of(1))
    with Results(tmp_path, "theory", {"lr": 2}, resume=True) as results:
        assert results.get("erm").step == 1


def test_results_refuse_what_they_would_overwrite_or_mix(tmp_path):
    with Results(tmp_path, "theory", {"lr": 1.0, "steps": 5, "signal": (1, 2)}) as results:
        results.save("erm", record_of(1))
    before = content(tmp_path)
    with pytest.raises(ResultsError, match="already has results: pass --resume to continue, or choose another folder"):
        Results(tmp_path, "theory", {"lr": 1.0, "steps": 5, "signal": (1, 2)})
    for resume in (False, True):
        with pytest.raises(
            ResultsError, match=r"other settings \(lr 1.0 there and 2.0 asked, steps 5 there and 6 asked\)"
        ):
            Results(tmp_path, "theory", {"lr": 2.0, "steps": 6, "signal": (1, 2)}, resume=resume)
    with pytest.raises(ResultsError, match="belongs to the experiment 'theory', not 'images'"):
        Results(tmp_path, "images", {}, resume=True)
    about = json.loads(before["settings.json"])
    (tmp_path / "settings.json").write_text(json.dumps({**about, "version": 4}))
    with pytest.raises(ResultsError, match="has version 4, this mixfeat needs 3"):
        Results(tmp_path, "theory", about["settings"], resume=True)
    (tmp_path / "settings.json").write_bytes(before["settings.json"])
    assert content(tmp_path) == before


def test_a_record_belongs_to_its_settings_and_its_name(tmp_path):
    for lr in (1, 2):
        with Results(tmp_path / str(lr), "theory", {"lr": lr}) as results:
            results.save("erm", record_of(lr))
            results.save("midpoint", record_of(lr))
    other = (tmp_path / "1" / "erm.run").read_bytes()
    for path in (tmp_path / "2" / "erm.run", tmp_path / "1" / "midpoint.run"):
        path.write_bytes(other)
        with (
            Results(path.parent, "theory", {"lr": int(path.parent.name)}, resume=True) as results,
            pytest.raises(ResultsError, match=f"{path.name} is damaged, or belongs to other settings: delete it"),
        ):
            results.get(path.stem)


def test_results_are_locked_while_open(tmp_path):
    code = f"""
from pathlib import Path
from mixfeat.experiments.engine import Results, ResultsError
try:
    Results(Path({str(tmp_path)!r}), "theory", {{}}, resume=True)
except ResultsError as error:
    print(error)
"""
    with Results(tmp_path, "theory", {}) as results:
        results.save("erm", record_of(1))
        (ended,) = processes.run(code)
        assert "is in use by another process: wait for it, or choose another folder" in ended.stdout, ended.stderr
    with Results(tmp_path, "theory", {}, resume=True) as results:
        assert results.get("erm").step == 1


def test_results_refuse_foreign_and_damaged_files(tmp_path):
    folder = tmp_path / "runs"
    with Results(folder, "theory", {}) as results:
        results.save("erm", record_of(1, size=1000))
    good = content(folder)
    middle = len(good["erm.run"]) // 2
    flipped = bytearray(good["erm.run"])
    flipped[middle] ^= 1
    for damaged in (b"my notes\n" * 100, b"x", b"", good["erm.run"][:middle], bytes(flipped), good["erm.run"] + b"\0"):
        (folder / "erm.run").write_bytes(damaged)
        with (
            Results(folder, "theory", {}, resume=True) as results,
            pytest.raises(ResultsError, match=r"erm.run is dam"),
        ):
            results.get("erm")
        assert content(folder)["erm.run"] == damaged
    for damaged in (b"", b"notes", b"[]", b"{}", b"\xff\xfe", b'{"version": 3, "experiment": "theory", "settings": 1}'):
        (folder / "settings.json").write_bytes(damaged)
        with pytest.raises(ResultsError, match=r"settings.json is damaged: move"):
            Results(folder, "theory", {}, resume=True)
        assert content(folder)["settings.json"] == damaged
    (folder / "settings.json").unlink()
    with pytest.raises(ResultsError, match=r"settings.json cannot be read: No such file"):
        Results(folder, "theory", {}, resume=True)
    (tmp_path / "file").touch()
    with pytest.raises(ResultsError, match="file cannot be used: File exists"):
        Results(tmp_path / "file", "theory", {})


def test_a_full_disk_leaves_the_record_before(tmp_path, monkeypatch):
    with Results(tmp_path, "theory", {}) as results:
        results.save("erm", record_of(1))

        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ResultsError, match=r"erm.run cannot be written: No space left on device"):
            results.save("erm", record_of(2))
        assert_same(results.get("erm"), record_of(1))


# training


@pytest.mark.parametrize("chunk", [0, 100])
def test_runs_end_and_results_are_kept(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "CHUNK_SECONDS", chunk)
    runs, reports = [Walk("a"), Walk("bb", 7)], []
    with Results(tmp_path, "walk", {}) as results:
        records = engine.train(runs, results, report=lambda *report: reports.append(report))
        assert totals(records) == expected("a") | expected("bb", steps=7)
        for run in runs:
            assert_same(results.get(run.name), records[run.name])
        trained = len(reports)
        assert trained == (27 if chunk == 0 else 2)
        assert [run.name for run, _, after in reports if after.finished] == ["a", "bb"]
        assert all(before is None or before.step < after.step for _, before, after in reports)
        again = engine.train([*runs, Walk("ccc")], results, report=lambda *report: reports.append(report))
    assert totals(again) == totals(records) | expected("ccc")
    assert {run.name for run, *_ in reports[trained:]} == {"ccc"}
    assert engine.train([]) == {}


def test_stopped_at_every_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "CHUNK_SECONDS", 0)
    steps = []

    def stop(run, before, after):
        steps.append(after.step)
        raise KeyboardInterrupt

    for _ in range(20):
        with Results(tmp_path, "walk", {}, resume=True) as results, pytest.raises(KeyboardInterrupt):
            engine.train([Walk("a")], results, report=stop)
    assert steps == list(range(1, 21))
    with Results(tmp_path, "walk", {}, resume=True) as results:
        assert totals(engine.train([Walk("a")], results, report=stop)) == expected("a")


def test_workers_share_the_runs_and_one_dies(tmp_path, monkeypatch):
    """One start of processes for several questions: it takes seconds on a busy machine."""
    monkeypatch.setattr(engine, "CHUNK_SECONDS", 0.05)
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    runs = [Walk("a", pause=0.02), Walk("bb", pause=0.02), Walk("ccc", pause=0.01, dies=(str(deaths), 2))]
    pids, threads = set(), []
    with Results(tmp_path / "runs", "walk", {}) as results, engine.Local(2) as workers:
        given = workers.threads
        monkeypatch.setattr(workers, "threads", lambda tasks: threads.append(tasks) or given(tasks))
        records = engine.train(runs, results, workers, lambda run, before, after: pids.add(after.state["pid"].item()))
        assert totals(records) == expected("a", "bb", "ccc")
        assert len(os.listdir(deaths)) == 2
        assert len(pids) >= 2
        assert os.getpid() not in pids
        assert max(threads) == 3

        often = tmp_path / "often"
        often.mkdir()
        with pytest.raises(engine.WorkerDiedError, match="walk dd: every worker that tried it died"):
            engine.train([Walk("dd", dies=(str(often), 99))], results, workers)
        assert len(os.listdir(often)) == 3

        monkeypatch.setattr(torch, "__version__", "2.0")
        with pytest.raises(
            engine.EngineError, match=r"a worker cannot be used: it has torch .*, and this command .* 2.0"
        ):
            engine.train([Walk("e")], results, workers)
        monkeypatch.undo()
    for _ in range(100):
        alive = [pid for pid in pids if running(pid)]
        if not alive:
            break
        time.sleep(0.1)
    assert not alive


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_end_with_a_parent_that_is_killed():
    code = """
import os, signal, sys
from mixfeat.experiments import engine
workers = engine.Local(2)
print(workers.submit(os.getpid).result(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=120)
    assert process.returncode == -signal.SIGKILL
    worker = int(process.stdout)
    for _ in range(100):
        if not running(worker):
            break
        time.sleep(0.1)
    assert not running(worker)


def test_threads_share_the_cores(monkeypatch):
    monkeypatch.setattr(engine, "cpu_count", lambda: 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    workers = engine.Local(12)
    assert [workers.threads(tasks) for tasks in (100, 12, 8, 5, 1)] == [1, 1, 2, 3, 16]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert [workers.threads(tasks) for tasks in (8, 5, 1)] == [2, 2, 2]
    assert engine.Local(1).threads(1) is None


def test_backend_of_the_command_is_the_workers(monkeypatch):
    seen = []
    monkeypatch.setattr(
        Walk,
        "_advance",
        lambda run, record, seconds: seen.append(mf.backends.serving("cpu")) or Record(True, 1, 0.0, {}),
    )
    with mf.backend("reference"):
        engine.train([Walk("a")])
    assert seen == ["reference"]
    monkeypatch.setattr(mf.backends, "available", lambda: ("reference",))
    with pytest.raises(engine.EngineError, match="it lacks the backend cpu, which this command uses"):
        engine._advance({"backend": "cpu", "mixfeat": mf.__version__, "torch": torch.__version__}, [], [], 0, None)
