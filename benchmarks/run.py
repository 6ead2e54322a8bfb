"""Run the benchmark suites; keep their records in `benchmarks.json` and their tables in `benchmarks.md` of `docs/reference`.

Usage: run.py [--quick] [--only SUITE ...] [--workloads NAME ...] [--no-docs]
       run.py --only large [--cases NAME ...] [--threads N] [--config NAME] [--max-memory SIZE] [--data FOLDER] [--no-docs]
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import environment
import report
from large import IN_MEMORY, LargeOptions
from large_cases import CASES
from peers import BENCH, ROOT
from workloads import WORKLOADS

SUITES = ("precision", "speed", "threads", "growth", "case", "startup")
EXTRA_SUITES = ("large", "sharpened")  # many GiB of data; real cases: only when asked for
RECORDS = ROOT / "docs" / "reference" / "benchmarks.json"


def _arguments(suite: str, options: argparse.Namespace, records: dict[str, Any]) -> dict[str, Any]:
    """What a suite takes besides `quick`."""
    if suite == "speed":
        return {"workloads": options.workloads}
    if suite == "sharpened":
        return {"threads": options.threads}
    if suite == "large":
        wanted = LargeOptions(options.cases, options.threads, options.config, options.max_memory, options.data.resolve())
        return {"options": wanted, "before": records.get("large", {}).get("figures")}
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure crfrefine against other libraries.")
    parser.add_argument("--quick", action="store_true", help="small workloads, one run each; the documents stay as they are")
    what = f"some of: {', '.join((*SUITES, *EXTRA_SUITES))}; by default all but the last two"
    parser.add_argument("--only", nargs="+", choices=(*SUITES, *EXTRA_SUITES), default=SUITES, metavar="SUITE", help=what)
    parser.add_argument(
        "--workloads", nargs="+", choices=list(WORKLOADS), metavar="NAME", help="for the suite speed: some of its workloads"
    )
    parser.add_argument("--no-docs", action="store_true", help="leave the documents as they are")
    large = parser.add_argument_group("the suites large and sharpened; records of what is not measured are kept")
    large.add_argument("--cases", nargs="+", choices=[*IN_MEMORY, *CASES], default=(), metavar="NAME", help="memory, peer, body-30M ...")
    large.add_argument("--threads", type=int, default=2, metavar="N")
    large.add_argument("--config", default="default", metavar="NAME|FILE", help="the preset of what runs through the command")
    large.add_argument("--max-memory", metavar="SIZE", help="passed on to the command")
    large.add_argument("--data", type=Path, default=BENCH / "data", metavar="FOLDER", help="where the large cases are kept")
    options = parser.parse_args()

    partial = options.quick or options.no_docs or options.workloads is not None
    target = BENCH / "results" / "partial.json" if partial else RECORDS
    target.parent.mkdir(parents=True, exist_ok=True)
    records = json.loads(target.read_text()) if target.exists() else {}
    for suite in options.only:
        sys.stderr.write(f"{suite}\n")
        more = _arguments(suite, options, records)
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
