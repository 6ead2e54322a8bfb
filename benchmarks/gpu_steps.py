"""The steps of the first run on a GPU, in three calls (`gpu_first_run.sh`), and how they are run.

Each step is a process in a group of its own, which is killed as a group at its limit, and never ends the call. What steps find, they append
to OUT/callN.jsonl themselves, a line of JSON each; a line here says how each ended. What they print goes to OUT/callN.log.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_replay import append, read_lines

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MOST_SECONDS = 530
"""Of a call, all steps at their limits. Unpacking wheels before has 30 more, so that a call ends within ten minutes."""
TESTS = (
    "tests/engines/test_cuda_gpu.py",
    "tests/engines/test_cuda_refinement.py",
    "tests/engines/test_mean_field.py",
    "tests/engines/test_filters.py",
    "tests/engines/test_backward.py",
    "tests/engines/test_volume.py",
    "tests/layer/test_compile.py",
    "tests/layer/test_crf_loss.py",
    "tests/layer/test_cuda_layer.py",
    "tests/layer/test_layer_intensity.py",
    "tests/train/test_device.py",
)
CASES = ("Lm", "L", "CT")
FILTERS = ("exact", "truncated", "grid", "lattice")
PLAIN = {"CRFREFINE_CUDA": "plain"}
"""CuPy's own memory, and a wait after each launch: what fails here fails for no reason of these."""
_KILL_SECONDS = 5.0


@dataclass(frozen=True)
class Step:
    """A process.

    Attributes:
        name: unique in its call.
        seconds: its limit.
        command: program and arguments; without a program, it is noted as skipped.
        environment: variables that are set for it.
        only_after: it runs only if the step of that name has failed; empty: always.
    """

    name: str
    seconds: int
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    only_after: str = ""


Call = list[list[Step]]
"""Steps of one list run at the same time; the next list begins when all of them have ended."""


def calls(lines: Path, record: Path) -> dict[int, Call]:
    """The three; `lines` is the file that steps append to."""

    def gpu(name: str, seconds: int, *arguments: str, **others: Any) -> Step:
        return Step(name, seconds, [sys.executable, "-u", str(HERE / "gpu.py"), *arguments, "-o", str(lines)], **others)

    def contact(mode: str, environment: Mapping[str, str]) -> list[Step]:
        pairs = [(case, name) for case in CASES for name in FILTERS if (case, name) not in (("Lm", "grid"), ("L", "grid"))]
        return [gpu(f"contact {mode} {case} {name}", 55, "contact", case, name, environment=environment) for case, name in pairs]

    def times(name: str) -> list[list[Step]]:
        plain = gpu(f"time {name} plain", 45, "time", name, environment=PLAIN, only_after=f"time {name}")
        return [[gpu(f"time {name}", 55, "time", name)], [plain]]

    def replay(seconds: int, *options: str) -> Step:
        script = [sys.executable, "-u", str(HERE / "gpu_replay.py"), str(record), "-o", str(lines)]
        return Step("replay", seconds, [*script, "--seconds", str(seconds - 10), *options])

    every_kernel = [sys.executable, "-u", str(HERE / "gpu_every_kernel.py")]
    one_workload = [sys.executable, "-u", str(HERE / "gpu.py"), "time", "Lm", "--once"]
    environment = [gpu("environment", 30, "environment")]
    return {
        1: [
            environment,
            [replay(190)],
            contact("plain", PLAIN),
            contact("all", {}),
            *times("Lm"),
            *times("Lm-1.5mm"),
        ],
        2: [
            environment,
            [replay(80, "--compile-only")],
            [_test(path) for path in TESTS],
            [_sanitizer(tool, every_kernel) for tool in ("memcheck", "synccheck", "racecheck", "initcheck")],
        ],
        3: [
            environment,
            [gpu("time L", 75, "time", "L")],
            [gpu("time Lm-mid", 50, "time", "Lm-mid")],
            [gpu("time Lm-fine", 60, "time", "Lm-fine")],
            [gpu("time Lm auto", 45, "time", "Lm", "auto")],
            [gpu("time Lm-1.5mm truncated", 45, "time", "Lm-1.5mm", "truncated")],
            [gpu("refine", 45, "refine", "Lm-1.5mm")],
            [gpu("peers", 30, "peers")],
            [_ncu(one_workload)],
            [gpu("command", 75, "command", "L")],
        ],
    }


def _test(path: str) -> Step:
    # Other people's warnings are their own business; the engine's are RuntimeWarnings. With a safe path the source tree does not hide an
    # installed package.
    warnings = ["-W", "default", "-W", "error::RuntimeWarning"]
    options = ["-v", "-rs", "--tb=short", "-p", "no:cacheprovider", "-k", "cuda and not shim", *warnings]
    return Step(f"test {Path(path).stem}", 215, [sys.executable, "-m", "pytest", *options, path], {"PYTHONSAFEPATH": "1"})


def _sanitizer(tool: str, command: list[str]) -> Step:
    options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    program = _program("compute-sanitizer")
    return Step(tool, 200, [program, *options, *command] if program else [])


def _ncu(command: list[str]) -> Step:
    metrics = "gpu__time_duration.sum,dram__bytes.sum,lts__t_bytes.sum,sm__warps_active.avg.pct_of_peak_sustained_active"
    program = _program("ncu")
    return Step("ncu", 70, [program, "--csv", "--metrics", metrics, "--launch-count", "150", *command] if program else [])


def _program(name: str) -> str | None:
    """One of NVIDIA's tools, on the path or in a toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]))


def longest(call: Call) -> int:
    """Seconds that a call takes with every step at its limit."""
    return sum(max(step.seconds for step in together) for together in call)


def run_call(call: Call, lines: Path, log: Path) -> None:
    """Run all steps, whatever becomes of each."""
    outcomes: dict[str, str] = {}
    writing = threading.Lock()

    def run(step: Step) -> None:
        started = time.monotonic()
        outcome, status, said = run_step(step) if step.command else ("skipped", None, "it is not installed")
        line = {"step": "run", "name": step.name, "outcome": outcome, "status": status, "limit": step.seconds}
        with writing:
            outcomes[step.name] = outcome
            append(lines, {**line, "seconds": round(time.monotonic() - started, 1), "said": said[-1500:] if outcome != "done" else ""})
            with log.open("a", encoding="utf-8") as file:
                file.write(f"==== {step.name}: {outcome}, status {status}\n{said}\n")
            print(f"{step.name}: {outcome}, {time.monotonic() - started:.0f} s", flush=True)

    for together in call:
        due = [step for step in together if not step.only_after or outcomes.get(step.only_after) not in ("done", "skipped")]
        threads = [threading.Thread(target=run, args=(step,)) for step in due]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def run_step(step: Step) -> tuple[str, int | None, str]:
    """Run a process and whatever it starts, at most until its limit: how it ended, its status, and what it said."""
    with tempfile.TemporaryFile() as said:  # no pipe, which a process outside of the group could keep open for ever
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env={**os.environ, **step.environment},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return "failed", None, str(error)
        try:
            status: int | None = process.wait(timeout=step.seconds)
            outcome = "failed" if status else "done"
        except subprocess.TimeoutExpired:
            outcome, status = "ended at its limit", None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # in the kernel, as processes of a GPU that hangs may be
            process.wait(timeout=_KILL_SECONDS)
        said.seek(0)
        return outcome, status, said.read().decode(errors="replace").strip()


def failed_runs(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """What lines say of steps that failed."""
    return [
        f"{line['name']}: {line['outcome']}" for line in found if line.get("step") == "run" and line["outcome"] not in ("done", "skipped")
    ]


def main() -> None:
    """Run a call."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("call", type=int, choices=(1, 2, 3))
    parser.add_argument("out", type=Path)
    parser.add_argument("--record", type=Path, required=True)
    options = parser.parse_args()
    lines = options.out / f"call{options.call}.jsonl"
    started = time.monotonic()
    run_call(calls(lines, options.record)[options.call], lines, lines.with_suffix(".log"))
    wrong = failed_runs(read_lines([lines]))
    print(f"{len(wrong)} steps failed, {time.monotonic() - started:.0f} s\n  " + "\n  ".join(wrong))
    sys.exit(int(bool(wrong)))


if __name__ == "__main__":
    main()
