"""Splat, blur and slice on a permutohedral lattice of two dimensions.

A noisy step whose features are position and intensity.
"""

from __future__ import annotations

import numpy as np
import torch
from drawing import COLORS, FAINT, INK, PAPER, new_figure, save, style
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from numpy.typing import NDArray
from scene import PICTURES

from crfrefine.engines.torch.filters import Lattice, elevate, enclosing_simplex

POSITION = 5.0
INTENSITY = 0.22
"""Bandwidths."""


def signal() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions and intensities of 40 voxels on a line, an edge in the middle."""
    rng = np.random.default_rng(4)
    positions = np.arange(40.0)
    return positions, np.where(positions < 19.5, 0.25, 0.75) + rng.normal(0, 0.07, 40)


def corners_of(features: NDArray[np.float64]) -> NDArray[np.int64]:
    """Coordinates of the three corners around each of N points, (N, 3, 3)."""
    remainder0, rank, _ = (
        found.numpy() for found in enclosing_simplex(elevate(torch.as_tensor(features)))
    )
    remainder = np.arange(3)
    step = np.where(
        rank[:, None, :] < 3 - remainder[:, None], remainder[:, None], remainder[:, None] - 3
    )
    return np.asarray(remainder0[:, None, :] + step)


def plane(keys: NDArray[np.int64]) -> NDArray[np.float64]:
    """Where vertices (K, 3) of the lattice lie in the plane of the features, (K, 2)."""
    embedding = elevate(torch.eye(2, dtype=torch.float64)).numpy()
    return np.asarray(keys @ np.linalg.pinv(embedding))


def triangles(axes: Axes) -> None:
    """The lattice around the points."""
    grid = np.stack(np.meshgrid(np.linspace(-2, 10, 160), np.linspace(-2, 7, 160)), -1).reshape(
        -1, 2
    )
    corners = np.unique(corners_of(grid).reshape(len(grid), -1), axis=0).reshape(-1, 3, 3)
    sides = [plane(corner)[[0, 1, 2, 0]] * (POSITION, INTENSITY) for corner in corners]
    axes.add_collection(LineCollection(sides, colors=FAINT, linewidths=0.5, alpha=0.5))
    axes.set(xlim=(-3, 42), ylim=(-0.05, 1.08))


def bubbles(axes: Axes, vertices: NDArray[np.float64], values: NDArray[np.float64]) -> None:
    """Vertices: the area is the mass that arrived there, the color the mean of what it carries."""
    mass = values[:, 1]
    mean = values[:, 0] / np.maximum(mass, 1e-9)
    x, y = (vertices * (POSITION, INTENSITY)).T
    axes.scatter(
        x,
        y,
        s=60 * mass,
        c=mean,
        cmap="viridis",
        vmin=0,
        vmax=1,
        edgecolors=INK,
        linewidths=0.4,
        zorder=3,
    )


def draw() -> None:
    """Four panels, one per stage."""
    positions, intensities = signal()
    rng = np.random.default_rng(5)
    values = np.clip(np.where(positions < 19.5, 0.15, 0.85) + rng.normal(0, 0.22, 40), 0, 1)
    features = np.stack([positions / POSITION, intensities / INTENSITY], axis=1)
    lattice = Lattice(torch.as_tensor(features))
    at_vertices = lattice.splat(torch.as_tensor(np.stack([values, np.ones_like(values)], axis=1)))
    splatted = at_vertices.numpy()
    at_corners = lattice.blur(at_vertices)
    blurred = at_corners.numpy()
    sliced = lattice.slice_(at_corners).numpy()
    keys = np.zeros((lattice.num_vertices, 3), np.int64)
    keys[lattice.vertices.numpy()] = corners_of(features)
    vertices = plane(keys)
    figure = new_figure(
        10.4, 7.4, "A permutohedral lattice of two dimensions: position and intensity"
    )
    panels = figure.subplots(2, 2)
    titles = (
        "1  each voxel is a point; its color is the probability that it sends",
        f"2  splat: the three corners around it take shares ({lattice.num_vertices} corners)",
        "3  blur: neighboring corners mix, in three directions",
        "4  slice: each voxel reads from its three corners",
    )
    for axes, title in zip(panels.flat, titles, strict=True):
        style(axes, title, "position")
    for axes in panels.flat[:3]:
        triangles(axes)
        axes.grid(visible=False)
        axes.set_ylabel("intensity", color=FAINT, fontsize=8)
    panels[0, 0].scatter(
        positions,
        intensities,
        c=values,
        cmap="viridis",
        vmin=0,
        vmax=1,
        s=30,
        edgecolors=INK,
        linewidths=0.4,
        zorder=3,
    )
    bubbles(panels[0, 1], vertices, splatted)
    bubbles(panels[1, 0], vertices, blurred)
    panels[1, 1].plot(positions, values, "o", color=FAINT, markersize=4, label="sent")
    panels[1, 1].plot(
        positions,
        sliced[:, 0] / sliced[:, 1],
        "o-",
        color=COLORS[0],
        markersize=4,
        label="heard, per unit of weight",
    )
    panels[1, 1].legend(fontsize=8, facecolor=PAPER, edgecolor=PAPER, labelcolor=INK)
    save(figure, PICTURES / "how_lattice.png")


if __name__ == "__main__":
    draw()
