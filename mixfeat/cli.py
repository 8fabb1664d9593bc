"""The command line: ``mixfeat`` and ``python -m mixfeat``.

A command is a function from parsed arguments to an exit status: 0, or 1 for a run that failed, 2 for a request that
cannot be served (one line on stderr), 130 for Ctrl-C.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

import mixfeat
from mixfeat import report, validate
from mixfeat.experiments import datasets, images, sweep
from mixfeat.experiments.common import METHODS, DivergedError, identity
from mixfeat.experiments.ranks import Ranks, RanksError
from mixfeat.experiments.store import Record, Store, StoreError, merge
from mixfeat.experiments.theory import Settings, summarise, train

__all__ = ["environment", "main"]


class RefusedError(Exception):
    """A request that cannot be served; the message is the one line that the user sees."""


class FailedError(Exception):
    """A run that failed, of which the user has been told."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would print the whole usage before it
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    try:
        status = args.run(args)
        sys.stdout.flush()  # here, where it may fail
        return status
    except RefusedError as refused:
        print(f"{args.prog}: error: {refused}", file=sys.stderr)
        return 2
    except FailedError:
        return 1
    except KeyboardInterrupt:
        again = shlex.join(["mixfeat", *argv] + ["--resume"] * (getattr(args, "resume", None) is False))
        print(f"{args.prog}: stopped; go on with: {again}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mixfeat", description=mixfeat.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mixfeat {mixfeat.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    info = commands.add_parser(
        "info", allow_abbrev=False, help="versions, devices, backends, compiler: for a bug report"
    )
    reproduce = commands.add_parser("reproduce", allow_abbrev=False, help="reproduce the paper's results")
    results = reproduce.add_subparsers(metavar="RESULT", required=True)
    theory = results.add_parser(
        "theory",
        allow_abbrev=False,
        help="ERM learns one feature of a class, Midpoint Mixup both",
        description="Train ERM, Uniform Mixup and Midpoint Mixup on multi-view data by full-batch gradient descent and "
        "count the features that each has learned (arXiv 2210.13512, Theorems 4.6 and 4.7).",
    )
    _experiment_options(theory, Settings, Path("results/theory"))
    pictures = results.add_parser(
        "images",
        allow_abbrev=False,
        help="test error on images with two features per class",
        description="Train ERM, Uniform Mixup and Midpoint Mixup on images that are concatenated along channels with "
        "an image of a paired class (arXiv 2210.13512, section 5), and take the test error with the second half zero "
        "(view 0, the paper's test) and with the first half zero (view 1: has the second feature been learned?).",
    )
    pictures.add_argument(
        "--data-dir", type=Path, default=Path("data"), metavar="FOLDER",
        help="with the official files of fashion-mnist, cifar10 or cifar100 (default: %(default)s)",
    )  # fmt: skip
    _experiment_options(pictures, images.Settings, Path("results/images"))
    diagram = commands.add_parser(
        "sweep",
        allow_abbrev=False,
        help="what the methods learn over a grid of two settings",
        description="Run the experiment of `mixfeat reproduce theory` at every point of a grid of two of its settings, "
        "and draw heat maps of what each method has learned there. A grid can grow: with --resume more values of the "
        "same two settings are added to those that the output folder holds.",
    )
    for name, axis in (("x", ("degree", 2, 4, 6, 8)), ("y", ("init_scale", 0.3, 0.5, 0.7))):
        default = [str(word) for word in axis]
        diagram.add_argument(
            f"--{name}", nargs="+", default=default, metavar=("SETTING", "VALUE"),
            help=f"a numeric setting and its values (default: {' '.join(default)})",
        )  # fmt: skip
    diagram.add_argument(
        "--shard", type=_shard, default=(0, 1), metavar="I/N",
        help="run only every N-th cell, from cell I on, 0 <= I < N: one of N machines; mixfeat merge joins the stores",
    )  # fmt: skip
    _experiment_options(diagram, Settings, Path("results/sweep"), sweep.DEFAULTS)
    joining = commands.add_parser(
        "merge",
        allow_abbrev=False,
        help="join the stores of a sweep that was run in shards",
        description="Join stores of mixfeat sweep that have the same settings, as --shard makes them on several "
        "machines, in a new one. Cells that several have must agree.",
    )
    joining.add_argument("sources", nargs="+", type=Path, metavar="FOLDER", help="an output folder of mixfeat sweep")
    joining.add_argument(
        "--out", type=Path, default=Path("results/sweep"), metavar="FOLDER",
        help="for the new store (default: %(default)s)",
    )  # fmt: skip
    checking = commands.add_parser(
        "check",
        allow_abbrev=False,
        help="are the kernels right on this machine?",
        description="Hold every operator, on every backend that runs here, to the reference in float64: values and "
        "gradients of random inputs, contiguous and strided, and the same bits from a second call. The exit status is "
        "1 if anything fails.",
    )
    for name, choices in (
        ("operator", validate.OPERATORS), ("backend", mixfeat.backends.NAMES), ("dtype", validate.DTYPES)
    ):  # fmt: skip
        text = f"of {', '.join(choices)} (default: all)"
        checking.add_argument(f"--{name}", nargs="+", choices=list(choices), metavar=name.upper(), help=text)
    checking.add_argument("--seed", type=int, default=0, metavar="INT", help="of the inputs (default: 0)")
    checking.add_argument("--quick", action="store_true", help="small shapes only")
    reporting = commands.add_parser(
        "compile-report",
        allow_abbrev=False,
        help="what the compilers make of the Triton kernels; needs no GPU",
        description="Compile every Triton configuration that ships and print registers, stack, memory accesses and the "
        "instructions of main loops. The exit status is 1 if anything spills.",
    )
    for name, known in (("targets", report.TARGETS), ("kernels", report.KERNELS)):
        text = f"of {', '.join(known)}, separated by commas (default: all)"
        reporting.add_argument(f"--{name}", metavar="LIST", default=",".join(known), help=text)
    benching = commands.add_parser(
        "bench",
        allow_abbrev=False,
        help="how fast are the kernels on this machine?",
        description="Time every operator against what a user could write in PyTorch and against the hardware's limits, "
        "all in the same run. Needs pip install 'mixfeat[test]'.",
    )
    benching.add_argument("--suite", nargs="+", metavar="SUITE", help="of benchmarks/test_SUITE.py (default: all)")
    benching.add_argument(
        "-k", "--filter", metavar="EXPRESSION",
        help="of the cases only these, by shape, dtype and direction, as pytest -k: 'paper-10 and not bfloat16'",
    )  # fmt: skip
    benching.add_argument(
        "--seconds", type=float, default=2.0, metavar="FLOAT", help="for each comparison (default: %(default)s)"
    )
    benching.add_argument(
        "--limit", type=float, metavar="FLOAT",
        help="stop after so many seconds, with what there is: the most telling cases come first",
    )  # fmt: skip
    benching.add_argument(
        "--out", type=Path, default=Path("results/bench.json"), metavar="FILE",
        help="for the results (default: %(default)s)",
    )  # fmt: skip
    benching.add_argument("--results", type=Path, metavar="FILE", help="take these results, and run nothing")
    benching.add_argument("--compare", type=Path, metavar="OLD", help="list what is slower than in these results")
    benching.add_argument("--plot", type=Path, metavar="FILE", help="draw time, memory and share of the limit")
    runs = (
        (info, _info),
        (checking, _check),
        (reporting, _compile_report),
        (benching, _bench),
        (theory, _reproduce_theory),
        (pictures, _reproduce_images),
        (diagram, _sweep),
        (joining, _merge),
    )
    for command, run in runs:
        command.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
        command.set_defaults(run=run, prog=command.prog)
    return parser


def _experiment_options(
    parser: argparse.ArgumentParser,
    kind_of_settings: type[Settings] | type[images.Settings],
    folder: Path,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Options for the methods, the output folder and all settings; a setting that is not given is no attribute."""
    methods = list(METHODS)
    parser.add_argument(
        "--methods", nargs="+", choices=methods, default=methods, metavar="METHOD",
        help=f"of {', '.join(methods)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=folder, metavar="FOLDER",
        help="for the store and the figure (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on with what the output folder holds")
    for setting in fields(kind_of_settings):
        pair = isinstance(setting.default, tuple)
        kind: Any = float if pair else setting.type
        shape: dict[str, Any] = {"nargs": 2, "metavar": ("LOW", "HIGH")} if pair else {"metavar": kind.__name__.upper()}
        text, default = setting.metadata["help"], (defaults or {}).get(setting.name, setting.default)
        if default is not None:
            text += f" (default: {str(default).strip('()')})"
        parser.add_argument(
            "--" + setting.name.replace("_", "-"), type=kind, default=argparse.SUPPRESS, help=text, **shape
        )


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"must be I/N with 0 <= I < N, got {text!r}")
    return int(part), int(parts)


def environment() -> dict[str, Any]:
    """What the results on this machine depend on: versions, processor, devices, backends and compiler."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = ("triton", "numpy", "matplotlib", "tqdm", "scikit-learn", "torchvision")
    gpus = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory, capability = f"{properties.total_memory / 2**30:.0f} GiB", f"{properties.major}.{properties.minor}"
        gpus.append(f"{properties.name}, {memory}, {properties.multi_processor_count} SMs, capability {capability}")
    variables = {
        name: value for name, value in sorted(os.environ.items()) if name.startswith(("MIXFEAT_", "TRITON_", "OMP_"))
    }
    return {
        "mixfeat": mixfeat.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "torch": torch.__version__,
        "torch CUDA": torch.version.cuda or torch.version.hip,
        **{package: version(package) for package in packages},
        "platform": platform.platform(),
        "CPU": _cpu_model(),
        "CPU instruction set (torch)": torch.backends.cpu.get_cpu_capability(),
        "CPU cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "GPUs": gpus,
        "environment variables": variables,
        **mixfeat.backends.describe(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _info(args: argparse.Namespace) -> int:
    json_file = _writable_file(args.json)
    facts = environment()
    for name, value in _lines(facts):
        print(f"{name:<28}  {value}")
    _write_json(json_file, facts)
    return 0


def _check(args: argparse.Namespace) -> int:
    wanted = args.backend or []
    interpreted = "triton" in wanted and not torch.cuda.is_available()
    if interpreted:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first needed, below
    json_file = _writable_file(args.json)
    available = mixfeat.backends.available()
    for name in wanted:
        if name not in available:
            raise RefusedError(
                f"--backend {name} is not available here: {mixfeat.backends.describe()['backends'][name]}"
            )
    chosen = [name for name in available if name in wanted or not wanted]
    cells = validate.checks(chosen, args.operator or validate.OPERATORS, args.dtype or validate.DTYPES)
    if not cells:
        raise RefusedError("nothing to check: triton has no float64")
    if interpreted:
        print("No GPU here: triton means Triton's interpreter, on small shapes.\n")
    form = "{:<26}  {:<10}  {:<9}  {:>6}  {:<22}  {:>9}  {:>9}  {:>9}  {}"
    print(form.format("operator", "backend", "dtype", "shapes", "worst of", "error", "PyTorch's", "budget", ""))
    outcomes = []
    for cell in cells:
        outcome = validate.check(*cell, seed=args.seed, quick=args.quick)
        outcomes.append(outcome)
        numbers = ["", "", "", ""]
        if outcome.worst:
            name, worst = max(outcome.worst.items(), key=lambda item: item[1]["of budget"])
            numbers = [name, *(f"{worst[key]:.1e}" for key in ("error", "plain", "budget"))]
        print(form.format(*cell, outcome.cases, *numbers, "PASS" if outcome.passed else "FAIL"), flush=True)
        for failure in outcome.failures:
            print(f"    {failure}")
    failed = sum(not outcome.passed for outcome in outcomes)
    print(f"\n{failed} of {len(outcomes)} checks FAILED" if failed else f"\nall {len(outcomes)} checks passed")
    rows = [asdict(outcome) | {"passed": outcome.passed} for outcome in outcomes]
    _write_json(json_file, {"seed": args.seed, "quick": args.quick, "environment": environment(), "checks": rows})
    return 1 if failed else 0


def _compile_report(args: argparse.Namespace) -> int:
    lists = {}
    for name, known in (("targets", report.TARGETS), ("kernels", report.KERNELS)):
        lists[name] = [word for word in getattr(args, name).split(",") if word]
        unknown = [word for word in lists[name] if word not in known]
        if unknown or not lists[name]:
            raise RefusedError(f"--{name} must be of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
    json_file = _writable_file(args.json)
    try:
        import triton
    except ModuleNotFoundError as error:
        raise RefusedError(f"{error.name} is missing: pip install triton") from None
    form = "{:<7}  {:>4}  {:>5}  {:>6}  {:>6}  {:>7}  {:>8}  {:>9}  {:>6}  {}"
    print(
        form.format("target", "regs", "stack", "shared", "LDL+STL", "matrix", "16 bytes", "occupancy", "/eval", "case")
    )
    rows = []
    for case, compiled in report.compile_report(lists["targets"], lists["kernels"]):
        row = compiled.row()
        rows.append({"case": str(case), **row})
        occupancy, per_evaluation = row["occupancy"], row["instructions_per_evaluation"]
        print(form.format(
            row["target"], row["registers"], row["stack_bytes"], row["shared_bytes"],
            row["local_loads"] + row["local_stores"], sum(row["matrix_instructions"].values()),
            sum(row["vector_accesses"].values()), "" if occupancy is None else f"{occupancy:.0%}",
            "" if per_evaluation is None else f"{per_evaluation:.2f}", case,
        ), flush=True)  # fmt: skip
    spilling = [row for row in rows if row["stack_bytes"] or row["local_loads"] or row["local_stores"]]
    print(f"\n{len(rows)} kernels compiled by triton {triton.__version__}, {len(spilling)} of which spill")
    _write_json(json_file, {"triton": triton.__version__, "kernels": rows})
    return 1 if spilling else 0


def _bench(args: argparse.Namespace) -> int:
    try:
        import pytest  # noqa: F401
        import pytest_benchmark  # noqa: F401

        from mixfeat.benchmarks import results
    except ModuleNotFoundError as error:
        raise RefusedError(f"{error.name} is missing: pip install 'mixfeat[test]'") from None
    json_file, figure = _writable_file(args.json), _writable_file(args.plot)
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
    _write_json(json_file, document)
    return status


def _run_benchmarks(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], int]:
    """The results of a run of the suites in ``folder``, which are written to a file as well, and its exit status."""
    files = {path.stem.removeprefix("test_"): path for path in sorted(folder.glob("test_*.py"))}
    unknown = [suite for suite in args.suite or [] if suite not in files]
    if unknown:
        raise RefusedError(f"--suite must be of {', '.join(files)}, got {', '.join(unknown)}")
    for name in ("seconds", "limit"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise RefusedError(f"--{name} must be finite and positive, got {value}")
    out = _writable_file(args.out)
    with tempfile.TemporaryDirectory() as scratch:
        lines = Path(scratch, "rows.jsonl")
        command = [sys.executable, "-m", "pytest", "-q", "--benchmark-disable", "-p", "no:cacheprovider"]
        command += ["-k", args.filter] if args.filter else []
        paths = [str(files[suite]) for suite in args.suite or files]
        variables = {"MIXFEAT_BENCH_OUT": str(lines), "MIXFEAT_BENCH_SECONDS": str(args.seconds)}
        process = subprocess.Popen([*command, *paths], env=os.environ | variables)
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
        if args.filter and status in (4, 5):  # of pytest: not understood, nothing found
            raise RefusedError(f"--filter {args.filter!r} chooses no benchmark")
        rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    facts = environment()
    gpu = torch.cuda.is_available()
    cpu = f"{facts['CPU']}, {facts['threads']} threads, {facts.get('CPU library' + chr(39) + 's instruction set')}"
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True)
    document = {
        "version": mixfeat.__version__,
        "commit": git.stdout.strip() or "unknown",
        "device": torch.cuda.get_device_name() if gpu else cpu,
        "torch": torch.__version__,
        "triton": facts["triton"] if gpu else None,
        "date": datetime.date.today().isoformat(),
        "environment": facts,
        "rows": rows,
    }
    _write_json(out, document)
    print(f"results: {out}")
    return document, min(status, 1)


def _lines(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    lines: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [(f"{name}: {key}", item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            lines += [(name, item) for item in value or ["none"]]
        else:
            lines.append((name, "none" if value is None else value))
    return lines


def _prepare(args: argparse.Namespace, kind_of_settings: Any) -> tuple[dict[str, Any], list[str], Any]:
    """The settings that were given, the methods, and the module of figures: what it needs is not missed at the end."""
    try:
        import tqdm  # noqa: F401

        from mixfeat.experiments import plots
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise RefusedError(f"{package} is missing: pip install 'mixfeat[experiments]'") from None
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # a GPU's matrix products repeat only with this
    names = [setting.name for setting in fields(kind_of_settings)]
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return given, [method for method in METHODS if method in args.methods], plots


def _reproduce_theory(args: argparse.Namespace) -> int:
    given, methods, plots = _prepare(args, Settings)
    try:
        settings = Settings(**given)
        key = identity(settings)
    except (TypeError, ValueError) as error:
        raise RefusedError(str(error)) from None
    json_file = _writable_file(args.json)
    figure = _writable_folder(args.out) / "theory.png"

    runs = [Run(method, METHODS[method], settings.steps, partial(train, settings, method)) for method in methods]
    records = _train_all(args, "theory", key, runs)
    if records is None:
        return 0
    results = {method: summarise(settings, record) for method, record in records.items()}
    print(_table(settings, results))
    plots.plot_theory(settings, records, figure)
    print(f"\nfigure: {figure}")
    facts = {"settings": settings.to_dict(), "settings_hash": settings.hash, "environment": environment()}
    _write_json(json_file, {**facts, "results": results})
    return 0


def _reproduce_images(args: argparse.Namespace) -> int:
    given, methods, plots = _prepare(args, images.Settings)
    try:
        settings = images.Settings(**given)
        key = identity(settings)
        data = datasets.load(settings.dataset, args.data_dir)
    except (TypeError, ValueError, datasets.DatasetError) as error:
        raise RefusedError(str(error)) from None
    json_file = _writable_file(args.json)
    figure = _writable_folder(args.out) / "images.png"

    seeds = range(settings.seed, settings.seed + settings.seeds)
    steps = settings.epochs * images.steps_of_epoch(settings, data)
    runs = [
        Run(images.name_of(method, seed), f"{METHODS[method]}, seed {seed}", steps,
            partial(images.train, settings, method, seed, data))
        for method in methods for seed in seeds
    ]  # fmt: skip
    try:
        found = _train_all(args, "images", key, runs)
    except ValueError as error:  # data that this batch size or model cannot train on
        raise RefusedError(str(error)) from None
    if found is None:
        return 0
    records = {method: {seed: found[images.name_of(method, seed)] for seed in seeds} for method in methods}
    results = {method: images.summarise(of_method) for method, of_method in records.items()}
    print(_images_table(settings, results))
    plots.plot_images(settings, results, figure)
    print(f"\nfigure: {figure}")
    facts = {"settings": settings.to_dict(), "settings_hash": settings.hash, "environment": environment()}
    _write_json(json_file, {**facts, "results": results})
    return 0


def _sweep(args: argparse.Namespace) -> int:
    given, methods, plots = _prepare(args, Settings)
    try:
        x, y = (sweep.Axis.of(f"--{name}", words[0], words[1:]) for name, words in (("x", args.x), ("y", args.y)))
        grid = sweep.Sweep(x, y, given)
        key = grid.identity()
    except (TypeError, ValueError) as error:
        raise RefusedError(str(error)) from None
    json_file = _writable_file(args.json)
    figure = _writable_folder(args.out) / "sweep.png"

    cells = grid.cells(methods)
    part, parts = args.shard
    mine = cells[part::parts]
    found = _train_all(
        args, "sweep", key, [Run(c.name, c.name, c.settings.steps, partial(sweep.run_cell, c)) for c in mine]
    )
    if found is None:
        return 0
    records = {cell: found[cell.name] for cell in mine}
    facts = {"settings": key, "x": x._asdict(), "y": y._asdict(), "environment": environment()}
    numbers = {"cells": sweep.summarise(grid, records)}
    if parts > 1:
        print(
            f"shard {part}/{parts}: {len(mine)} of {len(cells)} cells are in {args.out}; mixfeat merge joins the shards"
        )
        _write_json(json_file, {**facts, "shard": f"{part}/{parts}", **numbers})
        return 0

    tables = sweep.tables(grid, records)
    print("\n\n".join(_grid_table(grid, method, of_method) for method, of_method in tables.items()))
    plots.plot_sweep(grid, tables, figure)
    print(f"\nfigure: {figure}")
    _write_json(json_file, {**facts, "tables": _without_nan(tables), **numbers})
    return 0


def _merge(args: argparse.Namespace) -> int:
    json_file = _writable_file(args.json)
    sources = [path / "sweep.sqlite" if path.is_dir() else path for path in args.sources]
    target = _writable_folder(args.out) / "sweep.sqlite"
    try:
        count = merge(target, sources)
    except StoreError as error:
        raise RefusedError(str(error)) from None
    print(f"{count} records of {len(sources)} stores are in {target}; tables and figure: mixfeat sweep with the same "
          f"options and --resume --out {args.out}")  # fmt: skip
    _write_json(json_file, {"store": str(target), "records": count, "sources": [str(path) for path in sources]})
    return 0


class Run(NamedTuple):
    """One run of an experiment."""

    name: str  # of its record
    label: str
    steps: int
    train: Callable[[Store, Callable[[int], Any]], Record]


def _train_all(
    args: argparse.Namespace, experiment: str, key: dict[str, Any], runs: Sequence[Run]
) -> dict[str, Record] | None:
    """The finished records by name, of a store in the output folder; None on all ranks of a launch but the first."""
    try:
        ranks = Ranks()
        with ranks.open(args.out / f"{experiment}.sqlite", experiment, key, resume=args.resume) as store:
            done = sum(record.step for record in (store.get(run.name) for run in runs) if record)
            with _progress(sum(run.steps for run in runs), done, ranks.count > 1) as bar:
                for number, run in ranks.share(list(enumerate(runs, 1))):
                    bar.set_description(run.label)
                    record = run.train(store, bar.update)
                    if bar.disable:
                        end = f"{record.seconds:.1f} s" if record.state else "diverged"
                        where = f"rank {ranks.rank}: " if ranks.count > 1 else ""
                        print(f"{where}{number} of {len(runs)}: {run.label}: {end}", file=sys.stderr)
            found = {run.name: store.get(run.name) for run in runs}
            return {name: record for name, record in found.items() if record} if ranks.rank == 0 else None
    except (StoreError, RanksError) as error:
        raise RefusedError(str(error)) from None
    except DivergedError as error:
        print(f"{args.prog}: error: {error}", file=sys.stderr)
        raise FailedError from None


def _progress(total: int, done: int, several: bool) -> Any:
    """A bar on a terminal, with the time left; elsewhere, and for one of several processes, one that is disabled."""
    import tqdm

    disable = several or not sys.stderr.isatty()
    return tqdm.tqdm(total=total, initial=done, unit=" steps", unit_scale=True, smoothing=0, disable=disable)


def _grid_table(grid: sweep.Sweep, method: str, tables: Mapping[str, Sequence[Sequence[float]]]) -> str:
    both, ratio = tables.values()
    rows = [[f"{grid.y.name} \\ {grid.x.name}", *(f"{x:g}" for x in grid.x.values)]]
    for i, y in enumerate(grid.y.values):
        rows.append([f"{y:g}", *(f"{a:.1f} ({b:.2f})" for a, b in zip(both[i], ratio[i], strict=True))])
    return f"{METHODS[method]}: classes with both features (alignment ratio)\n\n" + "\n".join(_aligned(rows))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _images_table(settings: images.Settings, results: dict[str, dict[str, Any]]) -> str:
    columns = {
        "train accuracy": "train_accuracy", "test error, view 0": "test_error_view_0",
        "test error, view 1": "test_error_view_1",
    }  # fmt: skip
    rows = [["", *columns]]
    for method, result in results.items():
        rows.append([METHODS[method], *(_mean_spread([100 * x for x in result[key]], 2) for key in columns.values())])
    title = f"{settings.dataset}, {settings.model}, after {settings.epochs} epochs, in percent; {_spread(settings)}"
    return "\n".join([title, "", *_aligned(rows)])


def _spread(settings: Settings | images.Settings) -> str:
    return f"mean ± standard deviation over {settings.seeds} seeds" if settings.seeds > 1 else "one seed"


def _table(settings: Settings, results: dict[str, dict[str, Any]]) -> str:
    columns = {
        "train accuracy": "train_accuracy",
        "both features": "classes_with_both",
        "one": "classes_with_one",
        "none": "classes_with_none",
        "alignment ratio": "alignment_ratio",
        "loss": "loss",
    }
    rows = [["", *columns]]
    for method, result in results.items():
        cells = [_mean_spread(result[key], 1 if key.startswith("classes") else 3) for key in columns.values()]
        rows.append([METHODS[method], *cells])
    title = f"features: number of the {settings.num_classes} classes; {_spread(settings)}"
    return "\n".join([title, "", *_aligned(rows)])


def _mean_spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _writable_folder(folder: Path) -> Path:
    """The folder, made where missing; an attempt to write there is the only sure test that one can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise RefusedError(f"folder {folder} cannot be written: {error.strerror}") from None


def _writable_file(path: Path | None) -> Path | None:
    """The file of --json, if asked for: found out now whether it can be written, not after training."""
    if path is not None:
        if path.is_dir():
            raise RefusedError(f"--json {path} cannot be written: it is a folder")
        _writable_folder(path.parent)
    return path


def _write_json(path: Path | None, document: dict[str, Any]) -> None:
    if path is not None:
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
        temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
