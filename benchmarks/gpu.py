"""The GPU engine: tested, checked against the CPU's, then timed: against the bytes it has to move, the CPU engine, and others on the GPU.

It needs a GPU, CuPy and this repository (docs/guide/gpu.md). No time is taken where a result is wrong. What is known is written to the
file that -o names at once; --from-record makes the tables of such files, without a GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import environment
from gpu_cases import CPU_THREADS, SPECS, check
from gpu_peers import plain_torch
from gpu_record import Record, as_text, failures, merged
from gpu_tables import tables
from gpu_tests import run_tests, sanitize
from gpu_times import describe_gpu, time_workload
from peers import ROOT
from report import write_between_markers

from crfrefine.engines import get_backend
from crfrefine.engines.base import Backend
from crfrefine.engines.cpu import CpuBackend
from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.errors import BackendUnavailableError

REFERENCE = ROOT / "docs" / "reference"


def yardstick() -> Backend:
    """What results are compared with: the CPU engine, or where it was not built the slow reference, on smaller cases."""
    try:
        return get_backend("cpu")
    except BackendUnavailableError as error:
        sys.stderr.write(f"  {error}: compared with the reference instead; no times of the CPU\n")
        return get_backend("reference")


def write(content: dict[str, Any]) -> None:
    """Put a record and its tables into the documentation, if it is whole."""
    if wrong := failures(content):
        raise SystemExit("benchmark: nothing is written to docs/, as the record has failures:\n  " + "\n  ".join(wrong))
    if not content.get("workloads"):
        raise SystemExit("benchmark: nothing is written to docs/, as the record has no times")
    (REFERENCE / "gpu_benchmarks.json").write_text(as_text(content), encoding="utf-8")
    write_between_markers(REFERENCE / "benchmarks.md", "gpu", tables(content))


def measure(gpu: CudaBackend, record: Record, options: argparse.Namespace) -> None:
    """Do what the options ask for, in order; times only where all before was right."""
    expected = yardstick()
    is_engine = isinstance(expected, CpuBackend)
    record.save(
        environment=environment.describe("cupy", "torch"),
        device=describe_gpu(gpu.device.xp),
        arguments=sys.argv[1:],
        cpu_threads=CPU_THREADS,
        compared_with="CPU engine" if is_engine else "reference",
    )
    started = time.perf_counter()
    check(gpu, expected, lambda found: record.save(check=found))
    num_wrong = len(failures(record.content))
    num_right = len(record.content["check"]) - num_wrong
    seconds = time.perf_counter() - started
    sys.stderr.write(
        f"  {num_right} results agree with those of the {record.content['compared_with']}, {num_wrong} do not; {seconds:.0f} s\n"
    )
    if options.tests:
        run_tests(lambda found: record.save(tests=found))
    if options.sanitize:
        sanitize(lambda found: record.save(sanitizer=found))
    if options.check_only or (options.workloads is None and (options.tests or options.sanitize)) or failures(record.content):
        return
    try:
        record.save(plain_torch=plain_torch(gpu))
    except Exception:  # PyTorch's trouble, or ours: our own times come without it
        record.save(plain_torch={"failed": traceback.format_exc(limit=-6)})
    workloads: dict[str, dict[str, Any]] = {}
    for name in options.workloads or SPECS:

        def keep(found: dict[str, Any], name: str = name) -> None:
            workloads[name] = dict(found)
            record.save(workloads=workloads)

        try:
            time_workload(gpu, expected if is_engine and not options.no_cpu else None, SPECS[name], repeats=options.repeats, keep=keep)
        except Exception:  # the other workloads may do
            keep({**workloads.get(name, {}), "failed": traceback.format_exc(limit=-6)})
        sys.stderr.write(f"  {name}: {as_text(workloads[name])}")


def main() -> None:
    """Check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write; without it, the record goes to the standard output")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tests", action="store_true", help="run the tests that need a GPU")
    parser.add_argument("--sanitize", action="store_true", help="run every kernel under compute-sanitizer, if that is installed")
    parser.add_argument("--check-only", action="store_true", help="no times")
    parser.add_argument(
        "--workloads", nargs="+", choices=SPECS, help="which ones to time; the default is all, or none with --tests or --sanitize"
    )
    parser.add_argument("--no-cpu", action="store_true", help="do not time the CPU engine")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--from-record", nargs="+", type=Path, metavar="FILE", help="measure nothing: make the tables of these records")
    parser.add_argument("--write", action="store_true", help="write gpu_benchmarks.json and its section of benchmarks.md in docs/reference")
    options = parser.parse_args()
    if options.from_record:
        content = merged(options.from_record)
        if options.write:
            write(content)
        else:
            sys.stdout.write(tables(content))
        return
    try:
        gpu = get_backend(options.device)
    except BackendUnavailableError as error:
        raise SystemExit(f"benchmark: nothing to measure: {error}") from error
    assert isinstance(gpu, CudaBackend)
    record = Record(options.output)
    measure(gpu, record, options)
    record.save(complete=True)
    if options.output is None and not options.write:
        sys.stdout.write(as_text(record.content))
    if wrong := failures(record.content):
        raise SystemExit("benchmark: failed:\n  " + "\n  ".join(wrong))
    if options.write:
        write(record.content)


if __name__ == "__main__":
    main()
