"""Plays recorded launches of the GPU engine's kernels on a GPU (`gpu_record.py` makes the record): right or wrong, and how fast.

    python benchmarks/gpu_replay.py RECORD.npz -o LINES.jsonl     # CuPy and numpy, nothing else

Each source has a process of its own, which compiles and launches its kernels one by one and waits after each. When a process has hung,
crashed or had an error of CUDA, a new one goes on behind the launch that it was at, without the other launches of a kernel that hung.
LINES gets a line of JSON per launch.

Integers must be equal. Numbers may differ by `TOLERANCE` times the largest that the launch writes into the same array: a GPU fuses
multiplications and additions, and its powers of two are good to two units in the last place; neither is so where the record was made. What
depends on the order of threads there is compared as a set, or not at all (`orders` in the line). Outside of its arrays a kernel must
write nothing.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Line = dict[str, Any]

# Of a sum of hundreds of numbers in float32, 1e-6 is usual.
TOLERANCE = 2e-5
REPEATS = 10
START_SECONDS, LAUNCH_SECONDS = 60, 30  # compilation takes a second
_KILL_SECONDS = 5.0
_ENDS_WITH_PARENT = 1
"""`PR_SET_PDEATHSIG`."""
_GUARD = np.full(256, 0xA5, dtype=np.uint8)
_INSIDE = slice(len(_GUARD), -len(_GUARD))


class Record:
    """What `gpu_record.py` has written: `texts` to compile and `launches` of their kernels."""

    def __init__(self, path: Path) -> None:
        self._arrays = np.load(path, allow_pickle=False)
        index = json.loads(self._arrays["index"].tobytes())
        self._bodies: list[str] = index["bodies"]
        self.texts: list[dict[str, Any]] = index["texts"]
        self.launches: list[dict[str, Any]] = index["launches"]

    def code(self, text: int) -> str:
        """As the engine gives it to CuPy."""
        return str(self.texts[text]["defines"] + self._bodies[self.texts[text]["body"]])

    def memory(self, launch: dict[str, Any]) -> list[tuple[Any, Any]]:
        """The bytes of each piece of memory before and after the launch."""
        found = []
        for before, after in launch["memory"]:
            first = self._arrays[before]
            found.append((first, first if after is None else self._arrays[after]))
        return found


def arguments_of(launch: dict[str, Any], memory: Sequence[Any]) -> list[Any]:
    """The arguments of a launch, arrays as views of the pieces of memory."""
    return [np.uint64(0) if argument is None else view(argument, memory) for argument in launch["arguments"]]


def view(argument: dict[str, Any], memory: Sequence[Any]) -> Any:
    """An argument's array, or its number."""
    if "value" in argument:
        return np.dtype(argument["dtype"]).type(argument["value"])
    dtype = np.dtype(argument["dtype"])
    begin = argument["offset"]
    piece = memory[argument["piece"]][begin : begin + dtype.itemsize * int(np.prod(argument["shape"]))]
    return piece.view(dtype).reshape(argument["shape"])


# ---- In a process of its own, with the GPU -----------------------------------------------------------------------------------------


def launch_one(cupy: Any, record: Record, number: int) -> Line:
    """Compile and launch a kernel, compare what it leaves, and time it."""
    launch = record.launches[number]
    pieces = record.memory(launch)
    options = tuple(record.texts[launch["text"]]["options"])
    started = time.perf_counter()
    try:
        function = cupy.RawModule(code=record.code(launch["text"]), options=options, backend="nvrtc").get_function(launch["kernel"])
    except Exception as error:  # of CuPy or NVRTC: what it says is the outcome
        return {"outcome": "compile error", "error": _short(f"{type(error).__name__}: {error}")}
    compile_seconds = round(time.perf_counter() - started, 3)
    guarded = [np.concatenate([_GUARD, before, _GUARD]) for before, _ in pieces]

    def run(memory: list[Any]) -> None:
        inside = [piece[_INSIDE] for piece in memory]
        function((launch["grid"],), (launch["block"],), tuple(arguments_of(launch, inside)), shared_mem=launch["shared"])

    memory = [cupy.asarray(piece) for piece in guarded]
    run(memory)
    cupy.cuda.runtime.deviceSynchronize()
    found = [cupy.asnumpy(piece) for piece in memory]
    line = compare(launch, pieces, [piece[_INSIDE] for piece in found])
    if any((ends != _GUARD).any() for piece in found for ends in (piece[: len(_GUARD)], piece[-len(_GUARD) :])):
        line = {**line, "outcome": "wrong", "error": "it writes outside of its arrays"}
    changed = [after is not None for _, after in launch["memory"]]
    copies = [
        [cupy.asarray(piece) if changes else there for piece, there, changes in zip(guarded, memory, changed, strict=True)]
        for _ in range(REPEATS)
    ]
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    begin.record()
    for copy in copies:
        run(copy)
    end.record()
    end.synchronize()
    seconds = 1e-3 * cupy.cuda.get_elapsed_time(begin, end) / REPEATS
    num_bytes = sum(before.nbytes for before, _ in pieces)
    speed = round(num_bytes / max(seconds, 1e-9) / 1e9, 2)
    times = {"microseconds": round(1e6 * seconds, 2), "gb_per_second": speed, "compile_seconds": compile_seconds}
    return {**line, **times, "bytes": num_bytes}


def compare(launch: dict[str, Any], pieces: Sequence[tuple[Any, Any]], found: Sequence[Any]) -> Line:
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
            got, expected = np.sort(got, axis=None), np.sort(expected, axis=None)
        share, num_wrong = _differences(before, expected, got)
        line["difference"] = max(line["difference"], share)
        if num_wrong:
            where = f"{num_wrong} of {got.size} numbers of argument {number} ({launch['names'][number]}, {argument['dtype']})"
            line |= {"outcome": "wrong", "error": line.get("error", f"{where} differ, by up to {share:.2g} of the largest")}
    return line


def _differences(before: Any, expected: Any, got: Any) -> tuple[float, int]:
    """The largest difference as a share of the largest number that is written, and how many numbers differ by too much."""
    if expected.dtype.kind != "f":
        wrong = got != expected
        largest = np.abs(got[wrong].astype(np.float64) - expected[wrong].astype(np.float64)).max(initial=0.0)
        return float(largest / max(np.abs(expected.astype(np.float64)).max(), 1.0)), int(wrong.sum())
    before, expected, got = (array.astype(np.float64) for array in (before, expected, got))
    with np.errstate(invalid="ignore"):
        written = np.isfinite(expected) & (before != expected)
        scale = max(np.abs(expected[written]).max(initial=0.0), 1e-30)
        same = (got == expected) | (np.isnan(got) & np.isnan(expected))
        share = np.where(same, 0.0, np.abs(got - expected) / scale)
    share = np.nan_to_num(share, nan=np.inf)
    return float(share.max()), int((share > TOLERANCE).sum())


def _child(path: Path, numbers: Sequence[int]) -> None:
    """Launch these numbers; print a line of JSON when CuPy works, and another for each launch. An alarm ends what hangs."""
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
    return text if len(text) < 1500 else f"{text[:1000]} … {text[-400:]}"


# ---- The parent, which never touches the GPU ---------------------------------------------------------------------------------------


def play(path: Path, lines: Path | None, *, seconds: float) -> Counter[str]:
    """Launch everything, and append a line for each launch; return how many launches had which outcome."""
    record, end, outcomes = Record(path), time.monotonic() + seconds, Counter[str]()

    def keep(number: int, line: Line) -> None:
        launch = record.launches[number]
        null = [name for name, argument in zip(launch["names"], launch["arguments"], strict=True) if argument is None]
        about = {**{key: launch[key] for key in ("source", "kernel", "constants")}, "null": null}
        append(lines, {"step": "kernel", **about, "threads": launch["grid"] * launch["block"], **line})
        outcomes[line["outcome"]] += 1

    by_source: dict[str, list[int]] = {}
    for number, launch in enumerate(record.launches):
        by_source.setdefault(launch["source"], []).append(number)
    for left in by_source.values():
        while left:
            begun, answers, status, said = _run_child(path, left, end - time.monotonic())
            for answer in answers:
                keep(left.pop(0), answer)
            if left:  # The launch after the last answer ended the process. If it hung, so may the others of its kernel.
                outcome = "not run" if not begun else "hang" if status in (None, -signal.SIGALRM) else "crash"
                keep(left[0], {"outcome": outcome, "error": _short(f"status {status}: {said}")})
                kernel, others = record.launches[left[0]]["kernel"], left[1:]
                left = [number for number in others if outcome == "crash" or (begun and record.launches[number]["kernel"] != kernel)]
                for number in others:
                    if number not in left:
                        keep(number, {"outcome": "not run", "error": "no process began" if not begun else "its kernel has hung"})
    return outcomes


def _run_child(path: Path, numbers: Sequence[int], seconds: float) -> tuple[bool, list[Line], int | None, str]:
    """Run launches in a process: whether it began, its answers, its exit status (None if the time was up), and what it printed."""
    with tempfile.NamedTemporaryFile("w+") as answers, tempfile.TemporaryFile("w+", errors="replace") as said:
        command = [sys.executable, __file__, str(path), "--child", *map(str, numbers)]
        status = None
        streams: Line = {"stdin": subprocess.DEVNULL, "stdout": answers, "stderr": said}
        with process_group(command, **streams) as process, contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(timeout=max(seconds, 0.0))
        said.seek(0)
        found = read_lines([Path(answers.name)])
        return bool(found), found[1:], status, said.read().strip()


@contextlib.contextmanager
def process_group(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process in a group of its own. At the end the whole group is killed."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # in the kernel, as processes of a GPU that hangs may be
            process.wait(timeout=_KILL_SECONDS)


def read_lines(paths: Sequence[Path]) -> list[Line]:
    """All lines of JSON; the last one of a process that was killed may be cut off, and is left out."""
    found = []
    for path in paths:
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(text))
    return found


def append(path: Path | None, line: Line) -> None:
    """Add a line, at once and whole: several processes may write. Without a file it is printed."""
    if path is None:
        print(json.dumps(line), flush=True)
        return
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Play."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="what gpu_record.py has written")
    parser.add_argument("-o", "--output", type=Path, help="file to which lines are appended")
    parser.add_argument("--seconds", type=float, default=500.0, help="for everything; what has not run then gets lines that say so")
    parser.add_argument("--child", type=int, nargs="+", metavar="N", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        _child(options.record, options.child)
        return 0
    outcomes = play(options.record, options.output, seconds=options.seconds)
    sys.stderr.write(", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items())) + "\n")
    return int(bool(outcomes.keys() - {"right"}))


if __name__ == "__main__":
    sys.exit(main())
