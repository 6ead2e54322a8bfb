"""How the figures are drawn: contours over an image, curves, bars, small PNG files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

PAPER = "#101114"
INK = "#F2F2F2"
FAINT = "#9AA0A6"
# Okabe & Ito 2008: distinguishable with every common color vision deficiency.
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7")
# Contours cut corners: with finer pixels they cut off so little that the voxels remain visible.
_FINER = 5


def new_figure(width: float, height: float, title: str) -> Figure:
    """A dark figure, inches, that arranges its panels itself."""
    figure = Figure(figsize=(width, height), dpi=100, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, color=INK, fontsize=12, fontweight="bold")
    return figure


def show(
    axes: Axes,
    image: NDArray[np.floating],
    spacing: Sequence[float],
    title: str,
    labels: NDArray[np.integer] | None = None,
) -> None:
    """Show an image (rows, columns[, 3]), 0 to 1, and the borders of labels 1 and 2.

    Args:
        axes: where.
        image: what.
        spacing: mm between rows and between columns.
        title: above it.
        labels: (rows, columns); None: no contours.
    """
    size = image.shape[1] * spacing[1], image.shape[0] * spacing[0]
    axes.imshow(
        np.clip(image, 0, 1),
        cmap="gray",
        vmin=0,
        vmax=1,
        extent=(0, size[0], size[1], 0),
        interpolation="nearest",
        aspect="equal",
    )
    for label in () if labels is None else np.unique(labels[labels > 0]):
        fine = np.pad(
            (labels == label).repeat(_FINER, axis=0).repeat(_FINER, axis=1).astype(np.float32), 1
        )
        y, x = (
            (np.arange(n) - 0.5) / _FINER * step
            for n, step in zip(fine.shape, spacing, strict=True)
        )
        axes.contour(x, y, fine, levels=[0.5], colors=[COLORS[label - 1]], linewidths=1.4)
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0), xticks=[], yticks=[])
    axes.set_title(title, color=INK, fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)


def gray(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Intensities as gray values: all but the outermost percent between 0 and 1."""
    low, high = np.percentile(values, (1, 99))
    return np.asarray((values - low) / (high - low))


def style(axes: Axes, title: str, xlabel: str = "", *, log: bool = False) -> None:
    """Dress a panel with curves or bars; its legend too, if lines have labels."""
    axes.set_facecolor(PAPER)
    axes.set_title(title, color=INK, fontsize=9)
    axes.set_xlabel(xlabel, color=FAINT, fontsize=8)
    axes.tick_params(colors=FAINT, labelsize=8, which="both")
    axes.grid(visible=True, color=FAINT, alpha=0.2)
    if log:
        axes.set_yscale("log")
    for spine in axes.spines.values():
        spine.set_color(FAINT)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, facecolor=PAPER, edgecolor=PAPER, labelcolor=INK)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of 256 colors, a third of the size of one with all of them."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=PAPER)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
    print(f"wrote {path}")
