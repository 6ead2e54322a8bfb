"""What the command does to Dice on labeled cases: folder runs of `crfrefine infer` against the argmax of the network's output.

Usage: dice_tables.py DATA [--logits NAME ...] [--parameters PRESET|FILE ...] [--region NAME=1,2,3 ...] [--json FILE] [--markdown FILE]

DATA holds images/ labels/ and folders of logits, and may hold masks/. Parameters that were picked on the same cases show that nothing
breaks, and no more.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from environment import source_hash
from markdown_table import markdown_table
from numpy.typing import NDArray

import crfrefine
from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.cases.case import discover_cases, load_case
from crfrefine.io import read_labels

# Cases of which one Dice score is this far above the other are better, not equal up to rounding.
EQUAL = 1e-9


def dice(found: NDArray[Any], truth: NDArray[Any], labels: tuple[int, ...]) -> float:
    """Of the union of some labels: 2 |A and B| / (|A| + |B|); NaN when the truth lacks them: such a case does not count."""
    a, b = np.isin(found, labels), np.isin(truth, labels)
    return 2 * int((a & b).sum()) / int(a.sum() + b.sum()) if b.any() else math.nan


def refine_folder(data: Path, logits: str, parameters: str, output: Path, threads: int) -> dict[str, Any]:
    """Run the command on all cases; its summary."""
    summary = output / "summary.json"
    command = [
        sys.executable,
        "-P",
        "-m",
        "crfrefine",
        "infer",
        "--quiet",
        "-i",
        data / "images",
        "-p",
        data / logits,
        "-o",
        output / "refined",
    ]
    command += ["-c", parameters, "--threads", str(threads), "--summary", summary]
    if (data / "masks").is_dir():
        command += ["-m", data / "masks"]
    subprocess.run(command, check=True)
    return dict(json.loads(summary.read_text()))


def score(data: Path, logits: str, parameters: list[str], regions: Mapping[str, tuple[int, ...]], threads: int) -> list[dict[str, Any]]:
    """One record for each of the parameters: Dice scores of every case, label and region, before and after."""
    cases = discover_cases(data / "images", data / logits, labels=data / "labels")
    before: dict[str, dict[str, float]] = {}
    parts: dict[str, tuple[int, ...]] = {}
    for files in cases:
        case = load_case(files, threads=threads, with_labels=True)
        assert case.labels is not None
        parts = {str(label): (label,) for label in range(1, case.num_labels)} | dict(regions)
        plain = np.asarray(case.channel_labels or range(case.num_labels))[argmax_labels(case.logits)]
        before[files.case_id] = {name: dice(plain, case.labels, labels) for name, labels in parts.items()}
    records = []
    for chosen in parameters:
        with tempfile.TemporaryDirectory() as folder:
            summary = refine_folder(data, logits, chosen, Path(folder), threads)
            after = {}
            for files, done in zip(cases, summary["cases"], strict=True):
                assert files.labels is not None
                assert files.case_id == done["case_id"]
                refined, truth = read_labels(done["output"]).data, read_labels(files.labels).data
                after[files.case_id] = {name: dice(refined, truth, labels) for name, labels in parts.items()}
        sys.stderr.write(f"{data.name}/{logits}, {chosen}: {len(after)} cases, {summary['seconds']:.1f} s\n")
        records.append({"logits": logits, "parameters": chosen, "before": before, "after": after, "summary": summary})
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Means over the cases whose truth has the label or region, and how many of these came out better or worse."""
    rows = []
    for record in records:
        first = next(iter(record["before"].values()))
        for name in first:
            pairs = np.array([(record["before"][case][name], record["after"][case][name]) for case in record["before"]])
            pairs = pairs[~np.isnan(pairs).any(axis=1)]
            change = pairs[:, 1] - pairs[:, 0]
            mean_before, mean_after = pairs.mean(axis=0) if len(pairs) else (math.nan, math.nan)
            counts = [str(int((change > EQUAL).sum())), str(int((change < -EQUAL).sum())), str(len(change))]
            difference = f"{100 * (mean_after - mean_before):+.2f}"
            rows.append(
                [record["logits"], Path(record["parameters"]).name, name, f"{mean_before:.4f}", f"{mean_after:.4f}", difference, *counts]
            )
    header = ["logits", "parameters", "label", "Dice before", "after", "change, points", "better", "worse", "cases"]
    return markdown_table(header, rows)


def as_region(text: str) -> tuple[str, tuple[int, ...]]:
    """Return name and labels of `NAME=1,2,3`."""
    name, _, labels = text.partition("=")
    return name, tuple(int(label) for label in labels.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description="Dice before and after `crfrefine infer`, on labeled cases.")
    parser.add_argument("data", type=Path, help="folder with images/ labels/ and logits/; masks/ is used if it is there")
    parser.add_argument("--logits", nargs="+", default=["logits"], metavar="NAME", help="folders of logits in it")
    parser.add_argument("--parameters", nargs="+", default=["default"], metavar="PRESET|FILE", help="as for `infer -c`")
    parser.add_argument("--region", nargs="+", type=as_region, default=[], metavar="NAME=1,2,3", help="labels that also count together")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write every case's scores and the runs' summaries")
    parser.add_argument("--markdown", type=Path, help="append the table")
    options = parser.parse_args()
    missing = [name for name in ("images", "labels", *options.logits) if not (options.data / name).is_dir()]
    if missing:
        sys.stderr.write(f"skipped: {options.data} has no folder {', '.join(missing)}\n")
        return
    records = []
    for logits in options.logits:
        records += score(options.data, logits, options.parameters, dict(options.region), options.threads)
    text = f"### {options.data.name}\n\n{table(records)}\n*crfrefine {crfrefine.__version__}, sources {source_hash()}.*\n"
    sys.stdout.write(text)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    if options.markdown:
        with options.markdown.open("a") as stream:
            stream.write(text + "\n")


if __name__ == "__main__":
    main()
