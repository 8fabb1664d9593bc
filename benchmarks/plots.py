"""Figures of benchmark results. Needs matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mixfeat.experiments.plots import INK, MUTED, plain, save

from .results import of_limit, ratios

__all__ = ["plot"]

_OURS, _OTHERS = "#d9480f", ["#1d4ed8", "#60a5fa", "#94a3b8", "#cbd5e1", "#e2e8f0"]


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Write a figure with three panels: time against baselines, peak memory, and the share of the limit reached."""
    rows = [row for row in document["rows"] if len(row["timings"]) > 1]
    height = 1.2 + 0.62 * len(rows)
    figure = Figure(figsize=(15, height), layout="constrained", facecolor="white")
    speed, memory, limit = figure.subplots(1, 3, sharey=True, width_ratios=[3, 2, 1.2])
    names = list(dict.fromkeys(name for row in rows for name in ratios(row)))
    colours = {"mixfeat": _OURS} | {name: _OTHERS[min(i, len(_OTHERS) - 1)] for i, name in enumerate(names)}

    _bars(speed, [{"mixfeat": 1.0, **ratios(row)} for row in rows], colours, "{:.1f}x")
    speed.set_title("time, mixfeat = 1", **_TITLE)
    peaks = [{name: size / 2**20 for name, size in row["peak_bytes"].items() if size} for row in rows]
    _bars(memory, peaks, colours, "{:.3g}")
    memory.set_title("peak memory of a call, MiB", **_TITLE)
    shares = [{"mixfeat": of_limit(row)} if row["limit"] else {} for row in rows]
    _bars(limit, shares, colours, "{:.0%}", logarithmic=False)
    for i, row in enumerate(rows):
        if row["limit"]:
            limit.text(0.02, i + 0.47, f"of {row['limit']['name']}", fontsize=7, color=MUTED, va="center")
    limit.axvline(1, color=MUTED, linewidth=0.8)
    limit.set_title("share of the limit", **_TITLE)
    labels = ["\n".join((row["suite"], f"{row['case']}, {row['direction']}, {row['dtype']}")) for row in rows]
    speed.set_yticks(range(len(rows)), labels, fontsize=8, color=INK)
    speed.invert_yaxis()
    handles = [speed.barh([0], [0], color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=8.5, labelcolor=INK)
    where = f"{document['device']}, PyTorch {document['torch']}, {document['date']}"
    figure.suptitle(where, x=0.01, ha="left", fontsize=9.5, color=MUTED)
    save(figure, path)


_TITLE: dict[str, Any] = {"loc": "left", "fontsize": 12, "fontweight": "bold", "color": INK}


def _bars(
    axes: Axes,
    rows: Sequence[Mapping[str, float | None]],
    colours: Mapping[str, str],
    form: str,
    logarithmic: bool = True,
) -> None:
    """One group of bars per row, labelled with their values."""
    for i, row in enumerate(rows):
        width = (0.8 if len(row) > 1 else 0.5) / max(len(row), 1)
        for j, (name, value) in enumerate(row.items()):
            if value is None:
                continue
            y = i + (j + 0.5 - len(row) / 2) * width
            axes.barh(y, value, height=0.9 * width, color=colours.get(name, _OTHERS[-1]))
            axes.annotate(
                form.format(value), (value, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=6.5,
                color=INK,
            )  # fmt: skip
    if logarithmic:
        axes.set_xscale("log")
    axes.margins(x=0.15)
    plain(axes, "x")
    axes.tick_params(labelsize=8)
