"""The command line: ``mixfeat`` and ``python -m mixfeat``.

A command is a function from parsed arguments to an exit status: 0, or 1 for a run that failed, 2 for a request that
cannot be served (one line on stderr), 130 for Ctrl-C.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch

import mixfeat
from mixfeat.experiments.store import Store, StoreError
from mixfeat.experiments.theory import METHODS, DivergedError, Settings, summarise, train

__all__ = ["environment", "main"]


class RefusedError(Exception):
    """A request that cannot be served; the message is the one line that the user sees."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would print the whole usage before it
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except RefusedError as refused:
        print(f"{args.prog}: error: {refused}", file=sys.stderr)
        return 2
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
    _theory_options(theory)
    for command, run in ((info, _info), (theory, _reproduce_theory)):
        command.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
        command.set_defaults(run=run, prog=command.prog)
    return parser


def _theory_options(parser: argparse.ArgumentParser) -> None:
    methods = list(METHODS)
    parser.add_argument(
        "--methods", nargs="+", choices=methods, default=methods, metavar="METHOD",
        help=f"of {', '.join(methods)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("results/theory"), metavar="FOLDER",
        help="for the store and the figure (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on with what the output folder holds")
    for setting in fields(Settings):
        pair = isinstance(setting.default, tuple)
        kind: Any = float if pair else setting.type
        shape: dict[str, Any] = {"nargs": 2, "metavar": ("LOW", "HIGH")} if pair else {"metavar": kind.__name__.upper()}
        text = setting.metadata["help"]
        if setting.default is not None:
            text += f" (default: {str(setting.default).strip('()')})"
        parser.add_argument(
            "--" + setting.name.replace("_", "-"), type=kind, default=setting.default, help=text, **shape
        )


def environment() -> dict[str, Any]:
    """What the results on this machine depend on: versions, processor, devices, backends and compiler."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = ("triton", "numpy", "matplotlib", "tqdm")
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


def _reproduce_theory(args: argparse.Namespace) -> int:
    try:
        import tqdm

        from mixfeat.experiments import plots
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise RefusedError(f"{package} is missing: pip install 'mixfeat[experiments]'") from None
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # a GPU's matrix products repeat only with this
    values: dict[str, Any] = {setting.name: getattr(args, setting.name) for setting in fields(Settings)}
    try:
        settings = Settings(**values)
    except (TypeError, ValueError) as error:
        raise RefusedError(str(error)) from None
    methods = [method for method in METHODS if method in args.methods]
    json_file = _writable_file(args.json)
    figure = _writable_folder(args.out) / "theory.png"

    records = {}
    try:
        with Store(args.out / "theory.sqlite", "theory", settings.to_dict(), resume=args.resume) as store:
            done = sum(record.step for record in map(store.get, methods) if record)
            terminal = sys.stderr.isatty()
            with tqdm.tqdm(
                total=len(methods) * settings.steps, initial=done, unit=" steps", unit_scale=True, disable=not terminal
            ) as bar:
                for method in methods:
                    bar.set_description(METHODS[method])
                    records[method] = train(settings, method, store, bar.update)
                    if not terminal:
                        print(f"{METHODS[method]}: {settings.steps} steps, {settings.seeds} seeds at once, on "
                              f"{settings.device}: {records[method].seconds:.1f} s", file=sys.stderr)  # fmt: skip
    except StoreError as error:
        raise RefusedError(str(error)) from None
    except DivergedError as error:
        print(f"{args.prog}: error: {error}", file=sys.stderr)
        return 1

    results = {method: summarise(settings, record) for method, record in records.items()}
    print(_table(settings, results))
    plots.plot_theory(settings, records, figure)
    print(f"\nfigure: {figure}")
    facts = {"settings": settings.to_dict(), "settings_hash": settings.hash, "environment": environment()}
    _write_json(json_file, {**facts, "results": results})
    return 0


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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * len(lines[-1]))
    spread = f"mean ± standard deviation over {settings.seeds} seeds" if settings.seeds > 1 else "one seed"
    return "\n".join([f"features: number of the {settings.num_classes} classes; {spread}", "", *lines])


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
