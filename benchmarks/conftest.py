"""Set up pytest-benchmark: order, clock and seconds of the benchmarks, facts of the machine, contents of results."""

import pkgutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mixfeat._environment import environment

from . import baselines, predicted, results, shapes, timing
from .harness import CLOCK, Bench


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mixfeat")
    group.addoption("--shape", metavar="N,P,D,C,M", help="time only this problem instead of all named shapes")
    group.addoption(
        "--against", metavar="MODULE:FUNCTION", help="one more contender, with the arguments of the operator chosen"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Read the options before the suites are imported, which list their cases then."""
    config.addinivalue_line("filterwarnings", "default")  # baselines meet warnings of compilers, by version and device
    shape, against = config.getoption("shape"), config.getoption("against")
    if shape:
        shapes.take_place(shapes.Network(*map(int, shape.split(","))))
    if against:
        baselines.AGAINST[against] = pkgutil.resolve_name(against)
    timing.SECONDS = 0.0 if config.getoption("benchmark_disable") else float(config.getoption("benchmark_max_time"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Interleave the suites, each from its most telling case on, so that a run cut short has covered what matters.

    On a GPU cases with a prediction come first. Leave out the cases that do not belong to a user's problem.
    """
    if config.getoption("shape"):
        items[:] = [item for item in items if f"[{shapes.YOURS}-" in item.nodeid or f"[{shapes.YOURS}]" in item.nodeid]
    seen: Counter[str] = Counter()
    positions = {}
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))
        suite = item.nodeid.split("::")[0]
        positions[item] = seen[suite]
        seen[suite] += 1
    items.sort(key=lambda item: (predicted.rank(item.nodeid) if timing.CUDA else 0, positions[item]))


@pytest.fixture(autouse=True)
def _reset_compiler() -> None:
    """Forget earlier compilations, which would make torch.compile generalise shapes and finally give up."""
    torch.compiler.reset()


@pytest.fixture
def bench(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> Iterator[Bench]:
    """Time and record contenders; print the results as soon as the test ends."""
    bench = Bench(benchmark)
    yield bench
    benchmark.skipped = not bench.rows  # a test that failed has no rows, which is no news
    for row in results.rows({"benchmarks": bench.rows}):
        with capsys.disabled():
            print("\n" + results.describe(row))


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    facts = environment()
    cpu = f"{facts['CPU']}, {facts['threads']} threads, {facts.get('CPU library' + chr(39) + 's instruction set')}"
    return {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu, **facts}


def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    """Name mixfeat's commit, wherever the run was started."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    return {"id": git("rev-parse", "HEAD") or "unknown", "dirty": bool(git("status", "--porcelain"))}


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Keep the statistics of the turns, not every turn."""
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
        del row["options"]
