"""Plays launches that `gpu_record.py` has recorded on a GPU: right or wrong, and how fast.

    python benchmarks/gpu_replay.py RECORD.npz -o LINES.jsonl     # CuPy and numpy, nothing else

Each source has a process of its own, which runs its kernels one by one. If it has hung, crashed or
had an error of CUDA, a new one goes on, without the other launches of a kernel that hung. Integers
must be equal. Numbers may differ by `TOLERANCE` times the largest that the launch writes into the
same array, as a GPU fuses multiplications and additions. What depends on the order of threads is
compared as a set, or not at all (`orders` in the line).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scripts import new_parser

Line = dict[str, Any]

TOLERANCE = 2e-5  # of a sum of hundreds of numbers in float32, 1e-6 is usual
REPEATS = 10
# compilation takes a second
START_SECONDS = 60
LAUNCH_SECONDS = 30
_KILL_SECONDS = 5.0
_ENDS_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_GUARD = np.full(256, 0xA5, dtype=np.uint8)
_INSIDE = slice(len(_GUARD), -len(_GUARD))


class Record:
    """What `gpu_record.py` has written: `launches` of kernels."""

    def __init__(self, path: Path) -> None:
        self._arrays = np.load(path, allow_pickle=False)
        self.launches: list[dict[str, Any]] = json.loads(self._arrays["index"].tobytes())

    def code(self, launch: dict[str, Any]) -> str:
        return str(self._arrays[launch["text"]].tobytes().decode())

    def memory(self, launch: dict[str, Any]) -> list[tuple[Any, Any]]:
        """The bytes of each piece of memory before and after the launch."""
        return [(self._arrays[before], self._arrays[after]) for before, after in launch["memory"]]


def arguments_of(launch: dict[str, Any], memory: Sequence[Any]) -> list[Any]:
    """The arguments of a launch, arrays as views of the pieces of memory."""
    return [view(argument, memory) for argument in launch["arguments"]]


def view(argument: dict[str, Any] | None, memory: Sequence[Any]) -> Any:
    """An argument's array, its number, or a null pointer."""
    if argument is None:
        return np.uint64(0)
    dtype = np.dtype(argument["dtype"])
    if "value" in argument:
        return dtype.type(argument["value"])
    begin = argument["offset"]
    end = begin + dtype.itemsize * int(np.prod(argument["shape"]))
    return memory[argument["piece"]][begin:end].view(dtype).reshape(argument["shape"])


# ---- In a process of its own, with the GPU


def launch_one(cupy: Any, record: Record, number: int) -> Line:
    """Compile and launch a kernel, compare what it leaves, and time it."""
    launch = record.launches[number]
    pieces = record.memory(launch)
    source = {"code": record.code(launch), "options": tuple(launch["options"]), "backend": "nvrtc"}
    started = time.perf_counter()
    try:
        function = cupy.RawModule(**source).get_function(launch["kernel"])
    except Exception as error:  # of CuPy or NVRTC: what it says is the outcome
        return {"outcome": "compile error", "error": _short(f"{type(error).__name__}: {error}")}
    compile_seconds = round(time.perf_counter() - started, 3)
    guarded = [np.concatenate([_GUARD, before, _GUARD]) for before, _ in pieces]

    def run(memory: list[Any]) -> None:
        inside = [piece[_INSIDE] for piece in memory]
        function((launch["grid"],), (launch["block"],), tuple(arguments_of(launch, inside)))

    memory = [cupy.asarray(piece) for piece in guarded]
    run(memory)
    cupy.cuda.runtime.deviceSynchronize()
    found = [cupy.asnumpy(piece) for piece in memory]
    line = compare(launch, pieces, [piece[_INSIDE] for piece in found])
    guards = [part for piece in found for part in (piece[: len(_GUARD)], piece[-len(_GUARD) :])]
    if any((guard != _GUARD).any() for guard in guards):
        line |= {"outcome": "wrong", "error": "it writes outside of its arrays"}
    seconds = _time_repeats(cupy, run, launch, guarded, memory)
    num_bytes = sum(before.nbytes for before, _ in pieces)
    line["microseconds"] = round(1e6 * seconds, 2)
    line["gb_per_second"] = round(num_bytes / max(seconds, 1e-9) / 1e9, 2)
    return {**line, "compile_seconds": compile_seconds, "bytes": num_bytes}


def _time_repeats(cupy: Any, run: Any, launch: dict[str, Any], guarded: Any, memory: Any) -> float:
    """Seconds of a launch, which gets what it changes anew each time."""
    copies = []
    for _ in range(REPEATS):
        copy = list(memory)
        for place, (before, after) in enumerate(launch["memory"]):
            if before != after:
                copy[place] = cupy.asarray(guarded[place])
        copies.append(copy)
    begin = cupy.cuda.Event()
    end = cupy.cuda.Event()
    begin.record()
    for copy in copies:
        run(copy)
    end.record()
    end.synchronize()
    return 1e-3 * cupy.cuda.get_elapsed_time(begin, end) / REPEATS


def compare(launch: dict[str, Any], pieces: Sequence[Any], found: Sequence[Any]) -> Line:
    """Right or wrong, with the largest difference, as a share of what is compared with."""
    line: Line = {"outcome": "right", "difference": 0.0, "orders": 0}
    for number, argument in enumerate(launch["arguments"]):
        if argument is None or "value" in argument:
            continue
        before = view(argument, [piece[0] for piece in pieces])
        expected = view(argument, [piece[1] for piece in pieces])
        got = view(argument, found)
        line["orders"] += argument["order"] != "kept"
        if argument["order"] == "any" or not got.size:
            continue
        if argument["order"] == "set":
            got = np.sort(got, axis=None)
            expected = np.sort(expected, axis=None)
        share, num_wrong = _differences(before, expected, got)
        line["difference"] = max(line["difference"], share)
        if num_wrong:
            name = f"{number} ({launch['names'][number]}, {argument['dtype']})"
            where = f"{num_wrong} of {got.size} numbers of argument {name}"
            line["outcome"] = "wrong"
            line.setdefault("error", f"{where} differ, by up to {share:.2g} of the largest")
    return line


def _differences(before: Any, expected: Any, got: Any) -> tuple[float, int]:
    """Return the largest difference over the largest number written, and how many are wrong."""
    has_integers = expected.dtype.kind != "f"
    num_wrong = int((got != expected).sum())
    before, expected, got = (array.astype(np.float64) for array in (before, expected, got))
    if has_integers:
        return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1.0)), num_wrong
    with np.errstate(invalid="ignore"):
        written = np.isfinite(expected) & (before != expected)
        scale = max(np.abs(expected[written]).max(initial=0.0), 1e-30)
        same = (got == expected) | (np.isnan(got) & np.isnan(expected))
        share = np.nan_to_num(np.where(same, 0.0, np.abs(got - expected) / scale), nan=np.inf)
    return float(share.max()), int((share > TOLERANCE).sum())


def _child(path: Path, numbers: Sequence[int]) -> None:
    """Launch these numbers; print a line of JSON when CuPy works, and another for each launch.

    An alarm ends what hangs.
    """
    ctypes.CDLL(None).prctl(_ENDS_WITH_PARENT, signal.SIGKILL)  # it is in a group of its own
    signal.alarm(START_SECONDS)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # others may print
    record = Record(path)
    import cupy

    cupy.cuda.runtime.deviceSynchronize()  # without a driver or a GPU nothing begins
    answers.write("{}\n")
    for number in numbers:
        signal.alarm(LAUNCH_SECONDS)
        answers.write(json.dumps(launch_one(cupy, record, number)) + "\n")


def _short(text: str) -> str:
    if len(text) < 1500:
        return text
    return f"{text[:1000]} … {text[-400:]}"


# ---- The parent, which never touches the GPU


def play(path: Path, lines: Path | None, *, seconds: float) -> Counter[str]:
    """Launch everything, append a line for each launch, and count the outcomes."""
    launches = Record(path).launches
    end = time.monotonic() + seconds
    outcomes = Counter[str]()

    def keep(number: int, line: Line) -> None:
        launch = launches[number]
        about = {key: launch[key] for key in ("source", "kernel", "constants")}
        arguments = zip(launch["names"], launch["arguments"], strict=True)
        about["null"] = [name for name, argument in arguments if argument is None]
        about["threads"] = launch["grid"] * launch["block"]
        append(lines, {"step": "kernel", **about, **line})
        outcomes[line["outcome"]] += 1

    of_source: dict[str, list[int]] = {}
    for number, launch in enumerate(launches):
        of_source.setdefault(launch["source"], []).append(number)
    for left in of_source.values():
        while left:
            has_begun, answers, status, said = _run_child(path, left, end - time.monotonic())
            for answer in answers:
                keep(left.pop(0), answer)
            if not left:
                break
            # The launch after the last answer ended the process.
            last = left.pop(0)
            outcome = _outcome(has_begun, status)
            keep(last, {"outcome": outcome, "error": _short(f"status {status}: {said}")})
            for number in list(left):
                reason = None
                if not has_begun:
                    reason = "no process began"
                elif outcome == "hang" and launches[number]["kernel"] == launches[last]["kernel"]:
                    reason = "its kernel has hung"
                if reason is not None:
                    keep(number, {"outcome": "not run", "error": reason})
                    left.remove(number)
    return outcomes


def _outcome(has_begun: bool, status: int | None) -> str:
    """How a launch ended that gave no answer."""
    if not has_begun:
        return "not run"
    if status in (None, -signal.SIGALRM):
        return "hang"
    return "crash"


def _run_child(
    path: Path, numbers: Sequence[int], seconds: float
) -> tuple[bool, list[Line], int | None, str]:
    """Run launches in a process: whether it began, its answers, exit status and output."""
    with tempfile.NamedTemporaryFile("w+") as answers:
        command = [sys.executable, __file__, path, "--child", *numbers]
        status, said = run_process(command, seconds, stdout=answers)
        found = []
        for text in Path(answers.name).read_text(encoding="utf-8").splitlines():
            # The last line of a process that was killed may be cut off.
            with contextlib.suppress(ValueError):
                found.append(json.loads(text))
        return bool(found), found[1:], status, said


def run_process(
    command: Sequence[object], seconds: float, *, stdout: Any = None, **options: Any
) -> tuple[int | None, str]:
    """Run a process in a group of its own, which is killed at the end.

    Its exit status (None if the time was up), and what it printed.
    """
    with tempfile.TemporaryFile() as said:
        options |= {"stdin": subprocess.DEVNULL, "stdout": stdout or said, "stderr": said}
        process = subprocess.Popen([*map(str, command)], start_new_session=True, **options)
        status = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=max(seconds, 0.0))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # It may stay in the kernel, as processes of a GPU that hangs do.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_KILL_SECONDS)
        said.seek(0)
        return status, said.read().decode(errors="replace").strip()


def append(path: Path | None, line: Line) -> None:
    """Add a line, at once and whole: several processes may write. Without a file it is printed."""
    if path is None:
        print(json.dumps(line), flush=True)
        return
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")


def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("record", type=Path, help="what gpu_record.py has written")
    parser.add_argument("-o", "--output", type=Path, help="file to which lines are appended")
    limit = "for everything; what has not run then gets lines that say so"
    parser.add_argument("--seconds", type=float, default=500.0, help=limit)
    parser.add_argument("--child", type=int, nargs="+", metavar="N", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(options.record, options.child)
        return 0
    outcomes = play(options.record, options.output, seconds=options.seconds)
    counts = [f"{number} {outcome}" for outcome, number in sorted(outcomes.items())]
    sys.stderr.write(", ".join(counts) + "\n")
    return int(bool(outcomes.keys() - {"right"}))


if __name__ == "__main__":
    sys.exit(main())
