"""Sharp edges from a distorted segmentation by learning two numbers, on one generated color picture. Seconds on one core.

    python examples/sharp_edges_2d.py [--output DIR] [--quick] [--seed N]

The sanity experiment of Monteiro, Figueiredo & Oliveira (2018), on a picture that is drawn here: a segmentation is displaced, dilated,
blurred and full of holes; the weights of the bilateral and the spatial kernel are overfitted by gradient descent through `CrfRnn`,
everything else is fixed; then the picture's own edges come back.

It shows that gradients reach the weights and that the model can follow visible edges. It does not show that a CRF helps a real network:
there is one picture, the weights are fitted to its truth and measured on it, and its surfaces differ in color.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import figures
import numpy as np
from fitting import History, overfit
from generated import NUM_LABELS, Case, LabelMap, distorted_logits, make_scene
from reporting import Scores, measure, parser, print_table

from crfrefine import CrfParameters, CrfRnn, refine

SPACING = (1.25, 1.0)  # mm between rows and between columns
# What one would guess for a picture this size; nobody searched for it.
START = CrfParameters().replace(
    **{
        "bilateral.weight": 1.0,
        "bilateral.theta_alpha": 20.0,
        "bilateral.theta_beta": 0.15,
        "spatial.weight": 1.0,
        "spatial.theta_gamma": 1.5,
    }
)


@dataclass(frozen=True)
class Outcome:
    """What happened: label maps and scores by name, in the order of the table."""

    case: Case
    label_maps: dict[str, LabelMap]
    scores: dict[str, Scores]
    learned: CrfParameters
    history: History


def run(seed: int = 0, *, quick: bool = False) -> Outcome:
    """Make the picture, learn the weights, measure."""
    grid_shape, num_steps = ((60, 88), 30) if quick else ((112, 176), 80)
    image, labels = make_scene(seed, grid_shape, SPACING)
    # On the smaller picture everything is smaller, the error too.
    logits = distorted_logits(seed, labels, SPACING, error_mm=5.0 * grid_shape[0] / 112, num_blobs=6)
    case = Case(image, labels, logits, SPACING)

    crf = CrfRnn(NUM_LABELS, 3, 2, START, compatibility="potts", learn=["weights"])
    history = overfit(crf, case, num_steps)
    learned = crf.to_parameters()

    label_maps = {"distorted": logits.argmax(0).astype(np.uint8)}
    for name, parameters in (("refined, first weights", START), ("refined, learned weights", learned)):
        label_maps[name] = refine(logits, image, spacing=SPACING, parameters=parameters).label_map
    # One pixel, the longer way.
    scores = {name: measure(label_map, labels, SPACING, tolerance_mm=max(SPACING)) for name, label_map in label_maps.items()}
    return Outcome(case, label_maps, scores, learned, history)


def draw(outcome: Outcome, path: Path) -> None:
    """Draw the picture, the truth, the distorted and refined segmentations before and after learning, and the learning curves."""
    figure = figures.new_figure(10.5, 5.2, "Two kernel weights learned on one picture")
    panels = figure.subplots(2, 3).ravel()
    picture = np.moveaxis(outcome.case.image, 0, -1) / 255
    figures.show(panels[0], picture, SPACING, "picture")
    dimmed = 0.6 * picture.mean(-1)
    for panel, (name, label_map) in zip(panels[1:5], {"truth": outcome.case.labels, **outcome.label_maps}.items(), strict=True):
        score = outcome.scores.get(name)
        numbers = f": Dice {score.dice:.3f}, boundary {score.boundary:.2f}" if score else ""
        figures.show(panel, dimmed, SPACING, name + numbers, label_map)
    panels[5].plot(outcome.history.loss, color=figures.INK, label="loss")
    panels[5].plot(outcome.history.bilateral_weight, color=figures.COLORS[0], label="bilateral weight")
    panels[5].plot(outcome.history.spatial_weight, color=figures.COLORS[1], label="spatial weight")
    figures.style(panels[5], "learning", "step", log=True)
    figures.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> Outcome:
    """Run, print, draw; with the command line's arguments, or others."""
    options = parser(__doc__).parse_args(arguments)
    outcome = run(options.seed, quick=options.quick)
    rows = [[name, f"{s.dice:.3f}", f"{s.boundary:.3f}", f"{s.islands:.0f}"] for name, s in outcome.scores.items()]
    print_table(["", "Dice", "boundary within 1 pixel", "islands"], rows)
    learned = outcome.learned
    print(f"weights: bilateral 1 -> {learned.bilateral[0].weight:.3g}, spatial 1 -> {learned.spatial.weight:.3g}")
    draw(outcome, options.output / "experiment_2d.png")
    return outcome


if __name__ == "__main__":
    main()
