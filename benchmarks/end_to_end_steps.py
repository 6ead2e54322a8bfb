"""Processor time and memory of a training step with the CRF and without, on a hippocampus and the network of the study.

Usage: end_to_end_steps.py [FOLDER] [--rounds N] [--document FILE]
Default: hippocampus of $CRFREFINE_DATA, and its table into docs/reference/end-to-end.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import environment
import numpy as np
import torch
from end_to_end_cases import as_seen, read_case
from end_to_end_network import TRAINING_ITERATIONS, Segmenter, VolumeUNet, make_crf
from end_to_end_training import BATCH, loss_of
from markdown_table import markdown_table
from report import provenance, write_between_markers
from study_end_to_end import DEFAULT, DOCUMENT
from workers.measure import Meter

from crfrefine.cases.discovery import discover_cases

WITHOUT, FROZEN, ALL = "network alone", "with the CRF, bandwidths frozen", "with the CRF, everything learned"


def measure(folder: Path, rounds: int) -> tuple[dict[str, dict[str, float]], tuple[int, ...]]:
    """Return seconds of processor time and peak MiB by kind of step, the best of several that take turns; and the grid's shape."""
    torch.set_num_threads(1)
    files = next(case for case in discover_cases(folder / "images", None, None, folder / "labels") if case.labels is not None)
    case = read_case(files)
    network = VolumeUNet(len(case.image), int(case.labels.max()) + 1, 8, (True,) * 3).to(memory_format=torch.channels_last_3d)
    box = tuple(slice(0, n // stride * stride) for n, stride in zip(case.labels.shape, network.strides, strict=True))
    image, labels = torch.from_numpy(np.stack([case.image[:, *box]] * BATCH)), torch.from_numpy(np.stack([case.labels[box]] * BATCH))
    crfs = [make_crf(int(case.labels.max()) + 1, len(case.image)) for _ in range(2)]
    crfs[0].freeze("theta")
    kinds = {WITHOUT: Segmenter(network), FROZEN: Segmenter(network, crfs[0]), ALL: Segmenter(network, crfs[1])}
    runs: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for _ in range(rounds + 1):  # the first round warms up
        for kind, segmenter in kinds.items():
            segmenter.zero_grad(set_to_none=True)
            with Meter() as meter:
                loss_of(segmenter(as_seen(image), image, case.spacing), labels).backward()
            runs[kind].append((meter.processor_seconds, meter.peak_mib))
    best = {kind: np.min(found[1:], axis=0).tolist() for kind, found in runs.items()}
    return {kind: {"seconds": seconds, "peak_mib": peak} for kind, (seconds, peak) in best.items()}, tuple(labels.shape[1:])


def table(figures: dict[str, dict[str, float]], shape: tuple[int, ...], head: dict[str, Any]) -> str:
    alone = figures[WITHOUT]
    rows = []
    for kind, found in figures.items():
        ratios = [f"{found[key] / alone[key]:.2f}×" for key in ("seconds", "peak_mib")]
        rows.append([kind, f"{found['seconds']:.3f} s", ratios[0], f"{found['peak_mib']:.0f} MiB", ratios[1]])
    header = [
        f"{BATCH} × {' × '.join(map(str, shape))} voxels, {TRAINING_ITERATIONS} mean-field steps",
        "processor time",
        "",
        "peak memory",
        "",
    ]
    return markdown_table(header, rows) + "\n" + provenance({"environment": head})


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step with the CRF and without.")
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help=f"default: {DEFAULT} of $CRFREFINE_DATA")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="steps of each kind, which take turns; the best counts")
    parser.add_argument("--document", type=Path, metavar="FILE", help="gets the table; default, without FOLDER: the page above")
    options = parser.parse_args()
    if options.folder is None and "CRFREFINE_DATA" not in os.environ:
        raise SystemExit(f"name a folder that holds images/ labels/, or set CRFREFINE_DATA to the one above {DEFAULT}/")
    text = table(*measure(options.folder or Path(os.environ["CRFREFINE_DATA"]) / DEFAULT, options.rounds), environment.describe("torch"))
    sys.stdout.write(text)
    document = options.document or (DOCUMENT if options.folder is None else None)
    if document is not None:
        write_between_markers(document, "steps", text)


if __name__ == "__main__":
    main()
