"""Plays recorded launches of the GPU engine's kernels on a GPU (`gpu_record.py` makes the record).

Right or wrong, and how fast.

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
    return [
        np.uint64(0) if argument is None else view(argument, memory)
        for argument in launch["arguments"]
    ]


def view(argument: dict[str, Any], memory: Sequence[Any]) -> Any:
    """An argument's array, or its number."""
    dtype = np.dtype(argument["dtype"])
    begin = argument.get("offset")
    if "value" in argument:
        return dtype.type(argument["value"])
    piece = memory[argument["piece"]][
        begin : begin + dtype.itemsize * int(np.prod(argument["shape"]))
    ]
    return piece.view(dtype).reshape(argument["shape"])


# ---- In a process of its own, with the GPU


def launch_one(cupy: Any, record: Record, number: int) -> Line:
    """Compile and launch a kernel, compare what it leaves, and time it."""
    launch = record.launches[number]
    pieces = record.memory(launch)
    code = record.code(launch)
    options = tuple(launch["options"])
    started = time.perf_counter()
    try:
        function = cupy.RawModule(code=code, options=options, backend="nvrtc").get_function(
            launch["kernel"]
        )
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
    if any(
        (ends != _GUARD).any()
        for piece in found
        for ends in (piece[: len(_GUARD)], piece[-len(_GUARD) :])
    ):
        line = {**line, "outcome": "wrong", "error": "it writes outside of its arrays"}
    changes = [before != after for before, after in launch["memory"]]
    again = list(zip(guarded, memory, changes, strict=True))
    copies = [
        [cupy.asarray(piece) if is_changed else there for piece, there, is_changed in again]
        for _ in range(REPEATS)
    ]
    begin = cupy.cuda.Event()
    end = cupy.cuda.Event()
    begin.record()
    for copy in copies:
        run(copy)
    end.record()
    end.synchronize()
    seconds = 1e-3 * cupy.cuda.get_elapsed_time(begin, end) / REPEATS
    num_bytes = sum(before.nbytes for before, _ in pieces)
    line |= {
        "microseconds": round(1e6 * seconds, 2),
        "gb_per_second": round(num_bytes / max(seconds, 1e-9) / 1e9, 2),
    }
    return {**line, "compile_seconds": compile_seconds, "bytes": num_bytes}


def compare(
    launch: dict[str, Any], pieces: Sequence[tuple[Any, Any]], found: Sequence[Any]
) -> Line:
    """Right or wrong, with the largest difference, as a share of what is compared with."""
    line: Line = {"outcome": "right", "difference": 0.0, "orders": 0}
    for number, argument in enumerate(launch["arguments"]):
        if argument is None or "value" in argument:
            continue
        before, expected = (view(argument, [part[i] for part in pieces]) for i in (0, 1))
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
            line |= {
                "outcome": "wrong",
                "error": line.get("error", f"{where} differ, by up to {share:.2g} of the largest"),
            }
    return line


def _differences(before: Any, expected: Any, got: Any) -> tuple[float, int]:
    """Return the largest difference over the largest number written, and how many are wrong."""
    if expected.dtype.kind != "f":
        wrong = got != expected
        largest = np.abs(got[wrong].astype(np.float64) - expected[wrong].astype(np.float64)).max(
            initial=0.0
        )
        return float(largest / max(np.abs(expected.astype(np.float64)).max(), 1.0)), int(
            wrong.sum()
        )
    before, expected, got = (array.astype(np.float64) for array in (before, expected, got))
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
    """Launch everything, and append a line for each launch.

    Return how many launches had which outcome.
    """
    record = Record(path)
    end = time.monotonic() + seconds
    outcomes = Counter[str]()

    def keep(number: int, line: Line) -> None:
        launch = record.launches[number]
        null = [
            name
            for name, argument in zip(launch["names"], launch["arguments"], strict=True)
            if argument is None
        ]
        about = {**{key: launch[key] for key in ("source", "kernel", "constants")}, "null": null}
        append(
            lines, {"step": "kernel", **about, "threads": launch["grid"] * launch["block"], **line}
        )
        outcomes[line["outcome"]] += 1

    sources = dict.fromkeys(launch["source"] for launch in record.launches)
    for source in sources:
        left = [
            number for number, launch in enumerate(record.launches) if launch["source"] == source
        ]
        while left:
            begun, answers, status, said = _run_child(path, left, end - time.monotonic())
            for answer in answers:
                keep(left.pop(0), answer)
            # The launch after the last answer ended the process. If it hung, so may the others of
            # its kernel.
            if left:
                if not begun:
                    outcome = "not run"
                elif status in (None, -signal.SIGALRM):
                    outcome = "hang"
                else:
                    outcome = "crash"
                keep(left[0], {"outcome": outcome, "error": _short(f"status {status}: {said}")})
                kernel = record.launches[left[0]]["kernel"]
                others = left[1:]
                left = []
                for number in others:
                    if outcome == "crash" or (
                        begun and record.launches[number]["kernel"] != kernel
                    ):
                        left.append(number)
                    else:
                        keep(
                            number,
                            {
                                "outcome": "not run",
                                "error": "its kernel has hung" if begun else "no process began",
                            },
                        )
    return outcomes


def _run_child(
    path: Path, numbers: Sequence[int], seconds: float
) -> tuple[bool, list[Line], int | None, str]:
    """Run launches in a process; return whether it began, answers, exit status and output.

    The exit status is None if the time was up.
    """
    with tempfile.NamedTemporaryFile("w+") as answers:
        status, said = run_process(
            [sys.executable, __file__, path, "--child", *numbers], seconds, stdout=answers
        )
        found = []
        for text in Path(answers.name).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(
                ValueError
            ):  # the last line of a process that was killed may be cut off
                found.append(json.loads(text))
        return bool(found), found[1:], status, said


def run_process(
    command: Sequence[object], seconds: float, *, stdout: Any = None, **options: Any
) -> tuple[int | None, str]:
    """Run a process in a group of its own, which is killed at the end.

    Its exit status (None if the time was up), and what it printed.
    """
    with tempfile.TemporaryFile() as said:
        streams: Line = {"stdin": subprocess.DEVNULL, "stdout": stdout or said, "stderr": said}
        process = subprocess.Popen(
            [*map(str, command)], start_new_session=True, **streams, **options
        )
        status = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=max(seconds, 0.0))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(
                subprocess.TimeoutExpired
            ):  # in the kernel, as processes of a GPU that hangs may be
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path, help="what gpu_record.py has written")
    parser.add_argument("-o", "--output", type=Path, help="file to which lines are appended")
    parser.add_argument(
        "--seconds",
        type=float,
        default=500.0,
        help="for everything; what has not run then gets lines that say so",
    )
    parser.add_argument("--child", type=int, nargs="+", metavar="N", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(options.record, options.child)
        return 0
    outcomes = play(options.record, options.output, seconds=options.seconds)
    sys.stderr.write(
        ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items())) + "\n"
    )
    return int(bool(outcomes.keys() - {"right"}))


if __name__ == "__main__":
    sys.exit(main())
