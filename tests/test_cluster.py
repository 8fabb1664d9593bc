"""Experiments on a Dask cluster: the numbers of one machine; what cannot be used is refused in one line."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_engine import Walk, expected, totals

import mixfeat as mf
from mixfeat import cli
from mixfeat.experiments import engine

distributed = pytest.importorskip("distributed")
dask = pytest.importorskip("dask")
pytestmark = pytest.mark.usefixtures("one_thread")
SOFTWARE = {"backend": "reference", "mixfeat": mf.__version__, "torch": torch.__version__}
SMALL = [
    "--num-classes=3", "--filters-per-class=2", "--num-patches=4", "--num-samples=9", "--steps=60", "--seeds=2",
    "--test-samples=30", "--evaluations=3", "--lr=4", "--device=cpu", "--methods", "erm", "midpoint",
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    """A scheduler and two workers in processes of their own, which find this folder's modules."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (
        pytest.MonkeyPatch.context() as patch,
        dask.config.set({"distributed.scheduler.allowed-failures": 2}),  # as docs/distributed.md starts one
        distributed.LocalCluster(n_workers=0, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
    ):
        patch.setenv("PYTHONPATH", paths)
        patch.setattr(engine, "_CONNECT_SECONDS", 120)  # a busy machine may take more than the default
        cluster.scale(2)
        cluster.wait_for_workers(2, timeout=120)
        yield cluster


def test_numbers_of_one_machine(cluster, tmp_path, capsys):
    for name, options in (("here", ["--jobs", "1"]), ("there", ["--scheduler", cluster.scheduler_address])):
        out = ["--out", str(tmp_path / name), "--json", str(tmp_path / f"{name}.json")]
        assert cli.main(["reproduce", "theory", *SMALL, *out, *options]) == 0
    out = capsys.readouterr().out
    tables = [part.strip() for part in out.split("figure: ")]
    assert tables[0] in tables[1]


def test_a_worker_dies(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "CHUNK_SECONDS", 0.1)
    for name, times in (("once", 1), ("always", 99)):
        (tmp_path / name).mkdir()
        runs = [Walk("a", pause=0.02), Walk("bb", pause=0.02, dies=(str(tmp_path / name), times))]
        with engine.Cluster(cluster.scheduler_address, SOFTWARE) as workers:
            if name == "once":
                assert totals(engine.train(runs, workers=workers)) == expected("a", "bb")
            else:
                with pytest.raises(engine.WorkerDiedError, match="walk bb: every worker that tried it died"):
                    engine.train(runs, workers=workers)
                assert len(os.listdir(tmp_path / name)) == 3


@pytest.mark.parametrize(("module", "name"), [(mf, "mixfeat"), (torch, "torch")])
def test_workers_of_another_version_are_refused(module, name, cluster, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "__version__", "0.0")
    options = ["--out", str(tmp_path / "out"), "--scheduler", cluster.scheduler_address]
    assert cli.main(["reproduce", "theory", *SMALL, *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mixfeat reproduce theory: error: worker tcp://")
    assert f"cannot be used: it has {name} " in err
    assert err.endswith("and this command has 0.0\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "127.0.0.1:1", "nowhere", "ftp://x", ""])
def test_schedulers_that_cannot_be_reached(address, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine, "_CONNECT_SECONDS", 1)
    assert cli.main(["reproduce", "theory", *SMALL, "--out", str(tmp_path), "--scheduler", address]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"mixfeat reproduce theory: error: the scheduler {address} cannot be reached: ")
    assert err.count("\n") == 1


def test_idle_and_lost_schedulers(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_CONNECT_SECONDS", 120)  # as above
    monkeypatch.setattr(engine, "_FIRST_WORKER_SECONDS", 1)
    monkeypatch.setattr(engine, "CHUNK_SECONDS", 0.1)
    command = [sys.executable, "-c", "from distributed.cli.dask_scheduler import main; main()"]
    options = ["--port", "0", "--no-dashboard", "--scheduler-file", str(tmp_path / "scheduler.json")]
    scheduler = subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL)
    worker = None
    try:
        for _ in range(600):
            if (tmp_path / "scheduler.json").exists():
                break
            time.sleep(0.1)
        address = json.loads((tmp_path / "scheduler.json").read_text())["address"]
        with pytest.raises(engine.EngineError, match=f"the scheduler {address} has no workers: start some first"):
            engine.Cluster(address, SOFTWARE)

        command = [sys.executable, "-c", "from distributed.cli.dask_worker import main; main()", address, "--no-nanny"]
        paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        worker = subprocess.Popen(
            [*command, "--no-dashboard", "--death-timeout", "120"], cwd=ROOT, stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{paths}"},
        )  # fmt: skip
        monkeypatch.setattr(engine, "_FIRST_WORKER_SECONDS", 120)
        with (
            engine.Cluster(address, SOFTWARE) as workers,
            pytest.raises(engine.EngineError, match="the cluster's scheduler was lost: pass --resume to continue"),
        ):
            engine.train([Walk("a", pause=0.02)], workers=workers, report=lambda run, before, after: scheduler.kill())
    finally:
        for process in (scheduler, worker):
            if process is not None:
                process.kill()
                process.wait()
