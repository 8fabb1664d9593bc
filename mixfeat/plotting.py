"""The style that all figures share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["INK", "MUTED", "default_style", "plain"]

INK, MUTED = "#1f2430", "#6b7280"


@contextmanager
def default_style() -> Iterator[None]:
    """Draw with matplotlib's defaults and ignore the user's matplotlibrc; also works as a decorator."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def plain(axes: "Axes", values: Literal["x", "y", "both"] = "y") -> None:
    """Reduce the frame to a baseline, with grid lines for reading ``values``."""
    axes.tick_params(colors=MUTED, length=3)
    axes.grid(axis=values, color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#cbd5e1")
