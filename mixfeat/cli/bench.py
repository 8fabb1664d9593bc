"""``mixfeat bench``: how fast are the kernels?"""

import argparse
import contextlib
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mixfeat.cli.common import (
    Commands,
    FailedError,
    RefusedError,
    add_command,
    problem_shape,
    require_positive,
    writable_file,
    write_json,
)
from mixfeat.operators import OPERATORS

__all__ = ["add_commands"]


def add_commands(commands: Commands) -> None:
    """Add ``bench``."""
    benching = add_command(
        commands,
        "bench",
        _bench,
        help="time the kernels on this machine",
        description="Time every operator against what a user could write in PyTorch and against the hardware's limits, "
        "all in the same run. Needs pip install 'mixfeat[test]'.",
    )
    benching.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="operators or other suites, NAME of benchmarks/test_NAME.py (default: all)",
    )
    benching.add_argument(
        "--shape", type=problem_shape, metavar="N,P,D,C,M",
        help="a problem that replaces all shapes: samples, patches, patch dimension, classes, filters per class",
    )  # fmt: skip
    benching.add_argument(
        "--against", metavar="MODULE:FUNCTION",
        help="an additional contender for the operator that --only names; it takes mixfeat's arguments",
    )  # fmt: skip
    benching.add_argument(
        "-k", "--filter", metavar="EXPRESSION",
        help="run only cases that match by shape, dtype and direction, as pytest -k: 'paper-10 and not bfloat16'",
    )  # fmt: skip
    benching.add_argument(
        "--seconds", type=float, default=1.0, metavar="FLOAT", help="time for each comparison (default: %(default)s)"
    )
    benching.add_argument(
        "--limit", type=float, metavar="FLOAT",
        help="stop after this many seconds and write the results so far; the most important cases come first",
    )  # fmt: skip
    benching.add_argument(
        "--out", type=Path, default=Path("results/bench.json"), metavar="FILE",
        help="file for the results (default: %(default)s)",
    )  # fmt: skip
    benching.add_argument("--results", type=Path, metavar="FILE", help="load results from FILE instead of running")
    benching.add_argument("--compare", type=Path, metavar="OLD", help="list cases that are slower than in OLD")
    benching.add_argument("--plot", type=Path, metavar="FILE", help="draw time, memory and share of the limit")


def _bench(args: argparse.Namespace) -> int:
    try:
        import pytest  # noqa: F401
        import pytest_benchmark  # noqa: F401

        from mixfeat.benchmarks import results
    except ModuleNotFoundError as error:
        raise RefusedError(f"{error.name} is missing: pip install 'mixfeat[test]'") from None
    json_file, figure = writable_file(args.json), writable_file(args.plot)
    try:
        old = results.load(args.compare) if args.compare else None
        document = results.load(args.results) if args.results else None
    except ValueError as error:
        raise RefusedError(str(error)) from None
    status = 0
    if document is None:
        document, status = _run_benchmarks(args, Path(results.__file__).parent)
    if figure:
        from mixfeat.benchmarks.plots import plot

        plot(document, figure)
        print(f"figure: {figure}")
    if old is not None:
        try:
            slower = results.compare(document, old)
        except ValueError as error:
            raise RefusedError(str(error)) from None
        print("\n".join(["slower beyond noise:", *slower]) if slower else "nothing is slower beyond noise")
        status = status or bool(slower)
    write_json(json_file, document)
    return status


def _suites(folder: Path) -> dict[str, str]:
    """Find what pytest is to run, by the name of a suite or operator: a file, or a test in it."""
    files = {path.stem.removeprefix("test_"): path for path in sorted(folder.glob("test_*.py"))}
    tests = {
        name: f"{path}::test_{name}"
        for name in OPERATORS
        for path in files.values()
        if name not in files and f"def test_{name}(" in path.read_text()
    }
    return {name: str(path) for name, path in files.items()} | tests


def _require_contender(args: argparse.Namespace) -> None:
    """Refuse a contender that cannot be imported, or that is of no one operator."""
    operators = [*OPERATORS, "gradient_descent"]
    if args.only is None or len(args.only) != 1 or args.only[0] not in operators:
        got = " ".join(args.only or ["none"])
        raise RefusedError(
            f"--against needs --only with the operator it stands for, one of {', '.join(operators)}, got {got}"
        )
    module, colon, function = args.against.partition(":")
    if not (module and colon and function):
        raise RefusedError(f"--against must be module:function, got {args.against!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # where `python -m pytest` will look first
    try:
        found = pkgutil.resolve_name(args.against)
    except Exception as error:  # of whatever the module does
        raise RefusedError(f"--against {args.against} cannot be imported: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise RefusedError(f"--against {args.against} must be a function, got {type(found).__name__}")


def _run_benchmarks(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], int]:
    """Run the suites in ``folder`` by pytest; returns the results, which are in a file as well, and its exit status."""
    from mixfeat.benchmarks import results

    suites = _suites(folder)
    unknown = [name for name in args.only or [] if name not in suites]
    if unknown:
        raise RefusedError(f"--only must be of {', '.join(suites)}, got {', '.join(unknown)}")
    require_positive(args, "seconds", "limit")
    if args.against:
        _require_contender(args)
    shape = ",".join(map(str, args.shape)) if args.shape else ""
    out = writable_file(args.out)
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch, "bench.json")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-quiet"]
        command += ["-W", "ignore:Not saving anything"]  # of pytest-benchmark where no benchmark was chosen
        command += [f"--benchmark-json={found}", f"--benchmark-max-time={args.seconds}"]
        command += ["-k", args.filter] if args.filter else []
        command += ["--against", args.against] if args.against else []
        command += ["--shape", shape] if shape else []
        command += [suites[name] for name in args.only or suites if args.only or "::" not in suites[name]]
        variables = {"PYTEST_ADDOPTS": "", "PYTEST_PLUGINS": ""}  # are for the user's own tests
        process = subprocess.Popen(command, env=os.environ | variables)
        try:
            status = process.wait(args.limit)
        except subprocess.TimeoutExpired:
            print(f"stopped after {args.limit:g} s", flush=True)
            for _ in range(3):  # SIGINT has pytest end, and what it started; an import under way may swallow one
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(4)
            status = 1
        finally:
            process.kill()
            process.wait()
        asked = {"--only": args.only and " ".join(args.only), "--shape": shape, "--filter": args.filter}
        options = " ".join(f"{name} {value!r}" for name, value in asked.items() if value)
        if options and status in (4, 5):  # of pytest: not understood, nothing found
            raise RefusedError(f"{options} chooses no benchmark")
        if not found.exists() or not found.stat().st_size:
            raise FailedError("no benchmark has come to its end")
        document = results.load(found)
    write_json(out, document)
    print(f"results: {out}")
    return document, min(status, 1)
