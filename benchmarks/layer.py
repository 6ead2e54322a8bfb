"""Time the trainable layer, keep the records in `layer_benchmarks.json` and the tables in `benchmarks.md` of `docs/reference`.

Usage: layer.py [--quick] [--only SUITE ...] [--threads N] [--no-docs]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import environment
import layer_small
import layer_steps
import torch
from layer_tables import tables
from peers import BENCH, ROOT
from report import write_between_markers

SUITES: dict[str, Callable[..., dict[str, Any]]] = {"torch": layer_small.run, "steps": layer_steps.run}
RECORDS = ROOT / "docs" / "reference" / "layer_benchmarks.json"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the trainable layer.")
    parser.add_argument("--quick", action="store_true", help="one run each; the documents stay as they are")
    parser.add_argument(
        "--only", nargs="+", choices=list(SUITES), default=list(SUITES), metavar="SUITE", help=f"some of: {', '.join(SUITES)}"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of all that is timed (1)")
    parser.add_argument("--no-docs", action="store_true", help="leave the documents as they are")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    partial = options.quick or options.no_docs
    target = BENCH / "results" / "layer-partial.json" if partial else RECORDS
    target.parent.mkdir(parents=True, exist_ok=True)
    records = json.loads(target.read_text()) if target.exists() else {}
    for suite in options.only:
        sys.stderr.write(f"{suite}\n")
        start = time.perf_counter()
        head = environment.describe("torch")
        figures = SUITES[suite](quick=options.quick, threads=options.threads)
        records[suite] = {"environment": head, "took_seconds": time.perf_counter() - start, "figures": figures}
        target.write_text(json.dumps(records, indent=1) + "\n")
    text = tables(records)
    sys.stdout.write(text)
    if not partial:
        write_between_markers(ROOT / "docs" / "reference" / "benchmarks.md", "layer", text)
    sys.stderr.write(f"records: {target.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
