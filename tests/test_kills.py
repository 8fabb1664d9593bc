"""kill -9 at any moment of a long command: only the chunk in work is lost, and resumed it ends in the same numbers."""

import io
import json
import random
import signal
import sys
import time

import processes
import pytest
import torch
from conftest import LONG

from mixfeat import cli
from mixfeat.experiments import engine

KILLS = 17 if LONG else 1  # of each command
THEORY = [
    "--num-classes=3", "--filters-per-class=2", "--num-patches=4", "--num-samples=9", "--seeds=2", "--test-samples=30",
    "--lr=4", "--device=cpu",
]  # fmt: skip
COMMANDS = {
    "theory": ["reproduce", "theory", *THEORY, "--steps=400", "--evaluations=4", "--jobs=2"],
    "images": ["reproduce", "images", "--epochs=3", "--seeds=2", "--batch-size=200", "--device=cpu", "--jobs=1"],
    "sweep": ["sweep", *THEORY, "--steps=60", "--evaluations=3", "--x", "degree", "2", "4", "--y", "rho", "0.5",
              "--jobs=1"],
}  # fmt: skip


def run(arguments, log):
    """What a process does: one command."""
    torch.set_num_threads(1)
    engine.CHUNK_SECONDS = 0.02
    with open(log, "w", buffering=1) as sys.stdout:
        sys.stderr = sys.stdout
        sys.exit(cli.main(arguments))


def started(arguments, log):
    process = processes.SERVER.Process(target=run, args=(arguments, log))  # so a kill finds a command, not imports
    process.start()
    return process


def finish(arguments, log):
    process = started(arguments, log)
    process.join()
    assert process.exitcode == 0, log.read_text()


def numbers(path):
    """A JSON result but for how long it took."""

    def without_seconds(value):
        if isinstance(value, dict):
            return {key: without_seconds(item) for key, item in value.items() if key not in ("seconds", "environment")}
        return [without_seconds(item) for item in value] if isinstance(value, list) else value

    return without_seconds(json.loads(path.read_text()))


def records(folder):
    """What a folder holds, by name: (finished, step, the file's content); every file is whole."""
    found = {}
    for path in (folder / "runs").glob("*.run"):
        content = path.read_bytes()
        record = torch.load(io.BytesIO(content.partition(b"\n")[2]), weights_only=True)
        found[path.stem] = (record["finished"], record["step"], content)
    return found


def assert_nothing_lost(before, after):
    for name, (finished, step, content) in before.items():
        assert after[name][1] >= step, name
        assert not finished or after[name] == (finished, step, content), name


def assert_files_whole(folder, name):
    for path in folder.glob("*.png"):
        assert path.read_bytes()[-8:-4] == b"IEND"
    for path in [*folder.glob("*.json"), *folder.glob("runs/*.json")]:
        json.loads(path.read_text())
    allowed = {f"{name}.png", f"{name}.json", "runs"}
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} <= allowed


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_any_moment(name, tmp_path):
    if name == "images":
        pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")

    def command(folder):
        return [*COMMANDS[name], "--resume", "--out", str(folder), "--json", str(folder / f"{name}.json")]

    log = tmp_path / "log"
    start = time.monotonic()
    finish(command(tmp_path / "unbroken"), log)
    duration = time.monotonic() - start
    unbroken = numbers(tmp_path / "unbroken" / f"{name}.json")
    files = sorted(path.name for path in (tmp_path / "unbroken").iterdir())

    def assert_finished(folder):
        assert numbers(folder / f"{name}.json") == unbroken
        assert sorted(path.name for path in folder.iterdir()) == files

    kills, moments = 0, random.Random(torch.initial_seed())
    folder, held = tmp_path / "0", {}
    while kills < KILLS:
        process = started(command(folder), log)
        process.join(moments.uniform(0, duration))
        process.kill()
        process.join()
        if folder.exists():
            assert_files_whole(folder, name)
            assert_nothing_lost(held, now := records(folder))
            held = now
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            continue
        assert process.exitcode == 0, log.read_text()
        assert_finished(folder)
        folder, held = folder.with_name(str(int(folder.name) + 1)), {}
    finish(command(folder), log)
    assert_finished(folder)
