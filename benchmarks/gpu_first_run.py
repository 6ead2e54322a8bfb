"""The first run on a GPU, in three calls of less than ten minutes each.

    python benchmarks/gpu_first_run.py 1|2|3 OUT

A step is a process that is killed at its limit and never ends the call; no call needs another.
OUT/callN.jsonl gets lines of JSON from the steps, and one on how each step ended; what they print
goes to OUT/callN.log. docs/guide/gpu.md says what the machine needs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from gpu_replay import append, run_process
from scripts import ROOT, new_parser

# What a file with tests of the marker `gpu` has in it: the marker, or a fixture that gives it to
# the parameter `cuda`.
_USES_GPU = re.compile(
    r"\bmark\.gpu\b|^def test_\w+\([^)]*\b(backend|compiled_backend)\b", re.MULTILINE
)
# With a safe path the source tree does not hide an installed package. Many files at once: none has
# all of the processor.
_TEST_ENVIRONMENT = {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Step(NamedTuple):
    name: str  # unique in its call
    seconds: int  # its limit
    # program and arguments; empty if the program is missing, and the step is noted as skipped
    command: Sequence[object]
    environment: Mapping[str, str] = {}  # variables that are set for it


Call = list[list[Step]]
"""Steps of one list run at the same time; the next list begins when all of them have ended."""


def python(words: str, *more: object) -> list[object]:
    """The command of this Python with some words and more arguments."""
    return [sys.executable, *words.split(), *more]


def calls(lines: Path, record: Path, wheels: Sequence[Path], unpacked: Path) -> dict[int, Call]:
    def gpu(seconds: int, words: str) -> list[Step]:
        command = python(f"-u benchmarks/gpu.py {words} -o", lines)
        return [Step(words, seconds, command)]

    replay = python("-u benchmarks/gpu_replay.py --seconds 180", record, "-o", lines)
    begin = [[_unpack(wheels, unpacked)], gpu(30, "environment")]
    times = [gpu(55, "time Lm"), gpu(55, "time Lm-1.5mm"), gpu(55, "time Lm auto")]
    more_times = [
        gpu(90, "time L"),
        gpu(45, "time Lm-mid"),
        gpu(50, "time Lm-fine"),
        gpu(40, "time Lm-1.5mm truncated"),
        gpu(40, "refine Lm-1.5mm"),
        gpu(60, "refine Lm-1.5mm --device torch:cuda"),
    ]
    return {
        1: [*begin, [Step("replay", 190, replay)], *times],
        2: [*begin, _tests(), _sanitizers()],
        3: [*begin, *more_times],
    }


def _unpack(wheels: Sequence[Path], unpacked: Path) -> Step:
    """Beside the interpreter's packages, not among them: it may be somebody else's."""
    if not wheels:
        return Step("unpack wheels", 30, [])
    options = "--quiet --disable-pip-version-check --no-deps --no-index --upgrade --target"
    return Step("unpack wheels", 30, python(f"-m pip install {options}", unpacked, *wheels))


def _tests() -> list[Step]:
    """Each file with tests for a GPU.

    Other people's warnings are their own business; the engine's are RuntimeWarnings.
    """
    options = "-m gpu -v -rs --tb=short -p no:cacheprovider -W default -W error::RuntimeWarning"
    steps = []
    for path in sorted(ROOT.glob("tests/*/test_*.py")):
        if _USES_GPU.search(path.read_text(encoding="utf-8")):
            name = path.relative_to(ROOT / "tests").with_suffix("").as_posix()
            command = python(f"-m pytest {options}", path)
            steps.append(Step(f"test {name}", 240, command, _TEST_ENVIRONMENT))
    return steps


def _sanitizers() -> list[Step]:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    sanitizer = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    steps = []
    for tool in ("memcheck", "synccheck", "racecheck", "initcheck"):
        command: list[object] = []
        if sanitizer is not None:
            command = [sanitizer, *f"--tool {tool} --error-exitcode 9 --print-limit 20".split()]
            command += python("-u benchmarks/gpu_every_kernel.py")
        steps.append(Step(tool, 230, command))
    return steps


def run_call(call: Call, lines: Path) -> list[str]:
    """Run all steps, whatever becomes of each; return what went wrong."""
    writing = threading.Lock()
    wrong = []

    def run(step: Step) -> None:
        started = time.monotonic()
        outcome, status, said = run_step(step)
        seconds = round(time.monotonic() - started, 1)
        line = {"step": "run", "name": step.name, "outcome": outcome, "status": status}
        line |= {"limit": step.seconds, "seconds": seconds, "said": ""}
        if outcome != "done":
            line["said"] = said[-1500:]
        with writing:
            append(lines, line)
            with lines.with_suffix(".log").open("a", encoding="utf-8") as file:
                file.write(f"==== {step.name}: {outcome}, status {status}\n{said}\n")
            print(f"{step.name}: {outcome}, {seconds:.0f} s", flush=True)
            if outcome not in ("done", "skipped"):
                wrong.append(f"{step.name}: {outcome}")

    for together in call:
        with ThreadPoolExecutor(len(together)) as pool:
            list(pool.map(run, together))
    return wrong


def run_step(step: Step) -> tuple[str, int | None, str]:
    """The outcome of a step, its exit status and what it said."""
    if not step.command:
        return "skipped", None, "it is not there"
    environment = {**os.environ, **step.environment}
    try:
        status, said = run_process(step.command, step.seconds, cwd=ROOT, env=environment)
    except OSError as error:
        return "failed", None, str(error)
    if status is None:
        return "ended at its limit", status, said
    if status != 0:
        return "failed", status, said
    return "done", status, said


def main() -> None:
    build = ROOT / "build"
    parser = new_parser(__doc__)
    parser.add_argument("call", type=int, choices=(1, 2, 3))
    parser.add_argument("out", type=Path, help="folder for all that must be carried away")
    wheels_help = "folder of wheels: this package, nibabel, isal"
    parser.add_argument("--wheels", type=Path, default=build / "wheels", help=wheels_help)
    record_help = "what gpu_record.py has written"
    parser.add_argument("--record", type=Path, default=build / "gpu-record.npz", help=record_help)
    options = parser.parse_args()
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = options.out.resolve() / f"call{options.call}.jsonl"
    wheels = sorted(options.wheels.resolve().glob("*.whl"))
    unpacked = build / "gpu-wheels"
    paths = [str(unpacked)] if wheels else []
    has_wheel = any(wheel.name.startswith("crfrefine-") for wheel in wheels)
    if not has_wheel and importlib.util.find_spec("crfrefine") is None:
        print("there is no wheel of crfrefine: the checkout is used, without a compiled CPU engine")
        paths.append(str(ROOT))
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ.setdefault("CUPY_CACHE_DIR", str(build / "cupy-cache"))
    wrong = run_call(calls(lines, options.record.resolve(), wheels, unpacked)[options.call], lines)
    print(f"{len(wrong)} steps failed, {time.monotonic() - started:.0f} s\n  " + "\n  ".join(wrong))
    sys.exit(int(bool(wrong)))


if __name__ == "__main__":
    main()
