"""Figures of benchmark results. Needs matplotlib."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullFormatter, PercentFormatter

from mixfeat.plotting import INK, MUTED, default_style, plain

from .results import GROWTH, about, fingerprint, of_limit, ratios, rows

__all__ = ["MARK", "plot"]

#: Key, in a figure's PNG, of the fingerprint of its results.
MARK = "mixfeat results"

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers differ as well
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#7f7f7f")
_OURS = "#d55e00"
_MARKERS = "os^DvPX*"
_TITLE: dict[str, Any] = {"loc": "left", "fontsize": 11, "fontweight": "bold", "color": INK}
_SMALL = 8.5
_MAX_SHARE = 1.2  # end of the axis of shares of the limit
_FLOP = ", GFLOP/s"  # how the names of the roofs among the limits end

_Rows = Sequence[Mapping[str, Any]]


@default_style()
def plot(document: Mapping[str, Any], path: Path) -> None:
    """Write a figure: speed, peak memory and share of the limit per row; a roofline; curves of growth.

    A case that was timed with its gradient shows forward alone in the roofline only. Parts without rows are left out.
    The PNG holds the document's fingerprint, under MARK.
    """
    everything = rows(document)
    timed = [row for row in everything if "mixfeat" in row["timings"] and len(row["timings"]) > 1]
    trained = [_problem(row) for row in timed if row["direction"] != "forward"]
    timed = [row for row in timed if row["direction"] != "forward" or _problem(row) not in trained]
    counted = [row for row in everything if {"FLOP", "bytes"} <= set(row["work"])]
    curves = [row for row in everything if row["direction"].startswith(GROWTH)]
    suites = list(dict.fromkeys(row["suite"] for row in [*timed, *counted, *curves]))
    lines = len(timed) + len({row["suite"] for row in timed})
    parts = [(1.6 + 0.175 * lines, _table, timed), (4.4, _roofline, counted), (2.8, _curves, curves)]
    parts = [part for part in parts if part[2]]
    figure = Figure(figsize=(11, 0.4 + sum(part[0] for part in parts)), layout="constrained", facecolor="white")
    figure.suptitle(about(document), x=0.01, ha="left", fontsize=9, color=MUTED)
    if parts:
        figures = figure.subfigures(len(parts), 1, height_ratios=[part[0] for part in parts], squeeze=False)[:, 0]
        colours = dict(zip(suites, itertools.cycle(_COLOURS), strict=False))
        for subfigure, (_, draw, shown) in zip(figures, parts, strict=True):
            draw(subfigure, shown, colours, everything)
    figure.savefig(path, dpi=160, format="png", metadata={MARK: fingerprint(document)})


def _problem(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the key of a row without its direction."""
    return row["suite"], row["case"], row["dtype"]


def _table(figure: Any, shown: _Rows, colours: Mapping[str, str], everything: _Rows) -> None:
    """Draw a line per row, under its suite's name: times of baselines, peak memory, mixfeat's share of the limit."""
    speed, memory, limit = figure.subplots(1, 3, sharey=True, width_ratios=[3.4, 2, 1.5])
    names = list(dict.fromkeys(name for row in shown for name in ratios(row)))
    styles = dict(zip(names, _styles(), strict=False))
    ticks, labels, y = [], [], 0
    for suite in dict.fromkeys(row["suite"] for row in shown):
        speed.text(
            0, y, f"{suite}  ", transform=speed.get_yaxis_transform(), ha="right", va="center", fontsize=9,
            fontweight="bold", color=INK,
        )  # fmt: skip
        for row in (row for row in shown if row["suite"] == suite):
            y += 1
            ticks.append(y)
            labels.append(_label(row))
            if y % 2:
                for axes in (speed, memory, limit):
                    axes.axhspan(y - 0.5, y + 0.5, color="#f3f4f6", linewidth=0, zorder=0)
            found = ratios(row)
            ends = [min(1, *found.values()), max(1, *found.values())]
            speed.plot(ends, [y, y], color="#cbd5e1", linewidth=1, zorder=1)
            for name, ratio in found.items():
                speed.plot(ratio, y, **styles[name])
            for name, size in reversed(row["peak_bytes"].items()):
                if size:
                    memory.plot(size / 2**20, y, **styles.get(name, _OUR_STYLE))
            _share(limit, row, y)
        y += 1
    speed.plot([1, 1], [0.5, y - 0.5], color=_OURS, linewidth=1.4, zorder=1)
    speed.set_title("time, mixfeat = 1", **_TITLE)
    memory.set_title("peak memory, MiB", **_TITLE)
    for axes in (speed, memory):
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
    limit.axvline(1, color=MUTED, linewidth=1, zorder=2)
    limit.set_xlim(0, _MAX_SHARE)
    limit.xaxis.set_major_locator(MultipleLocator(0.5))
    limit.xaxis.set_major_formatter(PercentFormatter(1))
    limit.set_title("mixfeat, of the limit", **_TITLE)
    for axes in (speed, memory, limit):
        plain(axes, "x")
        axes.tick_params(labelsize=8.5)
        axes.tick_params(axis="y", length=0)
    speed.set_yticks(ticks, labels, fontsize=_SMALL, color=INK)
    speed.set_ylim(y - 0.3, -0.7)
    ours = [Line2D([], [], label="mixfeat", **_OUR_STYLE)]
    handles = ours + [Line2D([], [], label=name, **style) for name, style in styles.items()]
    columns = 120 // (4 + max(len(name) for name in styles))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(columns, len(handles)), frameon=False, fontsize=8.5,
        labelcolor=INK,
    )  # fmt: skip


_OUR_STYLE: dict[str, Any] = {"color": _OURS, "marker": "o", "markersize": 5.5, "linestyle": "none", "zorder": 3}


def _styles() -> Iterator[dict[str, Any]]:
    """Yield a style per baseline: filled markers in every colour, then hollow ones."""
    for i in itertools.count():
        colour = _COLOURS[i % len(_COLOURS)]
        yield {
            "color": colour, "marker": _MARKERS[i % len(_MARKERS)], "markersize": 5, "linestyle": "none", "zorder": 2,
            "markerfacecolor": colour if i < len(_COLOURS) else "white",
        }  # fmt: skip


def _plain_numbers(axis: Axis) -> None:
    """Write 1000, not 10^3, at major ticks only."""
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x < 1e4 else f"{x / 1e3:g}k"))
    axis.set_minor_formatter(NullFormatter())


def _label(row: Mapping[str, Any]) -> str:
    """Name a row without its shape, which the tables give."""
    case = re.sub(r" \([\d, ]+\)$", "", row["case"])
    return ", ".join([case, row["direction"], *([row["dtype"]] if row["dtype"] != "float32" else [])]) + "  "


def _share(axes: Axes, row: Mapping[str, Any], y: float) -> None:
    share = of_limit(row)
    if share is None:
        return
    axes.barh(y, min(share, _MAX_SHARE), height=0.62, color="#f0b48f", zorder=1)
    text = f"{share:.0%} of {row['limit']['name']}"
    axes.text(0.02, y, text, fontsize=7.5, color=INK, va="center", zorder=3)


def _roofline(figure: Any, shown: _Rows, colours: Mapping[str, str], everything: _Rows) -> None:
    """Draw arithmetic rates against intensity, under the measured roofs."""
    axes = figure.subplots()
    for row in shown:
        colour, half = colours[row["suite"]], row["dtype"] == "bfloat16"
        seconds = row["timings"]["mixfeat"]["median"]
        axes.plot(
            row["work"]["FLOP"] / row["work"]["bytes"], row["work"]["FLOP"] / seconds / 1e9, linestyle="none",
            marker="o" if row["direction"] == "forward" else "^", color=colour, markersize=7, zorder=3,
            markerfacecolor="white" if half else colour,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    left, right = axes.get_xlim()
    limits: Mapping[str, float] = next((row["figures"] for row in everything if row["suite"] == "limits"), {})
    bandwidth = limits.get("copies, GB/s")
    if bandwidth:
        flat = {name.removesuffix(_FLOP): rate for name, rate in limits.items() if name.endswith(_FLOP)}
        for i, (name, rate) in enumerate(
            flat.items()
        ):  # names stand side by side, since roofs can be close to each other
            axes.plot([rate / bandwidth, right], [rate] * 2, color=MUTED, linewidth=1.2, zorder=1)
            axes.text(
                (i + 2.5) / (len(flat) + 2.5), rate, name, transform=axes.get_yaxis_transform(), ha="center",
                va="bottom", fontsize=8, color=MUTED,
            )  # fmt: skip
        top = max(flat.values())
        axes.plot([left, top / bandwidth], [left * bandwidth, top], color=MUTED, linewidth=1.2, zorder=1)
        axes.annotate(
            f"copies, {bandwidth:.3g} GB/s", (top / bandwidth / 2, top / 2), xytext=(-8, 2),
            textcoords="offset points", ha="right", fontsize=8, color=MUTED,
        )  # fmt: skip
    axes.set_xlim(left, right)
    axes.set_title("roofline: the rate of mixfeat, against the memory traffic that the work needs", **_TITLE)
    axes.set_xlabel("intensity, FLOP per byte that must be read or written", fontsize=9, color=MUTED)
    axes.set_ylabel("GFLOP/s", fontsize=9, color=MUTED)
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)
    plain(axes, "both")
    axes.tick_params(labelsize=8.5)
    marks = {"forward": ("o", True), "with the gradient": ("^", True), "bfloat16": ("o", False)}
    handles = [
        Line2D([], [], color=colours[suite], marker="s", linestyle="none", label=suite)
        for suite in dict.fromkeys(row["suite"] for row in shown)
    ]
    handles += [
        Line2D([], [], color=INK, marker=mark, linestyle="none", markerfacecolor=INK if full else "white", label=name)
        for name, (mark, full) in marks.items()
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8.5, labelcolor=INK)


def _curves(figure: Any, shown: _Rows, colours: Mapping[str, str], everything: _Rows) -> None:
    """Draw a panel per growing dimension, with the fitted exponent at the end of each line."""
    names = list(dict.fromkeys(row["direction"].removeprefix(GROWTH) for row in shown))
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        found = [row for row in shown if row["direction"] == f"{GROWTH}{name}"]
        below = 0.0  # end of the line below
        for row in sorted(found, key=lambda row: row["figures"]["ms"][-1]):
            values, times = row["figures"][name], row["figures"]["ms"]
            axes.plot(values, times, color=colours[row["suite"]], marker="o", markersize=4, linewidth=1.6)
            axes.annotate(
                f"{row['figures']['exponent']:.2f}", (values[-1], times[-1]), xytext=(5, 7 * (times[-1] < 1.7 * below)),
                textcoords="offset points", va="center", fontsize=8.5, color=colours[row["suite"]],
            )  # fmt: skip
            below = times[-1]
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xmargin(0.2)
        axes.set_title(f"more {name}" if name == "threads" else f"larger {name}", **_TITLE)
        values = sorted({value for row in found for value in row["figures"][name]})
        if values[-1] > 20 * values[0]:
            axes.xaxis.set_major_locator(LogLocator(10))
        else:
            axes.set_xticks(values)
        _plain_numbers(axes.xaxis)
        plain(axes, "both")
        axes.tick_params(labelsize=8.5)
    panels[0].set_ylabel("ms of a step, and exponents", fontsize=9, color=MUTED)
    _plain_numbers(panels[0].yaxis)
    handles = [
        Line2D([], [], color=colours[suite], marker="o", label=suite)
        for suite in dict.fromkeys(row["suite"] for row in shown)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5, labelcolor=INK)
