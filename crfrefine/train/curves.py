"""The picture of the training curves: loss, Dice of the cases that decide, and bandwidths over the optimizer steps.

Matplotlib is imported when a training begins and when the picture is drawn, never by another command.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from crfrefine.errors import BackendUnavailableError
from crfrefine.parameters.sections import BANDWIDTHS
from crfrefine.train.starts import length_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from crfrefine.train.candidates import FitResult
    from crfrefine.train.comparison import TrainingResult

# Okabe & Ito 2008: distinguishable with every common color vision deficiency.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_LOSS_WINDOW = 5


def require_matplotlib() -> None:
    """Raise BackendUnavailableError if the picture could not be drawn: a training must not find out at its end."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BackendUnavailableError(f"train-crf draws its curves with matplotlib ({error}): pip install 'crfrefine[train]'") from error


def draw_curves(result: TrainingResult) -> bytes:
    """Draw the curves of all trainings of a run and return the picture as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 7.6), dpi=110)
    grid = figure.subplots(2, 2)
    # Margins that hold any labels: layouts that fit themselves to the labels take longer than the picture.
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.07, top=0.915, wspace=0.2, hspace=0.29)
    runs = [(fold.name, fold.tuned.fit) for fold in result.folds] + [("all cases", result.final.fit)]
    for number, (name, fit) in enumerate(runs):
        color = _COLORS[number % len(_COLORS)]
        for start, history in fit.histories.items():
            is_winner = start == fit.start
            style = {"color": color, "alpha": 1.0 if is_winner else 0.25, "linewidth": 1.6 if is_winner else 0.8}
            label = name if is_winner else None
            steps = [record for record in history if "loss" in record]
            _plot(grid[0, 0], [r["iteration"] for r in steps], _running_mean([r["loss"] for r in steps]), label, style)
            scored = [record for record in history if "score" in record]
            gains = [100.0 * (record["score"] - fit.network_score) for record in scored]
            _plot(grid[0, 1], [r["iteration"] for r in scored], gains, label, {**style, "marker": ".", "markersize": 3})
            if is_winner:
                _mark_best(grid[0, 1], fit, scored, color)
            for axes, key in zip(grid[1], BANDWIDTHS, strict=True):
                for line in _values(history, key):
                    _plot(axes, [r["iteration"] for r in history], line, None, style)
    grid[0, 1].axhline(0.0, color="#808080", linewidth=0.8, linestyle="dashed")
    titles = (
        (grid[0, 0], "training loss", result.plan.options.loss + f", mean of {_LOSS_WINDOW} iterations", False),
        (grid[0, 1], "Dice of the cases that decide", "points above the network alone", False),
        (grid[1, 0], BANDWIDTHS[0], length_unit(result.plan.base), True),
        (grid[1, 1], BANDWIDTHS[1], "normalized intensity", True),
    )
    for axes, title, unit, is_logarithmic in titles:
        axes.set_title(title, fontsize=11)
        axes.set_ylabel(unit, fontsize=9)
        axes.set_xlabel("iteration", fontsize=9)
        axes.grid(color="#E0E0E0", linewidth=0.6)
        if is_logarithmic and axes.lines:
            axes.set_yscale("log")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    if 0 < len(labels) <= len(_COLORS):
        grid[0, 0].legend(handles, labels, fontsize=8, frameon=False)
    figure.suptitle("strong: the start that won; faint: the others", fontsize=9, color="#606060")
    return png_of(figure)


def png_of(figure: Figure, bbox: str | None = None) -> bytes:
    """Return a figure as PNG; `bbox`: "tight" cuts its margins off."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches=bbox, metadata={"Software": None})  # no version: equal input, equal bytes
    return buffer.getvalue()


def _plot(axes: Axes, optimizer_steps: Sequence[int], values: Sequence[float], label: str | None, style: dict[str, Any]) -> None:
    if values:
        axes.plot(optimizer_steps, values, label=label, **style)


def _mark_best(axes: Axes, fit: FitResult, scored: Sequence[dict[str, Any]], color: str) -> None:
    best = [record for record in scored if record["iteration"] == fit.best_optimizer_step]
    if best:
        axes.plot([fit.best_optimizer_step], [100.0 * (best[0]["score"] - fit.network_score)], marker="o", color=color, markersize=6)


def _values(history: Sequence[dict[str, Any]], key: str) -> Iterator[list[float]]:
    """Yield the history of each bandwidth of a kind, kernel by kernel and entry by entry."""
    names = [name for name in (history[0]["thetas"] if history else {}) if name.endswith(key)]
    for name in names:
        first = history[0]["thetas"][name]
        for entry in range(len(first) if isinstance(first, list | tuple) else 1):
            yield [_entry(record["thetas"][name], entry) for record in history]


def _entry(value: Any, number: int) -> float:
    """Return one of several values; a bandwidth is given as one number while all its entries agree."""
    return float(value[number]) if isinstance(value, list | tuple) else float(value)


def _running_mean(values: Sequence[float]) -> list[float]:
    result = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - _LOSS_WINDOW) : end]
        result.append(sum(window) / len(window))
    return result
