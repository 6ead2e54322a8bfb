"""The files of `crfrefine train-crf --unlabeled`: the parameters, the report as JSON, the picture of the scores."""

from __future__ import annotations

import itertools
import json
import textwrap
from datetime import UTC, datetime
from typing import Any

import crfrefine
from crfrefine.base.text import counted
from crfrefine.io.atomic import write_small_file
from crfrefine.io.json import without_nonfinite
from crfrefine.train import synthetic, unlabeled
from crfrefine.train.curves import png_of
from crfrefine.train.options import UnlabeledOptions
from crfrefine.train.unlabeled import Choice

SCHEMA = 1


def write_choice(choice: Choice, options: UnlabeledOptions) -> list[str]:
    """Write the picture, the report and, last, the parameters, each whole or not at all; return notes."""
    notes = []
    try:
        drawn = draw_scores(choice)
    except ImportError:
        notes.append("no picture of the scores: it needs matplotlib (pip install matplotlib)")
        options.curves.unlink(missing_ok=True)  # One of an earlier run would be taken for this one's.
    else:
        write_small_file(options.curves, drawn)
    content = json.dumps(without_nonfinite(make_report(choice, options)), indent=2, allow_nan=False) + "\n"
    write_small_file(options.report, content.encode())
    head = [
        f"Written by crfrefine {crfrefine.__version__}: chosen without labels, by synthetic cases made from the given ones.",
        choice.describe(),
        f"Cases: {', '.join(choice.measured)}.",
    ]
    comment = "\n".join(line for text in head for line in textwrap.wrap(text, 118))
    write_small_file(options.output, choice.chosen.parameters.to_toml(comment).encode())
    return notes


def make_report(choice: Choice, options: UnlabeledOptions) -> dict[str, Any]:
    """Return the content of the report, as JSON has it."""
    return {
        "schema": SCHEMA,
        "version": crfrefine.__version__,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": {
            "images": str(options.images),
            "logits": str(options.logits),
            "masks": None if options.masks is None else str(options.masks),
            "input_type": options.input_type,
            "resample": options.resample,
            "seed": options.seed,
        },
        "rule": {
            "noise_sigmas_voxels": synthetic.NOISE_SIGMAS,
            "noise_levels": unlabeled.NOISE_LEVELS,
            "least_voxels": synthetic.MIN_VOXELS,
            "num_seeds": choice.table.shape[1],
            "least_gain": unlabeled.MIN_GAIN,
            "least_agreement": unlabeled.MIN_AGREEMENT,
        },
        "choice": choice.to_dict(),
        "parameters": choice.chosen.parameters.to_dict(),
        "expected_dice": dict(zip(choice.case_ids, choice.expected, strict=True)),
        "agreement_of_truths": dict(zip(choice.case_ids, choice.agreements, strict=True)),
        "halves": [{"chosen": choice.candidates[number].name, "score_on_the_other": score} for number, score in choice.halves],
        "gains_by_seed": choice.seeds,
        "candidates": [{"name": each.name, "parameters": each.parameters.to_dict()} for each in choice.candidates],
        "gains": choice.gains,
        # Cases, seeds, kinds (truth and level of noise), the network and the candidates.
        "dice": choice.table.tolist(),
    }


def draw_scores(choice: Choice) -> bytes:
    """Draw what each candidate gains over `default` on synthetic cases, over theta_alpha, and return the picture as PNG.

    Raises:
        ImportError: there is no matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 5.0), dpi=110)
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float]]] = {}
    sets = itertools.product(unlabeled.THETA_ALPHA_VOXELS, unlabeled.WEIGHTS, unlabeled.VOLUME_WEIGHTS)
    for (alpha, weight, volume), gain in zip(sets, choice.gains[1:], strict=bool(choice.gains)):
        lines.setdefault(f"weight {weight:g}, volume.weight {volume:g}", []).append((alpha, 100.0 * gain))
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=name)
    axes.axhline(0.0, color="#000000", linewidth=1.0, linestyle="dashed", label=unlabeled.DEFAULT)
    axes.set_xscale("log")
    axes.set_xticks(unlabeled.THETA_ALPHA_VOXELS, [f"{value:g}" for value in unlabeled.THETA_ALPHA_VOXELS])
    axes.minorticks_off()
    axes.set_xlabel("theta_alpha, voxels")
    axes.set_ylabel("points of Dice above default")
    axes.set_title(f"synthetic cases made from {counted(len(choice.measured), 'case')}", fontsize=11)
    axes.grid(color="#E0E0E0", linewidth=0.6)
    axes.legend(fontsize=7, frameon=False)
    return png_of(figure, "tight")
