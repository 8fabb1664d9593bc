"""A phase diagram: the features that each method learns over a grid of two settings of the theory experiment.

A cell is a point of the grid and a method; its runs are those of :mod:`mixfeat.experiments.theory`, one for each seed.
A cell counts as diverged if one of its runs diverges, and the sweep continues.
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from mixfeat.experiments import theory
from mixfeat.experiments.common import DivergedError, identity
from mixfeat.experiments.engine import Record
from mixfeat.experiments.theory import METHODS, Run, Settings

__all__ = ["DEFAULTS", "PRESETS", "QUANTITIES", "Axis", "Cell", "Sweep", "join", "summarise", "tables"]

DEFAULTS = {"steps": 3000, "seeds": 3, "evaluations": 10}  # those that differ from Settings


class Preset(NamedTuple):
    """A grid and its number of seeds."""

    x: tuple[Any, ...]  # a setting and its values
    y: tuple[Any, ...]
    seeds: int


PRESETS = {
    "coarse": Preset(("degree", 2, 4, 6, 8), ("init_scale", 0.3, 0.5, 0.7), 3),
    "fine": Preset(("degree", *range(2, 12)), ("init_scale", *(i / 10 for i in range(1, 13))), 10),
}
QUANTITIES = {
    "classes_with_both": "classes with both features",
    "alignment_ratio": "alignment, weaker / stronger",
}

_NUMERIC = {setting.name: setting.type for setting in fields(Settings) if setting.type in (int, float)}


class Axis(NamedTuple):
    """A setting and the values that it takes."""

    name: str
    values: tuple[float, ...]

    @classmethod
    def of(cls, axis: str, name: str, *values: Any) -> "Axis":
        """Make the ``axis``, x or y, from numbers or their texts.

        Raises:
            ValueError: a name that is not a numeric setting, a value of another type, or repeated values.
        """
        kind = _NUMERIC.get(name)
        if kind is None:
            raise ValueError(f"{axis} must be one of {', '.join(_NUMERIC)}, got {name!r}")
        numbers: list[float] = []
        for value in values:
            try:
                number = kind(value)
                if isinstance(value, bool) or number != float(value) or not math.isfinite(number):
                    raise ValueError
            except (TypeError, ValueError, OverflowError):
                wanted = "an integer" if kind is int else "a finite number"
                raise ValueError(f"{axis}: a value of {name} must be {wanted}, got {value!r}") from None
            if number in numbers:
                raise ValueError(f"{axis}: the values of {name} must differ, got {number:g} twice")
            numbers.append(number)
        if not numbers:
            raise ValueError(f"{axis}: {name} needs at least one value, got none")
        return cls(name, tuple(numbers))


class Cell(NamedTuple):
    """A point of the grid and a method."""

    x: float
    y: float
    method: str
    settings: Settings
    runs: tuple[Run, ...]  # one for each seed


@dataclass(frozen=True)
class Sweep:
    """A grid of settings.

    Args:
        x, y: the settings that vary.
        others: the settings that do not vary; the rest come from ``DEFAULTS``, else from ``Settings``.

    Raises:
        TypeError, ValueError: x and y of the same setting, a setting that is also in ``others``, or settings that
            ``Settings`` refuses; the message names the point.
    """

    x: Axis
    y: Axis
    others: Mapping[str, Any] = field(default_factory=dict)
    points: dict[tuple[float, float], Settings] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.x.name == self.y.name:
            raise ValueError(f"x and y must be different settings, got {self.x.name} for both")
        for axis in (self.x, self.y):
            if axis.name in self.others:
                raise ValueError(f"{axis.name} varies, so it cannot be set to {self.others[axis.name]} as well")
        points = {}
        for y in self.y.values:
            for x in self.x.values:
                try:
                    values: dict[str, Any] = {**DEFAULTS, **self.others, self.x.name: x, self.y.name: y}
                    points[x, y] = Settings(**values)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{self._point(x, y)}: {error}") from None
        object.__setattr__(self, "points", points)

    def identity(self) -> dict[str, Any]:
        """Return what all records depend on: :func:`identity` without the grid's values, which may grow."""
        first = identity(next(iter(self.points.values())))
        defaults = {setting.name: setting.default for setting in fields(Settings)}
        asked = {**defaults, **DEFAULTS, **self.others, "x": self.x.name, "y": self.y.name}
        del asked[self.x.name], asked[self.y.name]
        return {**asked, **{name: first[name] for name in ("device", "backend", "mixfeat", "torch")}}

    def cells(self, methods: Iterable[str] = METHODS) -> list[Cell]:
        """List all cells, the longest first."""
        return [
            Cell(x, y, method, settings, self._runs(x, y, method, settings))
            for method in sorted(methods, key=theory.LONGEST_FIRST.index)
            for (x, y), settings in self.points.items()
        ]

    def _runs(self, x: float, y: float, method: str, settings: Settings) -> tuple[Run, ...]:
        name, label = f"{method}-{self.x.name}-{x!r}-{self.y.name}-{y!r}-", f"{method}: {self._point(x, y)}, "
        return tuple(
            replace(run, name=f"{name}seed-{run.settings.seed}", label=f"{label}seed {run.settings.seed}")
            for run in theory.runs_of(settings, [method])
        )

    def _point(self, x: float, y: float) -> str:
        return f"{self.x.name} {x!r}, {self.y.name} {y!r}"


def join(cell: Cell, records: Mapping[str, Record]) -> Record:
    """Join the records of a cell's seeds (:func:`theory.join`), without a state if one of them diverged."""
    try:
        return theory.join(cell.runs, records)
    except DivergedError:
        found = [records[run.name] for run in cell.runs]
        return Record(True, cell.settings.steps, sum(record.seconds for record in found), {})


def summarise(sweep: Sweep, records: Mapping[Cell, Record]) -> list[dict[str, Any]]:
    """Turn every cell into numbers for JSON: lists over the seeds, None if the cell diverged."""
    keys = ("train_accuracy", "classes_with_both", "classes_with_one", "classes_with_none", "alignment_ratio", "loss")
    rows = []
    for cell, record in records.items():
        numbers = theory.summarise(cell.settings, record) if record.state else dict.fromkeys(keys)
        point = {"method": cell.method, sweep.x.name: cell.x, sweep.y.name: cell.y, "diverged": not record.state}
        rows.append({**point, **{key: numbers[key] for key in keys}, "seconds": record.seconds})
    return rows


def tables(sweep: Sweep, records: Mapping[Cell, Record]) -> dict[str, dict[str, list[list[float]]]]:
    """Tabulate each of ``QUANTITIES`` for each method: a row for each y, a column for each x; NaN where it diverged."""
    results: dict[str, dict[str, list[list[float]]]] = {}
    for cell, record in records.items():
        numbers = theory.summarise(cell.settings, record) if record.state else {}
        for quantity in QUANTITIES:
            empty = [[math.nan] * len(sweep.x.values) for _ in sweep.y.values]
            table = results.setdefault(cell.method, {}).setdefault(quantity, empty)
            row, column = sweep.y.values.index(cell.y), sweep.x.values.index(cell.x)
            table[row][column] = statistics.mean(numbers[quantity]) if numbers else math.nan
    return results
