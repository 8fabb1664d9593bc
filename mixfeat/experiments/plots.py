"""Figures of the experiments. Only this module needs matplotlib."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import EngFormatter, LogLocator

from mixfeat._files import replacing
from mixfeat.experiments import benign_overfitting, images, rare_features, sweep, theory
from mixfeat.experiments.engine import Record
from mixfeat.plotting import INK, MUTED, default_style, plain

__all__ = ["plot_images", "plot_sweep", "plot_theory", "save"]

_LARGER, _SMALLER = "#94a3b8", "#d9480f"
_NO_ERROR = 0.01  # percent, the end of a logarithmic axis
_OF_METHOD = {"erm": "#64748b", "uniform": "#2a78b8", "midpoint": "#d9480f"}


@default_style()
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
        axes.set_title(theory.METHODS[method], loc="left", fontsize=13, fontweight="bold", color=INK, pad=24)
        axes.text(
            0, 1.035, f"both features learned in {both:.1f} of {settings.num_classes} classes",
            transform=axes.transAxes, fontsize=9.5, color=_SMALLER,
        )  # fmt: skip
        axes.set_xlim(0, steps[-1])
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("gradient steps", color=MUTED)
        plain(axes)
    panels[0].set_ylabel("alignment  max$_m$ ⟨w$_{c,m}$, v$_{c,l}$⟩", color=MUTED)
    band = Patch(color=MUTED, alpha=0.18, linewidth=0, label="middle 80% of classes and seeds")
    handles = [*panels[0].lines, band]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9.5, labelcolor=INK)
    save(figure, path)


@default_style()
def plot_sweep(grid: sweep.Sweep, tables: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], path: Path) -> None:
    """Write a figure of :func:`mixfeat.experiments.sweep.tables`: a column per method, a row of heat maps per quantity.

    Cells that diverged are hatched. Numbers of classes are coloured by their share of the cell's classes.
    """
    x, y = grid.x, grid.y
    classes = [[grid.points[a, b].num_classes for a in x.values] for b in y.values]
    size = (max(3.0, 0.62 * len(x.values) + 1.2), max(2.2, 0.46 * len(y.values) + 1.2))
    figure = Figure(
        figsize=(size[0] * len(tables) + 0.6, size[1] * len(sweep.QUANTITIES)), layout="constrained", facecolor="white"
    )
    panels = figure.subplots(len(sweep.QUANTITIES), len(tables), sharex=True, sharey=True, squeeze=False)
    for row, (quantity, title) in zip(panels, sweep.QUANTITIES.items(), strict=True):
        for axes, (method, of_method) in zip(row, tables.items(), strict=True):
            values = torch.tensor(of_method[quantity], dtype=torch.float64)
            share = values / torch.tensor(classes) if quantity == "classes_with_both" else values
            axes.set_facecolor("#d1d5db")
            axes.imshow(share.numpy(), cmap="YlGnBu", vmin=0, vmax=1, origin="lower", aspect="auto")
            for i, j in itertools.product(range(len(y.values)), range(len(x.values))):
                if values[i, j].isnan():
                    corner = (j - 0.5, i - 0.5)
                    axes.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="///", edgecolor=MUTED, linewidth=0))
                    continue
                text = f"{values[i, j]:.1f}" if quantity == "classes_with_both" else f"{values[i, j]:.2f}"
                axes.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if share[i, j] > 0.6 else INK)
            if axes in panels[0]:
                axes.set_title(theory.METHODS[method], loc="left", fontsize=13, fontweight="bold", color=INK, pad=24)
            axes.text(0, 1.035, title, transform=axes.transAxes, fontsize=9.5, color=_SMALLER)
            axes.set_xticks(range(len(x.values)), [f"{value:g}" for value in x.values])
            axes.set_yticks(range(len(y.values)), [f"{value:g}" for value in y.values])
            axes.tick_params(colors=MUTED, length=0)
            axes.spines[:].set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel(x.name, color=MUTED)
    for axes in panels[:, 0]:
        axes.set_ylabel(y.name, color=MUTED)
    save(figure, path)


@default_style()
def plot_images(settings: images.Settings, results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write a figure of :func:`mixfeat.experiments.images.summarise`: the test error over epochs, for each view.

    Lines are means over seeds; the band reaches one standard deviation to either side.
    """
    figure = Figure(figsize=(9.2, 4.1), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2, sharey=True)
    views = ("First feature: second half zero", "Second feature: first half zero")
    for view, (axes, title) in enumerate(zip(panels, views, strict=True)):
        for method, result in results.items():
            epochs = result["curves"]["epoch"]
            errors = 100 * torch.tensor(result["curves"][f"test_error_view_{view}"], dtype=torch.float64)  # (E, R)
            mean, spread = errors.mean(1), errors.std(1, correction=min(1, errors.shape[1] - 1))
            low, middle, high = (values.clamp(min=_NO_ERROR) for values in (mean - spread, mean, mean + spread))
            colour = _OF_METHOD[method]
            axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(epochs, middle, color=colour, linewidth=1.8, label=theory.METHODS[method])
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}%")
        axes.minorticks_off()
        axes.set_xlabel("epochs", color=MUTED)
        plain(axes)
    panels[0].set_ylabel("test error", color=MUTED)
    figure.legend(
        handles=panels[0].lines, loc="outside lower center", ncols=3, frameon=False, fontsize=9.5, labelcolor=INK
    )
    save(figure, path)


@default_style()
def plot_benign_overfitting(
    settings: benign_overfitting.Settings, cells: Sequence[Mapping[str, Any]], boundary: Mapping[int, float | None],
    path: Path,
) -> None:  # fmt: skip
    """Write a heat map of the test error over samples and signal, with the theory's line n SNR^q = const.

    The constant is the median of those at the measured boundary; points that diverged stay grey.
    """
    n, signal = settings.num_samples, settings.signal
    error = torch.tensor([benign_overfitting.mean_of(cell["test_error"]) for cell in cells], dtype=torch.float64)
    size = (max(4.4, 0.7 * len(n) + 1.8), max(3.6, 0.42 * len(signal) + 1.4))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.set_facecolor("#d1d5db")
    edges = _edges(n), _edges(signal)
    mesh = axes.pcolormesh(*edges, 100 * error.view(len(n), len(signal)).T.numpy(), cmap="YlGnBu_r", vmin=0, vmax=50)
    axes.set(xscale="log", yscale="log", xlim=edges[0][[0, -1]], ylim=edges[1][[0, -1]])
    found = {count: at for count, at in boundary.items() if at is not None}
    if found:
        constants = torch.tensor([count * settings.snr(at) ** settings.degree for count, at in found.items()])
        constant = constants.median().item()
        unit = settings.noise_std * settings.patch_dim**0.5
        line = [unit * (constant / count) ** (1 / settings.degree) for count in edges[0]]
        axes.plot(edges[0], line, color=_SMALLER, label=f"theory: n SNR$^{settings.degree}$ = {constant:.2f}")
        axes.plot(list(found), list(found.values()), "o", color=INK, markersize=4, label="measured: 25%")
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9.5, labelcolor=INK)
    axes.set_xticks(n, [str(count) for count in n])
    axes.set_yticks(signal, [f"{strength:g}" for strength in signal])
    axes.minorticks_off()
    axes.tick_params(colors=MUTED, length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("training samples n", color=MUTED)
    axes.set_ylabel("signal |μ|", color=MUTED)
    axes.set_title("Test error of networks that fit their samples", loc="left", fontsize=12, color=INK)
    figure.colorbar(mesh, ax=axes, format="{x:g}%").outline.set_visible(False)
    save(figure, path)


@default_style()
def plot_rare_features(settings: rare_features.Settings, results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write a figure of :func:`mixfeat.experiments.rare_features.summarise`: test errors over time, by feature.

    Lines are means over seeds; the band holds all of them.
    """
    figure = Figure(figsize=(9.2, 4.1), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2, sharey=True)
    colours = dict(zip(rare_features.METHODS, _OF_METHOD.values(), strict=True))
    for kind, axes in zip(("common", "rare"), panels, strict=True):
        for method, result in results.items():
            errors = 100 * torch.tensor(result["curves"][f"test_error_{kind}"], dtype=torch.float64)  # (E+1, R)
            steps, colour = result["curves"]["step"], colours[method]
            axes.fill_between(steps, *errors.aminmax(dim=1), color=colour, alpha=0.15, linewidth=0)
            axes.plot(steps, errors.mean(1), color=colour, linewidth=1.8, label=rare_features.METHODS[method])
        if "early" in results:
            axes.axvline(settings.mixup_steps, color=MUTED, linewidth=0.8, linestyle=":")
        axes.set_title(f"Test points with the {kind} feature", loc="left", fontsize=12, fontweight="bold", color=INK)
        axes.yaxis.set_major_formatter("{x:g}%")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("gradient steps", color=MUTED)
        plain(axes)
    panels[0].set_ylabel("test error", color=MUTED)
    handles = panels[0].lines[: len(results) + ("early" in results)]
    handles = [line for line in handles if not line.get_label().startswith("_")]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9.5, labelcolor=INK)
    save(figure, path)


def _edges(values: Sequence[float]) -> Any:
    """Return the borders of cells around values on a logarithmic axis, as an array."""
    log = torch.tensor(values, dtype=torch.float64).log()
    if len(log) == 1:
        return torch.stack([log[0] - 0.2, log[0] + 0.2]).exp().numpy()
    middle = (log[1:] + log[:-1]) / 2
    return torch.cat([2 * log[:1] - middle[:1], middle, 2 * log[-1:] - middle[-1:]]).exp().numpy()


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=160, format="png")
