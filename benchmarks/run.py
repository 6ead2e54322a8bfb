"""Run the benchmark suites; keep their records in `benchmarks.json` and their tables in `benchmarks.md` of `docs/reference`.

Usage: run.py [--quick] [--only SUITE ...] [--workloads NAME ...] [--no-docs]
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time

import environment
import report
from peers import BENCH, ROOT
from workloads import WORKLOADS

SUITES = ("precision", "speed", "threads", "growth", "case", "startup")
RECORDS = ROOT / "docs" / "reference" / "benchmarks.json"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure crfrefine against other libraries.")
    parser.add_argument("--quick", action="store_true", help="small workloads, one run each; the documents stay as they are")
    parser.add_argument("--only", nargs="+", choices=SUITES, default=SUITES, metavar="SUITE", help=f"some of: {', '.join(SUITES)}")
    parser.add_argument(
        "--workloads", nargs="+", choices=list(WORKLOADS), metavar="NAME", help="for the suite speed: some of its workloads"
    )
    parser.add_argument("--no-docs", action="store_true", help="leave the documents as they are")
    options = parser.parse_args()

    partial = options.quick or options.no_docs or options.workloads is not None
    target = BENCH / "results" / "partial.json" if partial else RECORDS
    target.parent.mkdir(parents=True, exist_ok=True)
    records = json.loads(target.read_text()) if target.exists() else {}
    for suite in options.only:
        sys.stderr.write(f"{suite}\n")
        more = {"workloads": options.workloads} if suite == "speed" else {}
        start = time.perf_counter()
        head = environment.describe()
        figures = importlib.import_module(suite).run(quick=options.quick, **more)
        records[suite] = {"environment": head, "took_seconds": time.perf_counter() - start, "figures": figures}
        target.write_text(json.dumps(records, indent=1) + "\n")
    text = report.tables(records)
    sys.stdout.write(text)
    if not partial:
        report.write_between_markers(ROOT / "docs" / "reference" / "benchmarks.md", "benchmarks", text)
    sys.stderr.write(f"records: {target.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
