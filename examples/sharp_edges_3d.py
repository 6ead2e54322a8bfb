"""Sharp edges in a blurred 3-D volume of two modalities by learning the bandwidths too, from bad ones. A minute or two on one core.

    python examples/sharp_edges_3d.py [--output DIR] [--quick] [--seed N]

Monteiro, Figueiredo & Oliveira (2018) could overfit two kernel weights on a color picture (sharp_edges_2d.py) and not on a 3-D volume, and
took blurred edges for the reason, which make the result depend on the bandwidths. Here are such a volume, generated, with unequal voxels
and a second modality that is noisy and shaded, and bandwidths that do not fit it, once far too wide and once far too narrow. From each
start: only the weights are learned; weights, bandwidths and temperature are learned; and, for comparison, only the weights with the
bandwidths that were learned before. The parameters are then used on a second volume that they were not learned on.

It shows that gradients reach the bandwidths, and that these are what was missing on such a volume. It does not show that a CRF helps a real
network on real images: intensities tell the labels apart here, nearly everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import figures
import numpy as np
from fitting import History, overfit
from generated import NUM_LABELS, Case, distorted_logits, make_volume
from reporting import Scores, measure, parser, print_table, values_of

from crfrefine import CrfParameters, CrfRnn, refine

SPACING = (1.0, 1.0, 2.5)  # mm
WEIGHTS, BANDWIDTHS, REWEIGHTED = "weights learned", "bandwidths too", "weights, learned bandwidths"
_TEMPLATE = CrfParameters().replace(**{"bilateral.weight": 1.0, "spatial.weight": 1.0})
# mm, normalized intensity, mm; edges are blurred over about 1 mm, and intensities of the labels differ by a third.
STARTS = {
    "wide": _TEMPLATE.replace(**{"bilateral.theta_alpha": 15.0, "bilateral.theta_beta": 1.0, "spatial.theta_gamma": 4.0}),
    "narrow": _TEMPLATE.replace(**{"bilateral.theta_alpha": 0.7, "bilateral.theta_beta": 0.03, "spatial.theta_gamma": 0.4}),
}


@dataclass(frozen=True)
class Fit:
    """One way of learning.

    Attributes:
        parameters: the result.
        history: course of the learning; None if nothing was learned.
        scores: on the volume that it was learned on.
        other_scores: on another one.
    """

    parameters: CrfParameters
    history: History | None
    scores: Scores
    other_scores: Scores


@dataclass(frozen=True)
class Outcome:
    """Both volumes, the scores of their distorted segmentations, and each way of learning by start and name."""

    case: Case
    other: Case
    distorted: tuple[Scores, Scores]
    fits: dict[tuple[str, str], Fit]


def make_case(seed: int, *, quick: bool) -> Case:
    """A volume and a segmentation of it gone wrong."""
    grid_shape, error_mm = ((28, 24, 12), 2.0) if quick else ((48, 40, 24), 3.0)
    image, labels = make_volume(seed, grid_shape, SPACING)
    return Case(image, labels, distorted_logits(seed + 500, labels, SPACING, error_mm=error_mm, num_blobs=5), SPACING)


def label_map_of(case: Case, parameters: CrfParameters) -> np.ndarray:
    """Refine a volume without PyTorch, as `crfrefine infer` would."""
    return refine(case.logits, case.image, spacing=case.spacing, parameters=parameters).label_map


def run(seed: int = 0, *, quick: bool = False, starts: Mapping[str, CrfParameters] = STARTS) -> Outcome:
    """Make two volumes, learn on the first one in each way from each start, measure on both."""
    case, other = make_case(seed, quick=quick), make_case(seed + 1000, quick=quick)
    num_steps = 60 if quick else 100

    def score(one: Case, label_map: np.ndarray) -> Scores:
        return measure(label_map, one.labels, one.spacing, tolerance_mm=1.0)

    def fit(start: CrfParameters, learn: tuple[str, ...]) -> Fit:
        crf = CrfRnn(NUM_LABELS, 2, 3, start, compatibility="potts", learn=learn)
        history = overfit(crf, case, num_steps) if learn else None
        parameters = crf.to_parameters()
        return Fit(parameters, history, *(score(one, label_map_of(one, parameters)) for one in (case, other)))

    fits = {}
    for name, start in starts.items():
        fits[name, "start"] = fit(start, ())
        fits[name, WEIGHTS] = fit(start, ("weights",))
        fits[name, BANDWIDTHS] = learned = fit(start, ("weights", "theta", "temperature"))
        thetas = {"bilateral.theta_alpha": learned.parameters.bilateral[0].theta_alpha}
        thetas |= {"bilateral.theta_beta": learned.parameters.bilateral[0].theta_beta}
        thetas |= {"spatial.theta_gamma": learned.parameters.spatial.theta_gamma}
        fits[name, REWEIGHTED] = fit(start.replace(**thetas), ("weights",))
    distorted = tuple(score(one, one.logits.argmax(0).astype(np.uint8)) for one in (case, other))
    return Outcome(case, other, distorted, fits)


def draw(outcome: Outcome, path: Path) -> None:
    """Slices across two axes, with only the weights learned and with the bandwidths too; below, how these were learned from each start."""
    figure = figures.new_figure(11.0, 8.2, "What learning the bandwidths adds, on a 3-D volume of two modalities")
    rows = figure.subfigures(2, 1, height_ratios=(1.55, 1))
    for part in rows:
        part.set_facecolor(figures.PAPER)
    case = outcome.case
    start = next(name for name, _ in outcome.fits)
    label_maps = {
        "truth": case.labels,
        "distorted": case.logits.argmax(0),
        WEIGHTS: label_map_of(case, outcome.fits[start, WEIGHTS].parameters),
        BANDWIDTHS: label_map_of(case, outcome.fits[start, BANDWIDTHS].parameters),
    }
    middle = [round(float(where.mean())) for where in np.nonzero(case.labels)]
    modalities = [figures.gray(values) for values in case.image]
    # Across the last axis; and along it, with its thick slices upright.
    cuts = (
        (lambda volume: volume[:, :, middle[2]], (SPACING[0], SPACING[1])),
        (lambda volume: volume[:, middle[1]].T, (SPACING[2], SPACING[0])),
    )
    for row, (panels, (cut, spacing)) in enumerate(zip(rows[0].subplots(2, 6, height_ratios=(48, 60)), cuts, strict=True)):
        for panel, values, title in zip(panels, modalities, ("modality 1", "modality 2"), strict=False):
            figures.show(panel, cut(values), spacing, "" if row else title)
        for panel, (title, label_map) in zip(panels[2:], label_maps.items(), strict=True):
            figures.show(panel, 0.7 * cut(modalities[0]), spacing, "" if row else title, cut(label_map))

    loss, alpha, beta, weight = rows[1].subplots(1, 4)
    for (name, way), fit in outcome.fits.items():
        line = "-" if name == start else "--"
        history = fit.history
        if history is None or way == REWEIGHTED:
            continue
        color = figures.FAINT if way == WEIGHTS else figures.INK
        loss.plot(history.loss, line, color=color, label=f"{name}, {way}")
        if way == BANDWIDTHS:
            alpha.plot(history.theta_alpha, line, color=figures.COLORS[0], label=f"{name}: alpha")
            alpha.plot(history.theta_gamma, line, color=figures.COLORS[1], label=f"{name}: gamma")
            for modality, values in enumerate(zip(*history.theta_beta, strict=True)):
                beta.plot(values, line, color=figures.COLORS[2 + modality], label=f"{name}: modality {modality + 1}")
            weight.plot(history.bilateral_weight, line, color=figures.COLORS[0], label=f"{name}: bilateral")
            weight.plot(history.spatial_weight, line, color=figures.COLORS[1], label=f"{name}: spatial")
    figures.style(loss, "cross-entropy, nats", "step", log=True)
    figures.style(alpha, "theta_alpha and theta_gamma, mm", "step", log=True)
    figures.style(beta, "theta_beta, normalized intensity", "step", log=True)
    figures.style(weight, "weights", "step")
    figures.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> Outcome:
    """Run, print, draw; with the command line's arguments, or others."""
    options = parser(__doc__).parse_args(arguments)
    outcome = run(options.seed, quick=options.quick)

    def cells(scores: Scores, other: Scores) -> list[str]:
        return [f"{scores.dice:.3f}", f"{scores.boundary:.3f}", f"{other.dice:.3f}", f"{other.boundary:.3f}"]

    rows = [["distorted", *cells(*outcome.distorted), *"     "]]
    for (start, way), fit in outcome.fits.items():
        values = values_of(fit.parameters)
        rows.append([f"{start}: {way}", *cells(fit.scores, fit.other_scores), *values.values()])
    print("boundary: within 1 mm; other: a volume that nothing was learned on")
    print_table(["", "Dice", "boundary", "other Dice", "boundary", *values], rows)
    draw(outcome, options.output / "experiment_3d.png")
    return outcome


if __name__ == "__main__":
    main()
