"""Give every reader damaged files, and the engine wrong arguments and odd models: `make fuzz FUZZ_ARGS="--minutes 60 --seed 7"`.

A finding comes with the command that repeats it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from fuzz_engine import engine_targets
from fuzz_texts import text_targets
from fuzz_volumes import volume_targets
from fuzz_worker import Tally, Target, examine, fuzz

STRIDE = 1 << 32  # Between the first inputs of two seeds: no input is given twice.


def main() -> int:
    """Return 1 if there is a finding."""
    targets = {target.name: target for target in (*volume_targets(), *text_targets(), *engine_targets())}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", choices=list(targets), help="repeatable; default: all")
    parser.add_argument("--inputs", type=int, help="of each target; default: 10000, or as many as the minutes allow")
    parser.add_argument("--minutes", type=float, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0, help="other seeds make other inputs")
    parser.add_argument(
        "--only", type=int, help="number of the one input to give, in this process, so that its traceback or a debugger shows more"
    )
    options = parser.parse_args()
    chosen = [targets[name] for name in options.target or targets]
    num_inputs = 10_000 if options.inputs is None and options.minutes is None else options.inputs
    is_found = False
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        if options.only is not None:
            return _examine_one(chosen[0], Path(place), options.only)
        started = time.monotonic()
        for number, target in enumerate(chosen):
            folder = Path(place, target.name)
            folder.mkdir()
            left = None if options.minutes is None else options.minutes * 60 - (time.monotonic() - started)
            seconds = None if left is None else left / (len(chosen) - number)
            tally = fuzz(target, folder, first=options.seed * STRIDE, inputs=num_inputs, seconds=seconds)
            _print(target, tally)
            is_found |= bool(tally.findings)
    return int(is_found)


def _print(target: Target, tally: Tally) -> None:
    print(
        f"{target.name:16} {tally.inputs:8} inputs, {tally.taken} taken, {tally.refused} refused, {len(tally.findings)} findings, "
        f"{tally.inputs / max(tally.seconds, 1e-9):.0f} per second",
        flush=True,
    )
    for finding in tally.findings:
        print(f"finding: tests/fuzz/run.py --target {target.name} --only {finding.seed}\n{finding.what}", flush=True)


def _examine_one(target: Target, folder: Path, number: int) -> int:
    try:
        print("taken" if examine(target, folder, number) else "refused")
    finally:
        for path in sorted(folder.iterdir()):
            content = path.read_bytes()
            print(f"{path.name}, {len(content)} bytes: {content[:2000]!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
