"""Figures of the experiments. Needs matplotlib, which nothing else here does."""

from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter

from mixfeat.experiments import theory
from mixfeat.experiments.store import Record

__all__ = ["plot_theory"]

_INK, _MUTED, _LARGER, _SMALLER = "#1f2430", "#6b7280", "#94a3b8", "#d9480f"


def plot_theory(settings: theory.Settings, records: Mapping[str, Record], path: Path) -> None:
    """Write a figure with one panel per method: the alignment of the larger and of the smaller feature over time.

    Lines are means over classes and seeds; the band holds the middle 80% of them.
    """
    steps = theory.evaluation_steps(settings)
    figure = Figure(figsize=(3.5 * len(records) + 0.8, 3.9), layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(records), sharey=True, squeeze=False)[0]
    for axes, (method, record) in zip(panels, records.items(), strict=True):
        smaller, larger = record.state["alignment"].flatten(1, 2).sort(-1).values.unbind(-1)  # (E+1, R*C)
        for name, values, colour in (("larger", larger, _LARGER), ("smaller", smaller, _SMALLER)):
            low, high = torch.quantile(values, torch.tensor([0.1, 0.9], dtype=values.dtype), dim=-1)
            axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(
                steps, values.mean(-1), color=colour, linewidth=2.2, label=f"{name} of a class's two features, mean"
            )
        both = (record.state["learned"].sum(-1) == 2).double().sum(-1).mean().item()
        axes.set_title(theory.METHODS[method], loc="left", fontsize=13, fontweight="bold", color=_INK, pad=24)
        axes.text(
            0, 1.035, f"both features learned in {both:.1f} of {settings.num_classes} classes",
            transform=axes.transAxes, fontsize=9.5, color=_SMALLER,
        )  # fmt: skip
        axes.set_xlim(0, steps[-1])
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("gradient steps", color=_MUTED)
        axes.tick_params(colors=_MUTED, length=3)
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color("#cbd5e1")
    panels[0].set_ylabel("alignment  max$_m$ ⟨w$_{c,m}$, v$_{c,l}$⟩", color=_MUTED)
    band = Patch(color=_MUTED, alpha=0.18, linewidth=0, label="middle 80% of classes and seeds")
    handles = [*panels[0].lines, band]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9.5, labelcolor=_INK)
    temporary = path.with_name(f".{path.name}.part")  # so that a figure is never half there
    figure.savefig(temporary, dpi=160, format="png")
    temporary.replace(path)
