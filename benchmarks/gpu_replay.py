"""Plays recorded launches of the GPU engine's kernels on a GPU (`gpu_record.py` makes the record): right or wrong, and how fast.

    python benchmarks/gpu_replay.py RECORD.npz -o LINES.jsonl     # CuPy and numpy, nothing else

Each source has a process of its own, which compiles and launches its kernels one by one and waits after each. A process that hangs,
crashes or has an error of CUDA is ended with its whole group, and a new one goes on behind the launch that it was at. LINES gets a line of
JSON per launch, as soon as it is known.

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
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

Line = dict[str, Any]

# Of a sum of hundreds of numbers in float32, 1e-6 is usual.
TOLERANCE = 2e-5
REPEATS = 10
START_SECONDS, LAUNCH_SECONDS = 60.0, 30.0  # compilation takes a second
MAX_HANGS = 2
"""Of a kernel: more of its launches would take the time of others."""
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
    found: list[Any] = []
    for argument in launch["arguments"]:
        if argument is None:
            found.append(np.uint64(0))
        elif "value" in argument:
            found.append(np.dtype(argument["dtype"]).type(argument["value"]))
        else:
            found.append(view(argument, memory))
    return found


def view(argument: dict[str, Any], memory: Sequence[Any]) -> Any:
    """An argument's array."""
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


def _child(path: Path) -> None:
    """Launch what the standard input names, a number a line; answer in lines of JSON."""
    ctypes.CDLL(None).prctl(_ENDS_WITH_PARENT, signal.SIGKILL)  # it is in a group of its own
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # others may print
    numbers = [int(word) for word in sys.stdin.read().split()]
    record = Record(path)
    import cupy

    cupy.cuda.runtime.deviceSynchronize()  # without a driver or a GPU nothing begins
    for number in numbers:
        answers.write(json.dumps({"begin": number}) + "\n")
        try:
            line = launch_one(cupy, record, number)
        except Exception as error:  # after an error of CUDA nothing works in this process any more
            answers.write(json.dumps({"outcome": "crash", "error": _short(f"{type(error).__name__}: {error}")}) + "\n")
            os._exit(1)
        answers.write(json.dumps(line) + "\n")


def _short(text: str) -> str:
    return text if len(text) < 1500 else f"{text[:1000]} … {text[-400:]}"


# ---- The parent, which never touches the GPU ---------------------------------------------------------------------------------------


class Player:
    """Starts processes and writes lines."""

    def __init__(self, path: Path, lines: Path | None, *, seconds: float) -> None:
        self.record = Record(path)
        self._path, self._lines = path, lines
        self._end = time.monotonic() + seconds
        self._hangs: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()

    def play(self) -> Counter[str]:
        """Launch everything; how many launches had which outcome."""
        by_source: dict[str, list[int]] = {}
        for number, launch in enumerate(self.record.launches):
            by_source.setdefault(launch["source"], []).append(number)
        for numbers in by_source.values():
            self._launch(numbers)
        return self._outcomes

    def _keep(self, number: int, line: Line) -> None:
        launch = self.record.launches[number]
        null = [name for name, argument in zip(launch["names"], launch["arguments"], strict=True) if argument is None]
        what = {**{key: launch[key] for key in ("source", "kernel", "constants")}, "null": null}
        append(self._lines, {"step": "kernel", **what, "threads": launch["grid"] * launch["block"], **line})
        self._outcomes[line["outcome"]] += 1

    def _launch(self, numbers: list[int]) -> None:
        """Give numbers to processes, one after the other; a new one goes on behind the number that ended the last."""
        left = numbers
        while left := self._due(left):
            with _answering([sys.executable, __file__, str(self._path), "--child"], left) as (answers, said):
                begun, outcome, error = False, "crash", ""
                while left:
                    seconds = LAUNCH_SECONDS if begun else START_SECONDS
                    try:
                        answer = answers.get(timeout=max(min(seconds, self._end - time.monotonic()), 0.0))
                    except queue.Empty:
                        outcome, error = "hang", f"no answer in {seconds:g} s, or the time for everything was up"
                        break
                    if answer is None:
                        error = _short(f"the process ended: {said()}")
                        break
                    begun = True
                    if "begin" not in answer:
                        self._keep(left.pop(0), answer)
                        if answer["outcome"] == "crash":
                            outcome = "said"
                            break
            if not left or outcome == "said":
                continue
            if not begun:  # another one will not begin either
                for number in left:
                    self._keep(number, {"outcome": "not run", "error": f"no process began: {error}"})
                return
            number = left.pop(0)
            if outcome == "hang":
                self._hangs[self.record.launches[number]["kernel"]] += 1
            self._keep(number, {"outcome": outcome, "error": error})

    def _due(self, numbers: list[int]) -> list[int]:
        """What may still run; all else is told why not."""
        late, due = time.monotonic() >= self._end, []
        for number in numbers:
            if late or self._hangs[self.record.launches[number]["kernel"]] >= MAX_HANGS:
                error = "the time was up" if late else f"this kernel has hung {MAX_HANGS} times"
                self._keep(number, {"outcome": "not run", "error": error})
            else:
                due.append(number)
        return due


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


@contextlib.contextmanager
def _answering(command: list[str], numbers: list[int]) -> Iterator[tuple[queue.Queue[Line | None], Callable[[], str]]]:
    """A process that is given numbers: its answers (None: it has ended), and what it said besides."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        options: Line = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True, "errors": "replace"}
        answers: queue.Queue[Line | None] = queue.Queue()
        with process_group(command, **options) as process:

            def read() -> None:
                with cast("Any", process.stdout) as texts:
                    for text in texts:
                        with contextlib.suppress(ValueError):  # half a line of a process that was killed
                            answers.put(json.loads(text))
                answers.put(None)

            def said() -> str:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1.0)
                errors.seek(0)
                return f"status {process.returncode}: {errors.read().strip()}"

            reader = threading.Thread(target=read, daemon=True)
            reader.start()
            with contextlib.suppress(BrokenPipeError), cast("Any", process.stdin) as stdin:
                stdin.write(" ".join(map(str, numbers)))
            yield answers, said
        reader.join(_KILL_SECONDS)


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
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        _child(options.record)
        return 0
    outcomes = Player(options.record, options.output, seconds=options.seconds).play()
    sys.stderr.write(", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items())) + "\n")
    return int(bool(outcomes.keys() - {"right"}))


if __name__ == "__main__":
    sys.exit(main())
