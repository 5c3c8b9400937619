"""The report's plots: matplotlib's SVG, whose colours are the page's own, so that they are read in light and dark."""

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from .statistics import AREA_BINS, SCORE_BINS, Statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Stand-ins that matplotlib writes, and what the page has in their place.
_INK, _KEPT, _OTHER, _GRID = "#010203", "#010204", "#010205", "#010206"
_COLOURS = {_INK: "currentColor", _KEPT: "var(--accent)", _OTHER: "var(--faint)", _GRID: "var(--line)"}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.axisbelow": True,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "xtick.major.pad": 5,
    "ytick.major.size": 0,
    "grid.color": _GRID,
    "legend.frameon": False,
}


def plots(statistics: Statistics) -> dict[str, Markup]:
    """Inline SVG by name: scores, areas, per_image, heat."""
    draw = {"scores": _scores, "areas": _areas, "per_image": _per_image, "heat": _heat}
    return {name: _svg(name, function, statistics) for name, function in draw.items()}


def _scores(axes: "Axes", statistics: Statistics) -> None:
    left = np.arange(SCORE_BINS) / SCORE_BINS
    kept, other = statistics.scores.T
    axes.bar(left, kept, 1 / SCORE_BINS, align="edge", color=_KEPT, label="kept")
    axes.bar(left, other, 1 / SCORE_BINS, kept, align="edge", color=_OTHER, label="rejected")
    axes.set(xlabel="score", xlim=(0, 1))
    if other.sum() > 0 and (kept + other).max() > 50 * max(1, int(kept.max(initial=0))):
        axes.set_yscale("symlog")
    axes.legend(loc="upper right")


def _areas(axes: "Axes", statistics: Statistics) -> None:
    edges = 10.0 ** ((np.arange(AREA_BINS + 1) - AREA_BINS) / 4)
    axes.bar(edges[:-1], statistics.areas, np.diff(edges), align="edge", color=_KEPT)
    axes.set_xscale("log")
    axes.set(xlabel="share of the image", xlim=(edges[0], 1))
    axes.set_xticks(
        [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1], labels=["0.001 %", "0.01 %", "0.1 %", "1 %", "10 %", "100 %"], minor=False
    )
    axes.set_xticks([], minor=True)


def _per_image(axes: "Axes", statistics: Statistics) -> None:
    counts = statistics.per_image
    widest = max(counts, default=0)
    step = max(1, -(-(widest + 1) // 50))
    bins = np.zeros(widest // step + 1, np.int64)
    for regions, images in counts.items():
        bins[regions // step] += images
    axes.bar(np.arange(len(bins)) * step, bins, step * 0.9, align="edge" if step > 1 else "center", color=_KEPT)
    axes.set(xlabel="regions" if step == 1 else f"regions, {step} to a bar")
    axes.locator_params(axis="x", integer=True)


def _heat(axes: "Axes", statistics: Statistics) -> None:
    share = statistics.heat / max(1, statistics.regions)
    shown = axes.imshow(share, cmap="viridis", vmin=0, extent=(0, 1, 1, 0), interpolation="nearest", aspect=0.75)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    assert axes.figure is not None
    bar = axes.figure.colorbar(shown, ax=axes, shrink=0.8, format=lambda value, _: f"{value:.0%}")
    bar.outline.set_visible(False)


def _svg(name: str, draw: Callable[["Axes", Statistics], None], statistics: Statistics) -> Markup:
    import matplotlib as mpl
    from matplotlib.figure import Figure  # without pyplot there is no global state and no window

    with mpl.rc_context(_STYLE | {"svg.hashsalt": name}):  # type: ignore[arg-type]  # the salt: the same ids each time
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.subplots()
        axes.grid(axis="y", linewidth=0.6)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        draw(axes, statistics)
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 role="img"', text, count=1)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)  # groups are named alike in every plot
    for stand_in, colour in _COLOURS.items():
        text = text.replace(stand_in, colour)
    return Markup(text)  # noqa: S704  (numbers and our own words only)
