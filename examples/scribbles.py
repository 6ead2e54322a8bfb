"""Learn to segment from scribbles.

Partial cross-entropy alone, with `crf_loss`, and with all labels, the same network and time for
each.

    python examples/scribbles.py [DATA] [--output DIR] [--folds K] [--fold N ...]
        [--steps N] [--quick]

DATA holds images/ labels/ scribbles/ and dataset.json, whose label "ignore" is the value of voxels
where nobody drew; without it, the folder acdc in $CRFREFINE_DATA. Each fold's networks are measured
on the hearts that the fold holds out: 3-D Dice of each structure against all labels. The labels of
training cases are seen only by the network that is trained on all of them.

Every training leaves a file in the output; the same command goes on after the last one that is
complete. Folds may be trained by several processes (`--fold`); tables are of the folds that a
command names. --quick: a minute on generated hearts, to see that all runs; its 40 steps end before
the warm-up of the CRF pays, so its Dice says nothing of the method.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(
    str(Path(__file__).resolve().parents[1] / "benchmarks")
)  # study_network.py: the network of the study, and its patches

from scribble_cases import ScribbleData, generate, read_data
from scribble_training import LABELS, SCRIBBLES, WITH_CRF, Recipe, train
from study_network import Schedule, SliceUNet, predict

from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.errors import ConfigError, CrfRefineError, InputError
from crfrefine.io.json import read_json
from crfrefine.io.writing import write_small_file
from crfrefine.metrics.overlap import measure_case
from crfrefine.statistics.comparison import MEAN, Measurement, ResultTable
from crfrefine.statistics.paired import holm
from crfrefine.train.plan import make_folds

WAYS = (SCRIBBLES, WITH_CRF, LABELS)
FULL = Schedule(num_steps=600)
QUICK = Schedule(num_steps=40, batch=4, patch=48, width=6, rate=1e-2)
QUICK_IS = (
    "--quick shows that all runs, and what is measured. A network of so few steps has\n"
    "not learned to segment, and `crf_loss` only smooths what it does not know yet: these Dice\n"
    "say nothing of the method. docs/guide/scribbles.md has those of whole trainings."
)
SEED = 0

Scores = dict[str, dict[str, float]]
"""Dice by case and structure."""


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns, the first one left-aligned."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        print(
            "  ".join(
                [
                    row[0].ljust(widths[0]),
                    *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
                ]
            ).rstrip()
        )


def run(
    data: ScribbleData,
    output: Path,
    schedule: Schedule,
    recipe: Recipe,
    num_folds: int | None,
    wanted: Sequence[int] | None = None,
) -> dict[str, Scores]:
    """Train the wanted folds, by default all.

    Return the Dice of each way on the cases that these folds hold out.
    """
    folds = make_folds(len(data.labeled), num_folds, SEED)
    wrong = sorted(set(wanted or ()) - set(range(1, len(folds) + 1)))
    if wrong:
        raise ConfigError(f"--fold: there is no fold {wrong[0]}; expected 1 to {len(folds)}")
    torch.set_num_threads(
        1
    )  # The sums of several threads are in another order, and so are the roundings.
    results: dict[str, Scores] = {way: {} for way in WAYS}
    for number, split in enumerate(folds, start=1):
        if wanted and number not in wanted:
            continue
        data.require_all_labels(split.seen, f"fold {number}")
        for way in WAYS:
            settings = {
                "way": way,
                **asdict(schedule),
                **(asdict(recipe) if way == WITH_CRF else {}),
                "seed": SEED + number,
            }
            settings["cases"] = [data.labeled[index].name for index in split.seen]
            settings["voxels"] = _digest(
                data, (*split.seen, *split.held_out), with_scribbles=way != LABELS
            )
            results[way] |= _training(
                data,
                split.seen,
                split.held_out,
                way,
                schedule,
                recipe,
                settings,
                output / f"fold_{number}",
            )
    return results


def _training(
    data: ScribbleData,
    seen: Sequence[int],
    held_out: Sequence[int],
    way: str,
    schedule: Schedule,
    recipe: Recipe,
    settings: dict[str, Any],
    folder: Path,
) -> Scores:
    """Train once and measure, unless the file of an earlier run has the result."""
    folder.mkdir(parents=True, exist_ok=True)
    name = way.replace(" ", "_")
    file = folder / f"{name}.json"
    if file.exists():
        known = read_json(file)
        if known["settings"] == settings:
            print(f"{file} is there already")
            return known["dice"]
        raise InputError(
            f"{file}: made with other settings or cases; remove it, or choose another --output"
        )
    print(f"{folder.name}: {way}, {len(seen)} cases", flush=True)
    stacks = [(data.labeled if way == LABELS else data.scribbled)[index] for index in seen]
    network = train(
        way, stacks, data.num_labels, schedule, recipe, settings["seed"], folder / f"{name}.pt"
    )
    dice = {data.labeled[index].name: _dice(network, data, index) for index in held_out}
    write_small_file(
        file, (json.dumps({"settings": settings, "dice": dice}, indent=1) + "\n").encode()
    )
    return dice


def _digest(data: ScribbleData, indices: Sequence[int], *, with_scribbles: bool) -> str:
    """Return a checksum of what a training and its measurement read.

    Strokes that were drawn since make another result.
    """
    digest = hashlib.sha256()
    for index in indices:
        arrays = [
            data.labeled[index].image,
            data.labeled[index].labels,
            *([data.scribbled[index].labels] if with_scribbles else []),
        ]
        for array in arrays:
            digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:16]


def _dice(network: SliceUNet, data: ScribbleData, index: int) -> dict[str, float]:
    """Return the 3-D Dice of each structure of a case.

    1 where network and truth agree that there is none.
    """
    stack = data.labeled[index]
    found = argmax_labels(predict(network, stack))
    regions = {name: (label,) for name, label in data.structures.items()}
    spacing = (data.slice_spacing[index], *stack.spacing)
    values = measure_case(found, stack.labels, regions, spacing, metrics=("dice",))
    return {name: 1.0 if np.isnan(row["dice"]) else row["dice"] for name, row in values.items()}


def report(results: dict[str, Scores], structures: Sequence[str]) -> ResultTable:
    """Print mean Dice of each way, and what `crf_loss` adds.

    Paired Wilcoxon tests, with Holm's correction.
    """
    table = ResultTable(
        Measurement(case, structure, "dice", value, way)
        for way, scores in results.items()
        for case, row in scores.items()
        for structure, value in row.items()
    )
    regions = [*structures, MEAN]
    means = {
        way: [float(table.values(way, region, "dice").mean()) for region in regions] for way in WAYS
    }
    print_table(
        [f"mean Dice of {len(table.cases)} cases", *structures, "mean"],
        [[way, *map("{:.3f}".format, means[way])] for way in WAYS],
    )
    pairs = [(WITH_CRF, SCRIBBLES, region) for region in regions] + [
        (LABELS, WITH_CRF, region) for region in regions
    ]
    found = [table.compare(way, other, region, "dice") for way, other, region in pairs]
    rows = []
    for (way, other, region), one, p_value in zip(
        pairs, found, holm([one.p_value for one in found]), strict=True
    ):
        low, high = one.interval
        change = f"{100 * one.mean_difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        rows.append(
            [
                f"{way} against {other}, {region}",
                change,
                f"{one.wins}/{one.ties}/{one.losses}",
                f"{p_value:.2g}",
            ]
        )
    print()
    print_table(["points of Dice (95 % interval)", "mean", "better/same/worse", "p (Holm)"], rows)
    gap = means[LABELS][-1] - means[SCRIBBLES][-1]
    if gap > 0:
        share = 100 * (means[WITH_CRF][-1] - means[SCRIBBLES][-1]) / gap
        print(
            f"\nshare of the way from scribbles to all labels: {share:.0f} % of {100 * gap:.1f} "
            "points"
        )
    return table


def main(arguments: Sequence[str] | None = None) -> ResultTable:
    """Run and print; with the command line's arguments, or others."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "data", nargs="?", type=Path, metavar="DATA", help="default: acdc in $CRFREFINE_DATA"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("scribbles"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--folds", type=int, metavar="K", help="default: 5")
    parser.add_argument("--fold", type=int, nargs="+", metavar="N", help="train only these, from 1")
    parser.add_argument(
        "--steps", type=int, metavar="N", help=f"of each training; default: {FULL.num_steps}"
    )
    for name, value in asdict(Recipe()).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=float,
            default=value,
            metavar="X",
            help="of crf_loss; default: %(default)s",
        )
    parser.add_argument("--quick", action="store_true", help="a minute, to see that all runs")
    options = parser.parse_args(arguments)
    recipe = Recipe(**{name: getattr(options, name) for name in asdict(Recipe())})
    schedule = QUICK if options.quick else FULL
    if options.steps is not None:
        if options.steps < 1:
            raise ConfigError(f"--steps: expected 1 or more, got {options.steps}")
        schedule = Schedule(**asdict(schedule) | {"num_steps": options.steps})
    if options.quick:
        folder = generate(options.output / "generated", 6, SEED)
    elif options.data is None and "CRFREFINE_DATA" not in os.environ:
        raise InputError("no DATA, and CRFREFINE_DATA is not set; name a folder, or try --quick")
    else:
        folder = options.data or Path(os.environ["CRFREFINE_DATA"]) / "acdc"
    data = read_data(folder)
    num_folds = options.folds or (2 if options.quick else None)
    results = run(data, options.output, schedule, recipe, num_folds, options.fold)
    table = report(results, list(data.structures))
    if options.quick:
        print(f"\n{QUICK_IS}")
    return table


if __name__ == "__main__":
    try:
        main()
    except CrfRefineError as error:
        sys.exit(f"scribbles: error: {error}")
