"""Time and memory against other libraries: records in `benchmarks.json`, tables in `benchmarks.md` of `docs/reference`.

Usage: run.py [--quick] [--workloads NAME ...] [--no-docs]
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import environment
import report
import speed
from peers import BENCH, ROOT
from workloads import WORKLOADS

RECORDS = ROOT / "docs" / "reference" / "benchmarks.json"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure crfrefine against other libraries.")
    parser.add_argument("--quick", action="store_true", help="small workloads, one run each; the documents stay as they are")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), metavar="NAME", help="these alone")
    parser.add_argument("--no-docs", action="store_true", help="leave the documents as they are")
    options = parser.parse_args()
    start, head = time.perf_counter(), environment.describe()
    figures = speed.run(quick=options.quick, workloads=options.workloads)
    record = {"environment": head, "took_seconds": time.perf_counter() - start, "figures": figures}
    text = report.tables(record)
    sys.stdout.write(text)
    partial = options.quick or options.no_docs or options.workloads is not None
    target = BENCH / "results" / "partial.json" if partial else RECORDS
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    if not partial:
        report.write_between_markers(ROOT / "docs" / "reference" / "benchmarks.md", "benchmarks", text)
    sys.stderr.write(f"records: {target.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
