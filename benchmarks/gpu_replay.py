"""Plays recorded launches of the GPU engine's kernels on a GPU (`gpu_record.py` makes the record): right or wrong, and how fast.

    python benchmarks/gpu_replay.py RECORD.npz -o LINES.jsonl     # on the machine with the GPU: CuPy and numpy, nothing else
    python benchmarks/gpu_replay.py --table LINES.jsonl           # anywhere

All sources are compiled first, many at once. Then each source has a process of its own, which launches its kernels one by one and waits
after each. A process that hangs, crashes or has an error of CUDA is ended with its whole group, and a new one goes on behind the launch
that it was at. LINES gets a line of JSON per launch, as soon as it is known.

Integers must be equal. Numbers may differ by `TOLERANCES` times the largest that the launch writes into the same array: a GPU fuses
multiplications and additions, and its powers of two are good to two units in the last place; neither is so where the record was made. What
depends on the order of threads there is compared as a set, or not at all (`orders` in the line). Outside of its arrays a kernel must
write nothing.
"""

from __future__ import annotations

import argparse
import contextlib
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np

Line = dict[str, Any]

# Of a sum of hundreds of numbers in float32, 1e-6 is usual.
TOLERANCES = {"float32": 2e-5, "float64": 1e-11}
REPEATS = 10
START_SECONDS, COMPILE_SECONDS, LAUNCH_SECONDS = 60.0, 90.0, 15.0
MOST_HANGS = 2
"""Of a kernel: more of its launches would take the time of others."""
_KILL_SECONDS = 5.0
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


def _compile(cupy: Any, record: Record, text: int, kernel: str) -> Any:
    options = tuple(record.texts[text]["options"])
    return cupy.RawModule(code=record.code(text), options=options, backend="nvrtc").get_function(kernel)


def compile_one(cupy: Any, record: Record, text: int) -> Line:
    """Compile a text, into CuPy's cache."""
    kernel = next(launch["kernel"] for launch in record.launches if launch["text"] == text)
    started = time.perf_counter()
    try:
        _compile(cupy, record, text, kernel)
    except Exception as error:  # of CuPy or NVRTC: what it says is the outcome
        return {"outcome": "compile error", "error": _short(f"{type(error).__name__}: {error}")}
    return {"outcome": "compiled", "compile_seconds": round(time.perf_counter() - started, 3)}


def launch_one(cupy: Any, record: Record, number: int) -> Line:
    """Launch a kernel, compare what it leaves, and time it."""
    launch = record.launches[number]
    pieces = record.memory(launch)
    function = _compile(cupy, record, launch["text"], launch["kernel"])
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
    return {**line, "microseconds": round(1e6 * seconds, 2), "bytes": num_bytes, "gb_per_second": speed}


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
        share, num_wrong = _differences(before, expected, got, is_double=bool(launch["constants"].get("CRF_DOUBLE")))
        line["difference"] = max(line["difference"], share)
        if num_wrong:
            where = f"{num_wrong} of {got.size} numbers of argument {number} ({launch['names'][number]}, {argument['dtype']})"
            line |= {"outcome": "wrong", "error": line.get("error", f"{where} differ, by up to {share:.2g} of the largest")}
    return line


def _differences(before: Any, expected: Any, got: Any, *, is_double: bool) -> tuple[float, int]:
    """The largest difference as a share of the largest number that is written, and how many numbers differ by too much."""
    if expected.dtype.kind != "f":
        wrong = got != expected
        largest = np.abs(got[wrong].astype(np.float64) - expected[wrong].astype(np.float64)).max(initial=0.0)
        return float(largest / max(np.abs(expected.astype(np.float64)).max(), 1.0)), int(wrong.sum())
    dtype = "float32" if expected.dtype == np.float64 and not is_double else str(expected.dtype)  # sums of float32
    before, expected, got = (array.astype(np.float64) for array in (before, expected, got))
    with np.errstate(invalid="ignore"):
        written = np.isfinite(expected) & (before != expected)
        scale = max(np.abs(expected[written]).max(initial=0.0), 1e-30)
        same = (got == expected) | (np.isnan(got) & np.isnan(expected))
        share = np.where(same, 0.0, np.abs(got - expected) / scale)
    share = np.nan_to_num(share, nan=np.inf)
    return float(share.max()), int((share > TOLERANCES[dtype]).sum())


def _child(mode: str, path: Path) -> None:
    """Do what the standard input names, a number a line; answer in lines of JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # others may print
    numbers = [int(word) for word in sys.stdin.read().split()]
    record = Record(path)
    import cupy

    for number in numbers:
        answers.write(json.dumps({"begin": number}) + "\n")
        try:
            line = compile_one(cupy, record, number) if mode == "compile" else launch_one(cupy, record, number)
        except Exception as error:  # after an error of CUDA nothing works in this process any more
            answers.write(json.dumps({"outcome": "crash", "error": _short(f"{type(error).__name__}: {error}")}) + "\n")
            os._exit(1)
        answers.write(json.dumps(line) + "\n")


def _short(text: str) -> str:
    return text if len(text) < 1500 else f"{text[:1000]} … {text[-400:]}"


# ---- The parent, which never touches the GPU ---------------------------------------------------------------------------------------


class Player:
    """Starts processes and writes lines."""

    def __init__(self, path: Path, write: Callable[[Line], None], *, seconds: float, limits: tuple[float, float, float]) -> None:
        self.record = Record(path)
        self._path, self._write = path, write
        self._end = time.monotonic() + seconds
        self._start_seconds = limits[0]
        self._seconds = {"compile": limits[1], "launch": limits[2]}
        self._hangs: Counter[str] = Counter()

    def play(self, *, num_compilers: int, compile_only: bool = False) -> Counter[str]:
        """Compile everything, launch everything; how many launches had which outcome."""
        compiled: dict[int, Line] = {}
        texts = list(range(len(self.record.texts)))
        with ThreadPoolExecutor(num_compilers) as pool:
            list(pool.map(lambda i: self._work("compile", texts[i::num_compilers], compiled.__setitem__), range(num_compilers)))
        outcomes: Counter[str] = Counter()
        by_source: dict[str, list[int]] = {}

        def keep(number: int, line: Line) -> None:
            launch = self.record.launches[number]
            text = compiled[launch["text"]]
            what = {"source": self.record.texts[launch["text"]]["source"], "kernel": launch["kernel"], "constants": launch["constants"]}
            self._write(
                {
                    "step": "kernel",
                    **what,
                    "threads": launch["grid"] * launch["block"],
                    "compile_seconds": text.get("compile_seconds"),
                    **line,
                }
            )
            outcomes[line["outcome"]] += 1

        for number, launch in enumerate(self.record.launches):
            if compiled[launch["text"]]["outcome"] != "compiled":
                keep(number, compiled[launch["text"]])
            elif compile_only:
                outcomes["compiled"] += 1
            else:
                by_source.setdefault(self.record.texts[launch["text"]]["source"], []).append(number)
        for numbers in by_source.values():
            self._work("launch", numbers, keep)
        return outcomes

    def _work(self, mode: str, numbers: list[int], keep: Callable[[int, Line], None]) -> None:
        """Give numbers to processes, one after the other; a new one goes on behind the number that ended the last."""
        left = numbers
        while left := self._due(mode, left, keep):
            with _process([sys.executable, __file__, str(self._path), "--child", mode], left) as (answers, said):
                begun, outcome, error = False, "crash", ""
                while left:
                    seconds = self._seconds[mode] if begun else self._start_seconds
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
                        keep(left.pop(0), answer)
                        if answer["outcome"] == "crash":
                            outcome = "said"
                            break
            if not left or outcome == "said":
                continue
            if not begun:  # another one will not begin either
                for number in left:
                    keep(number, {"outcome": "not run", "error": f"no process began: {error}"})
                return
            number = left.pop(0)
            if mode == "launch" and outcome == "hang":
                self._hangs[self.record.launches[number]["kernel"]] += 1
            keep(number, {"outcome": outcome, "error": error})

    def _due(self, mode: str, numbers: list[int], keep: Callable[[int, Line], None]) -> list[int]:
        """What may still run; all else is told why not."""
        late, due = time.monotonic() >= self._end, []
        for number in numbers:
            if late or (mode == "launch" and self._hangs[self.record.launches[number]["kernel"]] >= MOST_HANGS):
                error = "the time was up" if late else f"this kernel has hung {MOST_HANGS} times"
                keep(number, {"outcome": "not run", "error": error})
            else:
                due.append(number)
        return due


@contextlib.contextmanager
def _process(command: list[str], numbers: list[int]) -> Iterator[tuple[queue.Queue[Line | None], Callable[[], str]]]:
    """A process in a group of its own: its answers (None: it has ended), and what it said besides. At the end, its group is killed."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", start_new_session=True
        )
        answers: queue.Queue[Line | None] = queue.Queue()

        def read() -> None:
            for text in cast("Any", process.stdout):
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
        try:
            with contextlib.suppress(BrokenPipeError), cast("Any", process.stdin) as stdin:
                stdin.write(" ".join(map(str, numbers)))
            yield answers, said
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # in the kernel, as processes of a GPU that hangs may be
                process.wait(timeout=_KILL_SECONDS)
                reader.join()
                cast("Any", process.stdout).close()


def table(lines: Sequence[Line]) -> str:
    """Of lines: how many launches had which outcome, then each of them, the wrong ones first."""
    from markdown_table import markdown_table

    found = [line for line in lines if line.get("step") == "kernel"]
    found.sort(key=lambda line: (line["outcome"] == "right", line["source"], line["kernel"], str(line["constants"])))
    counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(Counter(line["outcome"] for line in found).items()))
    rows = [
        [
            f"{line['source']}.{line['kernel']}",
            ", ".join(f"{name.removeprefix('CRF_').lower()} {value}" for name, value in sorted(line["constants"].items())),
            line["outcome"],
            *(f"{line[key]:.3g}" if line.get(key) is not None else "–" for key in ("difference", "microseconds", "gb_per_second")),
            line.get("error", "").split("\n")[0].replace("|", "/")[:160],
        ]
        for line in found
    ]
    header = ["kernel", "constants", "outcome", "largest difference", "µs", "GB/s", "what is wrong"]
    return f"{len(found)} launches: {counts}\n\n" + markdown_table(header, rows)


def read_lines(paths: Sequence[Path]) -> list[Line]:
    """All lines of JSON; the last one of a process that was killed may be cut off, and is left out."""
    found = []
    for path in paths:
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(text))
    return found


def append(path: Path, line: Line) -> None:
    """Add a line, at once and whole: several processes may write."""
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Play, or make the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", nargs="?", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="file to which lines are appended")
    parser.add_argument("--seconds", type=float, default=500.0, help="for everything; what has not run then gets lines that say so")
    parser.add_argument("--limits", type=float, nargs=3, default=(START_SECONDS, COMPILE_SECONDS, LAUNCH_SECONDS), help=argparse.SUPPRESS)
    parser.add_argument("--compilers", type=int, default=len(os.sched_getaffinity(0)), help="processes that compile at once")
    parser.add_argument("--compile-only", action="store_true", help="fill CuPy's cache")
    parser.add_argument("--table", nargs="+", type=Path, metavar="LINES", help="print the table of such files")
    parser.add_argument("--child", choices=("compile", "launch"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.table:
        sys.stdout.write(table(read_lines(options.table)))
        return 0
    if options.record is None:
        parser.error("expected a record (gpu_record.py makes one), or --table")
    if options.child:
        _child(options.child, options.record)
        return 0

    def write(line: Line) -> None:
        if options.output is not None:
            append(options.output, line)
        else:
            print(json.dumps(line), flush=True)

    player = Player(options.record, write, seconds=options.seconds, limits=tuple(options.limits))
    outcomes = player.play(num_compilers=options.compilers, compile_only=options.compile_only)
    sys.stderr.write(", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items())) + "\n")
    return int(bool(outcomes.keys() - {"right", "compiled"}))


if __name__ == "__main__":
    sys.exit(main())
