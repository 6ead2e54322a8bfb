"""Whether untrained presets do harm: the change of mean Dice of each labeled case, on the half that presets are chosen on and on the other.

Usage: preset_harm.py DATA [--logits NAME ...] [--parameters PRESET|FILE ...] [--region NAME=1,2,3 ...]
                      [--step N] [--found SHARE] [--json FILE]

DATA holds images/ labels/ and folders of logits, and may hold masks/; logits on another grid are interpolated. Cases count from 0 in the
order of their names: the even ones are to choose values on, the odd ones to report. A case's score is the mean over labels, or regions.

--found 0.7 simulates a network that finds too little: in each case a number is added to the logit of background, as large as leaves 70 %
of the voxels of the reference. A case that finds less already stays as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from dice_tables import EQUAL, as_region, dice
from environment import source_hash
from markdown_table import markdown_table
from numpy.typing import NDArray

import crfrefine
from crfrefine.cases.case import Case, discover_cases, load_case
from crfrefine.cases.reading_options import ReadingOptions

HALVES = ("even", "odd")


def find_less(case: Case, share: float) -> NDArray[np.float32]:
    """The case's logits, of which background is larger so that the foreground has `share` of the reference's voxels at most."""
    assert case.labels is not None
    logits = np.array(case.logits)
    margin = logits[1:].max(axis=0) - logits[0]
    inside = margin.ravel() if case.mask is None else margin[case.mask]
    wanted = int(share * np.count_nonzero(case.labels))
    logits[0] += max(float(np.partition(inside, -wanted)[-wanted]), 0.0)
    return logits


def mean_dice(found: NDArray[Any], truth: NDArray[Any], parts: Sequence[tuple[int, ...]]) -> float:
    """Over the labels or regions that the reference has."""
    scores = [dice(found, truth, labels) for labels in parts]
    present = [score for score in scores if not math.isnan(score)]
    return sum(present) / len(present)


def measure(data: Path, logits: str, options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Per parameters and case: its number, Dice before and after, and the foreground's voxels after over those before."""
    masks = data / "masks"
    cases = discover_cases(data / "images", data / logits, masks if masks.is_dir() else None, labels=data / "labels")
    chosen = {name: crfrefine.CrfParameters.load(name) for name in options.parameters}
    result: dict[str, dict[str, list[float]]] = {name: {} for name in chosen}
    for number, files in list(enumerate(cases))[:: options.step]:
        case = load_case(files, ReadingOptions(resample=True), threads=options.threads, with_labels=True)
        assert case.labels is not None
        parts = [labels for _, labels in options.region] or [(label,) for label in range(1, case.num_labels)]
        values = case.logits if options.found is None else find_less(case, options.found)
        settings: dict[str, Any] = {"spacing": case.spacing, "mask": case.mask, "input_type": "logits", "threads": options.threads}
        for name, parameters in chosen.items():
            refined = crfrefine.refine(values, case.image, parameters=parameters, **settings)
            before, after = (mean_dice(labels, case.labels, parts) for labels in (refined.network_label_map, refined.label_map))
            size = np.count_nonzero(refined.label_map) / max(np.count_nonzero(refined.network_label_map), 1)
            result[name][files.case_id] = [number, before, after, size]
        sys.stderr.write(f"{data.name}/{logits}: {files.case_id}\n")
    return result


def rows_of(logits: str, name: str, cases: dict[str, list[float]]) -> list[list[str]]:
    """One row per half."""
    rows = []
    for parity, half in enumerate(HALVES):
        values = np.array([scores for number, *scores in cases.values() if number % 2 == parity])
        if len(values) == 0:
            continue
        change = 100.0 * (values[:, 1] - values[:, 0])
        counts = [str(int(count)) for count in ((change > 100 * EQUAL).sum(), (change < -100 * EQUAL).sum(), (change < -1.0).sum())]
        numbers = [f"{values[:, 0].mean():.4f}", f"{change.mean():+.2f}", f"{change.min():+.2f}"]
        rows.append([logits, Path(name).stem, half, str(len(values)), *numbers, *counts, f"{values[:, 2].mean():.2f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Whether untrained presets do harm, on labeled cases.")
    parser.add_argument("data", type=Path, help="folder with images/ labels/ and logits/; masks/ is used if it is there")
    parser.add_argument("--logits", nargs="+", default=["logits"], metavar="NAME", help="folders of logits in it")
    parser.add_argument("--parameters", nargs="+", default=["default"], metavar="PRESET|FILE", help="as for `infer -c`")
    parser.add_argument("--region", nargs="+", type=as_region, default=[], metavar="NAME=1,2,3", help="in place of the labels")
    parser.add_argument("--step", type=int, default=1, metavar="N", help="every N-th case only")
    parser.add_argument("--found", type=float, metavar="SHARE", help="simulate that this share of the reference's voxels is found")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the scores of every case")
    options = parser.parse_args()
    results = {logits: measure(options.data, logits, options) for logits in options.logits}
    rows = [row for logits, found in results.items() for name, cases in found.items() for row in rows_of(logits, name, cases)]
    header = [
        "logits",
        "parameters",
        "half",
        "cases",
        "Dice before",
        "change, points",
        "worst",
        "better",
        "worse",
        "worse by over 1",
        "size",
    ]
    simulated = "" if options.found is None else f", {options.found:g} found"
    sys.stdout.write(f"### {options.data.name}{simulated}\n\n{markdown_table(header, rows)}\n*sources {source_hash()}*\n")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
