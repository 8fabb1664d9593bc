"""``mixfeat reproduce`` and ``mixfeat sweep``: the experiments."""

import argparse
import contextlib
import math
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import torch

from mixfeat._environment import environment
from mixfeat.cli.common import (
    Commands,
    FailedError,
    RefusedError,
    add_command,
    aligned,
    writable_file,
    writable_folder,
    write_json,
)
from mixfeat.experiments import benign_overfitting, datasets, engine, images, rare_features, sweep, theory
from mixfeat.experiments.common import METHODS, BaseSettings, DivergedError, identity
from mixfeat.experiments.engine import Record

__all__ = ["add_commands"]


def add_commands(commands: Commands) -> None:
    """Add ``reproduce`` with its experiments, and ``sweep``."""
    reproduce = commands.add_parser("reproduce", allow_abbrev=False, help="reproduce the results of papers")
    results = reproduce.add_subparsers(metavar="RESULT", required=True)
    parser = add_command(
        results,
        "theory",
        _reproduce_theory,
        help="show that ERM learns one feature of a class, Midpoint Mixup both",
        description="Train ERM, Uniform Mixup and Midpoint Mixup on multi-view data by full-batch gradient descent and "
        "count the features that each has learned (arXiv 2210.13512, Theorems 4.6 and 4.7).",
    )
    _add_options(parser, theory.Settings, Path("results/theory"))
    parser = add_command(
        results,
        "images",
        _reproduce_images,
        help="measure the test error on images with two features in each class",
        description="Train ERM, Uniform Mixup and Midpoint Mixup on images that are concatenated along channels with "
        "an image of a paired class (arXiv 2210.13512, section 5). Measure the test error with the second half zero "
        "(view 0, the paper's test) and with the first half zero (view 1: has the second feature been learned?).",
    )
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data"), metavar="FOLDER",
        help="folder with the official archives of fashion-mnist, cifar10 or cifar100 (default: %(default)s)",
    )  # fmt: skip
    _add_options(parser, images.Settings, Path("results/images"))
    parser = add_command(
        results,
        "benign-overfitting",
        _reproduce_benign_overfitting,
        help="map where networks that fit their samples also generalise",
        description="Train networks by full-batch gradient descent on data of a signal and a noise patch, over a grid "
        "of sample sizes and signal strengths, and draw the test error with the boundary n SNR^q = const of the theory "
        "(arXiv 2202.06526). A grid can grow, with --resume.",
    )
    _add_options(parser, benign_overfitting.Settings, Path("results/benign-overfitting"), methods={})
    parser = add_command(
        results,
        "rare-features",
        _reproduce_rare_features,
        help="show that ERM learns the common features, Mixup the rare ones too",
        description="Train networks by full-batch gradient descent on samples, few of which carry a rare feature, by "
        "ERM, by Mixup over all pairs, and by Mixup that is stopped early. Measure the test error on points with the "
        "common and with the rare feature (arXiv 2303.08433).",
    )
    _add_options(parser, rare_features.Settings, Path("results/rare-features"), methods=rare_features.METHODS)
    parser = add_command(
        commands,
        "sweep",
        _sweep,
        help="map what the methods learn over a grid of two settings",
        description="Run the experiment of `mixfeat reproduce theory` at every point of a grid of two of its settings, "
        "and draw heat maps of what each method has learned there. A grid can grow: with --resume more values of the "
        "same two settings are added.",
    )
    parser.add_argument(
        "--preset", choices=list(sweep.PRESETS), default="coarse", metavar="PRESET",
        help="default grid and seeds: coarse, 4 x 3 points and 3 seeds, or fine, 10 x 12 points "
        "and 10 seeds (default: %(default)s)",
    )  # fmt: skip
    for name in ("x", "y"):
        words = " ".join(map(str, getattr(sweep.PRESETS["coarse"], name)))
        parser.add_argument(
            f"--{name}", nargs="+", metavar=("SETTING", "VALUE"),
            help=f"a numeric setting and its values (default: {words})",
        )  # fmt: skip
    _add_options(parser, theory.Settings, Path("results/sweep"), sweep.DEFAULTS)


def _add_options(
    parser: argparse.ArgumentParser,
    kind_of_settings: Any,
    folder: Path,
    defaults: Mapping[str, Any] | None = None,
    methods: Mapping[str, str] = METHODS,
) -> None:
    """Add the options that all experiments have, and one for each setting; a setting not given is no attribute."""
    if methods:
        parser.add_argument(
            "--methods", nargs="+", choices=list(methods), default=list(methods), metavar="METHOD",
            help=f"methods to train, among {', '.join(methods)} (default: all)",
        )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=folder, metavar="FOLDER",
        help="folder for the results and the figure (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="continue from the results in the output folder")
    parser.add_argument(
        "--jobs", type=int, metavar="INT", help="number of worker processes (default: one for each core, or GPU)"
    )
    parser.add_argument(
        "--scheduler", metavar="ADDRESS", help="train on the workers of the Dask cluster with this scheduler"
    )
    for setting in fields(kind_of_settings):
        is_tuple = isinstance(setting.default, tuple)  # a pair, or any number of values
        kind: Any = get_args(setting.type)[0] if is_tuple else setting.type
        shape: dict[str, Any] = {"metavar": kind.__name__.upper()}
        if is_tuple:
            shape = (
                {**shape, "nargs": "+"} if ... in get_args(setting.type) else {"nargs": 2, "metavar": ("LOW", "HIGH")}
            )
        text, default = setting.metadata["help"], (defaults or {}).get(setting.name, setting.default)
        if default is not None:
            text += f" (default: {str(default).strip('()')})"
        parser.add_argument(
            "--" + setting.name.replace("_", "-"), type=kind, default=argparse.SUPPRESS, help=text, **shape
        )


def _prepare(
    args: argparse.Namespace, kind_of_settings: Any, methods: Mapping[str, str] = METHODS
) -> tuple[dict[str, Any], list[str], Any]:
    """Return the given settings, the methods and the module of figures; find now whether a package is missing."""
    try:
        import joblib  # noqa: F401
        import tqdm  # noqa: F401

        from mixfeat.experiments import plots
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise RefusedError(f"{package} is missing: pip install 'mixfeat[experiments]'") from None
    if args.jobs is not None and args.jobs < 1:
        raise RefusedError(f"--jobs must be at least 1, got {args.jobs}")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # a GPU's matrix products repeat only with this
    names = [setting.name for setting in fields(kind_of_settings)]
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return given, [method for method in methods if method in args.methods], plots


def _reproduce_theory(args: argparse.Namespace) -> int:
    given, methods, plots = _prepare(args, theory.Settings)
    try:
        settings = theory.Settings(**given)
        key = identity(settings)
    except (TypeError, ValueError) as error:
        raise RefusedError(str(error)) from None
    json_file = writable_file(args.json)
    figure = writable_folder(args.out) / "theory.png"

    runs = theory.runs_of(settings, methods)
    with _failures():
        found = _train(args, "theory", settings, key, runs)
        records = {method: theory.join([run for run in runs if run.method == method], found) for method in methods}
    results = {method: theory.summarise(settings, record) for method, record in records.items()}
    plots.plot_theory(settings, records, figure)
    facts = {"settings": settings.to_dict(), "settings_hash": settings.hash, "environment": environment()}
    write_json(json_file, {**facts, "results": results})
    print(f"{_theory_table(settings, results)}\n\nfigure: {figure}")
    return 0


def _reproduce_images(args: argparse.Namespace) -> int:
    given, methods, plots = _prepare(args, images.Settings)
    try:
        settings = images.Settings(**given)
        key = identity(settings)
        runs = images.runs_of(settings, methods, args.data_dir.absolute())
    except (TypeError, ValueError, datasets.DatasetError) as error:
        raise RefusedError(str(error)) from None
    json_file = writable_file(args.json)
    figure = writable_folder(args.out) / "images.png"

    with _failures():
        try:
            found = _train(args, "images", settings, key, runs)
        except ValueError as error:  # the data cannot be paired, or a batch does not suit the model
            raise RefusedError(str(error)) from None
        records = {method: images.join([run for run in runs if run.method == method], found) for method in methods}
    results = {method: images.summarise(of_method) for method, of_method in records.items()}
    plots.plot_images(settings, results, figure)
    facts = {"settings": settings.to_dict(), "settings_hash": settings.hash, "environment": environment()}
    write_json(json_file, {**facts, "results": results})
    print(f"{_images_table(settings, results)}\n\nfigure: {figure}")
    return 0


def _reproduce_benign_overfitting(args: argparse.Namespace) -> int:
    given, _, plots = _prepare(args, benign_overfitting.Settings, {})
    try:
        settings = benign_overfitting.Settings(**given)
        key = benign_overfitting.grid_identity(settings)
    except (TypeError, ValueError) as error:
        raise RefusedError(str(error)) from None
    json_file = writable_file(args.json)
    figure = writable_folder(args.out) / "benign-overfitting.png"

    with _failures():
        records = _train(args, "benign-overfitting", settings, key, benign_overfitting.runs_of(settings))
    cells = benign_overfitting.summarise(settings, records)
    boundary = benign_overfitting.boundary(settings, cells)
    plots.plot_benign_overfitting(settings, cells, boundary, figure)
    facts = {"settings": settings.to_dict(), "settings_hash": settings.hash, "environment": environment()}
    write_json(json_file, {**facts, "cells": cells, "boundary": boundary})
    print(f"{_benign_table(settings, cells, boundary)}\n\nfigure: {figure}")
    return 0


def _reproduce_rare_features(args: argparse.Namespace) -> int:
    given, methods, plots = _prepare(args, rare_features.Settings, rare_features.METHODS)
    try:
        settings = rare_features.Settings(**given)
        key = identity(settings)
    except (TypeError, ValueError) as error:
        raise RefusedError(str(error)) from None
    json_file = writable_file(args.json)
    figure = writable_folder(args.out) / "rare-features.png"

    runs = rare_features.runs_of(settings, methods)
    with _failures():
        found = _train(args, "rare-features", settings, key, runs)
        records = {m: rare_features.join([run for run in runs if run.method == m], found) for m in methods}
    results = {method: rare_features.summarise(settings, record) for method, record in records.items()}
    plots.plot_rare_features(settings, results, figure)
    facts = {"settings": settings.to_dict(), "settings_hash": settings.hash, "environment": environment()}
    write_json(json_file, {**facts, "results": results})
    print(f"{_rare_table(settings, results)}\n\nfigure: {figure}")
    return 0


def _sweep(args: argparse.Namespace) -> int:
    given, methods, plots = _prepare(args, theory.Settings)
    preset = sweep.PRESETS[args.preset]
    try:
        x = sweep.Axis.of("--x", *(args.x or preset.x))
        y = sweep.Axis.of("--y", *(args.y or preset.y))
        grid = sweep.Sweep(x, y, {"seeds": preset.seeds, **given})
        key = grid.identity()
    except (TypeError, ValueError) as error:
        raise RefusedError(str(error)) from None
    json_file = writable_file(args.json)
    figure = writable_folder(args.out) / "sweep.png"

    cells = grid.cells(methods)
    runs = [run for cell in cells for run in cell.runs]
    with _failures():
        found = _train(args, "sweep", cells[0].settings, key, runs)
    records = {cell: sweep.join(cell, found) for cell in grid.cells(methods)}
    tables = sweep.tables(grid, records)
    plots.plot_sweep(grid, tables, figure)
    facts = {"settings": key, "x": x._asdict(), "y": y._asdict(), "environment": environment()}
    numbers = {"tables": _without_nan(tables), "cells": sweep.summarise(grid, records)}
    write_json(json_file, {**facts, **numbers})
    print(*(_grid_table(grid, method, tables[method]) for method in methods), f"figure: {figure}", sep="\n\n")
    return 0


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Turn the errors of experiments into those of commands."""
    try:
        yield
    except engine.EngineError as error:
        raise RefusedError(str(error)) from None
    except (DivergedError, engine.WorkerDiedError) as error:
        raise FailedError(str(error)) from None


def _train(
    args: argparse.Namespace, experiment: str, settings: BaseSettings, key: dict[str, Any], runs: Sequence[engine.Run]
) -> dict[str, Record]:
    """Train the runs on the workers that the options name, with results in the output folder; return the records."""
    old = args.out / f"{experiment}.sqlite"
    if old.exists():
        raise RefusedError(f"{old} has results of an older mixfeat: move it away, or choose another folder")
    with engine.Results(args.out / "runs", experiment, key, resume=args.resume) as results:
        before = {run.name: results.get(run.name) for run in runs}
        unfinished = sum(record is None or not record.finished for record in before.values())
        with _workers(args, settings, unfinished) as workers, _Progress(runs, before) as progress:
            return engine.train(runs, results, workers, progress.report)


def _workers(args: argparse.Namespace, settings: BaseSettings, tasks: int) -> engine.Workers:
    if args.scheduler is not None:
        try:
            return engine.Cluster(args.scheduler, engine.software_of(settings))
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            raise RefusedError(f"{package} is missing: pip install 'mixfeat[cluster]'") from None
    device = torch.device(settings.device)
    if device.type == "cuda":
        gpus = torch.cuda.device_count() if device.index is None else 1
        jobs = min(args.jobs or gpus, gpus)  # one process for each: more would only share them
    else:
        jobs = args.jobs or engine.cpu_count()
    return engine.Local(max(1, min(jobs, tasks)), gpus=device.type == "cuda")


class _Progress:
    """On a terminal a bar of all steps, with the time left; elsewhere a line for each run that ends."""

    def __init__(self, runs: Sequence[engine.Run], before: Mapping[str, Record | None]) -> None:
        import tqdm

        records = [(run, before[run.name]) for run in runs]
        done = sum(_steps(run, record) for run, record in records)
        self._runs, self._ended = len(runs), sum(record is not None and record.finished for _, record in records)
        self._bar = tqdm.tqdm(
            total=sum(run.steps for run in runs), initial=done, unit=" steps", unit_scale=True, smoothing=0,
            disable=not sys.stderr.isatty(),
        )  # fmt: skip

    def report(self, run: engine.Run, before: Record | None, after: Record) -> None:
        self._bar.set_description(run.label, refresh=False)
        self._bar.update(_steps(run, after) - _steps(run, before))
        if after.finished:
            self._ended += 1
            if self._bar.disable:
                end = "diverged" if after.diverged else f"{after.seconds:.1f} s"
                print(f"{self._ended} of {self._runs}: {run.label}: {end}", file=sys.stderr)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()


def _steps(run: engine.Run, record: Record | None) -> int:
    return 0 if record is None else run.steps if record.finished else record.step


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _grid_table(grid: sweep.Sweep, method: str, tables: Mapping[str, Sequence[Sequence[float]]]) -> str:
    both, ratio = tables.values()
    rows = [[f"{grid.y.name} \\ {grid.x.name}", *(f"{x:g}" for x in grid.x.values)]]
    for i, y in enumerate(grid.y.values):
        rows.append([f"{y:g}", *(f"{a:.1f} ({b:.2f})" for a, b in zip(both[i], ratio[i], strict=True))])
    return f"{METHODS[method]}: classes with both features (alignment ratio)\n\n" + "\n".join(aligned(rows))


def _benign_table(
    settings: benign_overfitting.Settings, cells: Sequence[Mapping[str, Any]], boundary: Mapping[int, float | None]
) -> str:
    q = settings.degree
    rows = [["n \\ |mu|", *(f"{signal:g}" for signal in settings.signal), "25% at", f"n SNR^{q} there"]]
    for n in settings.num_samples:
        errors = [benign_overfitting.mean_of(cell["test_error"]) for cell in cells if cell["num_samples"] == n]
        at = boundary[n]
        edge = ["", ""] if at is None else [f"{at:.1f}", f"{n * settings.snr(at) ** q:.2f}"]
        rows.append([str(n), *(f"{100 * error:.1f}" for error in errors), *edge])
    losses = torch.tensor([benign_overfitting.mean_of(cell["train_loss"]) for cell in cells])
    loss = losses.max().item()  # nan where a run diverged, which Python's max may pass over
    title = f"test error in percent, {_spread(settings, False)}; the training loss is at most {loss:.2g}"
    return "\n".join([title, "", *aligned(rows)])


def _rare_table(settings: rare_features.Settings, results: dict[str, dict[str, Any]]) -> str:
    rows = [["", "train accuracy", "error, common", "error, rare", "alignment, common", "alignment, rare"]]
    for method, result in results.items():
        errors = (_mean_spread([100 * x for x in result[f"test_error_{kind}"]], 1) for kind in ("common", "rare"))
        alignments = (_mean_spread(result[f"alignment_{kind}"], 2) for kind in ("common", "rare"))
        accuracy = _mean_spread(result["train_accuracy"], 3)
        rows.append([rare_features.METHODS[method], accuracy, *errors, *alignments])
    title = f"test error in percent, on points with the common and with the rare feature; {_spread(settings)}"
    return "\n".join([title, "", *aligned(rows)])


def _images_table(settings: images.Settings, results: dict[str, dict[str, Any]]) -> str:
    columns = {
        "train accuracy": "train_accuracy", "test error, view 0": "test_error_view_0",
        "test error, view 1": "test_error_view_1",
    }  # fmt: skip
    rows = [["", *columns]]
    for method, result in results.items():
        rows.append([METHODS[method], *(_mean_spread([100 * x for x in result[key]], 2) for key in columns.values())])
    title = f"{settings.dataset}, {settings.model}, after {settings.epochs} epochs, in percent; {_spread(settings)}"
    return "\n".join([title, "", *aligned(rows)])


def _spread(settings: Any, deviation: bool = True) -> str:
    if settings.seeds == 1:
        return "one seed"
    return f"mean{' ± standard deviation' if deviation else ''} over {settings.seeds} seeds"


def _theory_table(settings: theory.Settings, results: dict[str, dict[str, Any]]) -> str:
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
    return "\n".join([title, "", *aligned(rows)])


def _mean_spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
