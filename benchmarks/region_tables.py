"""Plain labels against overlapping regions: what the CRF does to Dice on the same cases, refined either way.

Usage: region_tables.py DATA [--logits NAME ...] [--parameters PRESET ...] [--write FOLDER]

The regions are those of BraTS, and their channels are the network's softmax summed over each region's labels: no network was trained on
them. DATA holds images/ labels/ and folders of logits, and may hold masks/. `--write` also writes the channels, for `train-crf`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from environment import source_hash
from markdown_table import markdown_table
from numpy.typing import NDArray

import crfrefine
from crfrefine import RegionScheme
from crfrefine.arrays.probabilities import softmax
from crfrefine.arrays.region_channels import take_log_odds
from crfrefine.cases.case import Case, discover_cases, load_case
from crfrefine.io import write_channels
from crfrefine.metrics.counts import OverlapCounts, dice

SCHEME = RegionScheme.of({"whole": [1, 2, 3, 4], "core": [1, 3, 4], "enhancing": 4}, class_order=(2, 1, 4))


def region_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """(R, *grid), the softmax summed over each region's labels."""
    marginals = softmax(logits)
    return np.stack([marginals[list(labels)].sum(axis=0) for labels in SCHEME.labels])


def dice_of_regions(found: NDArray[Any], truth: NDArray[Any]) -> list[float]:
    """Dice of each region."""
    return [dice(OverlapCounts.of_masks(np.isin(found, labels), np.isin(truth, labels))) for labels in SCHEME.labels]


def measure(case: Case, parameters: str, *, as_regions: bool, threads: int) -> tuple[list[float], list[float], float]:
    """Dice of each region before and after, and the processor's seconds."""
    logits, regions = case.logits, None
    if as_regions:
        logits, regions = np.ascontiguousarray(region_probabilities(case.logits)), SCHEME
        take_log_odds(logits)
    started = time.process_time()
    result = crfrefine.refine(
        logits,
        case.image,
        spacing=case.spacing,
        parameters=parameters,
        mask=case.mask,
        input_type="logits",
        regions=regions,
        threads=threads,
    )
    seconds = time.process_time() - started
    return dice_of_regions(result.network_label_map, case.labels), dice_of_regions(result.label_map, case.labels), seconds


def write_regions(cases: list[Case], folder: Path) -> None:
    """Write the channels of all cases, with the dataset.json that declares them."""
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases:
        write_channels(folder / f"{case.case_id}.nii.gz", region_probabilities(case.logits), case.like, kind="probabilities")
    described = SCHEME.to_dict()
    described["labels"] = {"background": 0, **described["labels"]}
    (folder / "dataset.json").write_text(json.dumps(described))


def main() -> None:
    parser = argparse.ArgumentParser(description="Dice of regions: labels refined together, and regions refined each on its own.")
    parser.add_argument("data", type=Path, help="folder with images/ labels/ and logits/; masks/ is used if it is there")
    parser.add_argument("--logits", nargs="+", default=["logits"], metavar="NAME", help="folders of logits in it")
    parser.add_argument("--parameters", nargs="+", default=["default"], metavar="PRESET", help="as for `infer -c`")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="write the channels of regions to FOLDER/NAME")
    options = parser.parse_args()
    masks = options.data / "masks"
    rows = []
    for name in options.logits:
        found = discover_cases(options.data / "images", options.data / name, masks if masks.is_dir() else None, options.data / "labels")
        cases = [load_case(files, with_labels=True) for files in found]
        if options.write:
            write_regions(cases, options.write / name)
        for parameters in options.parameters:
            for as_regions in (False, True):
                measured = [measure(case, parameters, as_regions=as_regions, threads=options.threads) for case in cases]
                before, after = (np.nanmean([result[side] for result in measured], axis=0) for side in (0, 1))
                seconds = float(np.mean([result[2] for result in measured]))
                kind = "regions" if as_regions else "labels"
                shown = [f"{old:.4f} → {new:.4f} ({100 * (new - old):+.1f})" for old, new in zip(before, after, strict=True)]
                rows.append([name, parameters, kind, *shown, f"{seconds:.1f}"])
                sys.stderr.write(f"{rows[-1]}\n")
    header = ["logits", "parameters", "refined as", *SCHEME.names, "CPU s per case"]
    sys.stdout.write(f"{markdown_table(header, rows)}\n*crfrefine {crfrefine.__version__}, sources {source_hash()}.*\n")


if __name__ == "__main__":
    main()
