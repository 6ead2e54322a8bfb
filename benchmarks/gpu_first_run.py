"""The first run on a GPU, in three calls of less than ten minutes each.

    python benchmarks/gpu_first_run.py 1|2|3 OUT

A step is a process that is killed at its limit and never ends the call; no call needs another.
OUT/callN.jsonl gets lines of JSON from the steps, and one on how each step ended; what they print
goes to OUT/callN.log. docs/guide/gpu.md says what the machine needs.
"""

from __future__ import annotations

import argparse
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

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

_USES_GPU = re.compile(
    r"\bmark\.gpu\b|^def test_\w+\([^)]*\b(backend|compiled_backend)\b", re.MULTILINE
)
"""What a file with tests of the marker `gpu` has in it.

The marker, or a fixture that gives it to the parameter `cuda`.
"""


class Step(NamedTuple):
    name: str  # unique in its call
    seconds: int  # its limit
    # program and arguments; empty if the program is missing, and the step is noted as skipped
    command: Sequence[object]
    environment: Mapping[str, str] = {}  # variables that are set for it


Call = list[list[Step]]
"""Steps of one list run at the same time; the next list begins when all of them have ended."""


def calls(lines: Path, record: Path, wheels: Sequence[Path], unpacked: Path) -> dict[int, Call]:

    def gpu(seconds: int, *arguments: str) -> list[Step]:
        return [
            Step(
                " ".join(arguments),
                seconds,
                [sys.executable, "-u", HERE / "gpu.py", *arguments, "-o", lines],
            )
        ]

    # Beside the interpreter's packages, not among them: it may be somebody else's.
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-index",
        "--upgrade",
    ]
    begin = [
        [Step("unpack wheels", 30, [*pip, "--target", unpacked, *wheels] if wheels else [])],
        gpu(30, "environment"),
    ]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    sanitizer = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    watched = [
        "--error-exitcode",
        9,
        "--print-limit",
        20,
        sys.executable,
        "-u",
        HERE / "gpu_every_kernel.py",
    ]
    tools = ("memcheck", "synccheck", "racecheck", "initcheck")
    return {
        1: [
            *begin,
            [
                Step(
                    "replay",
                    190,
                    [
                        sys.executable,
                        "-u",
                        HERE / "gpu_replay.py",
                        record,
                        "-o",
                        lines,
                        "--seconds",
                        180,
                    ],
                )
            ],
            gpu(55, "time", "Lm"),
            gpu(55, "time", "Lm-1.5mm"),
            gpu(55, "time", "Lm", "auto"),
        ],
        2: [
            *begin,
            [
                _test(path)
                for path in sorted(ROOT.glob("tests/*/test_*.py"))
                if _USES_GPU.search(path.read_text(encoding="utf-8"))
            ],
            [
                Step(tool, 230, [sanitizer, "--tool", tool, *watched] if sanitizer else [])
                for tool in tools
            ],
        ],
        3: [
            *begin,
            gpu(90, "time", "L"),
            gpu(45, "time", "Lm-mid"),
            gpu(50, "time", "Lm-fine"),
            gpu(40, "time", "Lm-1.5mm", "truncated"),
            gpu(40, "refine", "Lm-1.5mm"),
            gpu(60, "refine", "Lm-1.5mm", "--device", "torch:cuda"),
        ],
    }


def _test(path: Path) -> Step:
    # Other people's warnings are their own business; the engine's are RuntimeWarnings. With a safe
    # path the source tree does not hide an installed package. Many files at once: none has all of
    # the processor.
    options = [
        "-m",
        "gpu",
        "-v",
        "-rs",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",
        "-W",
        "error::RuntimeWarning",
    ]
    environment = {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    name = path.relative_to(ROOT / "tests").with_suffix("").as_posix()
    return Step(f"test {name}", 240, [sys.executable, "-m", "pytest", *options, path], environment)


def run_call(call: Call, lines: Path) -> list[str]:
    """Run all steps, whatever becomes of each; return what went wrong."""
    writing = threading.Lock()
    wrong = []

    def run(step: Step) -> None:
        started = time.monotonic()
        outcome = "skipped"
        status = None
        said = "it is not there"
        if step.command:
            try:
                status, said = run_process(
                    step.command, step.seconds, cwd=ROOT, env={**os.environ, **step.environment}
                )
                outcome = "ended at its limit" if status is None else "failed" if status else "done"
            except OSError as error:
                outcome = "failed"
                said = str(error)
        seconds = round(time.monotonic() - started, 1)
        line = {
            "step": "run",
            "name": step.name,
            "outcome": outcome,
            "status": status,
            "limit": step.seconds,
            "seconds": seconds,
        }
        with writing:
            append(lines, {**line, "said": said[-1500:] if outcome != "done" else ""})
            with lines.with_suffix(".log").open("a", encoding="utf-8") as file:
                file.write(f"==== {step.name}: {outcome}, status {status}\n{said}\n")
            print(f"{step.name}: {outcome}, {seconds:.0f} s", flush=True)
            if outcome not in ("done", "skipped"):
                wrong.append(f"{step.name}: {outcome}")

    for together in call:
        with ThreadPoolExecutor(len(together)) as pool:
            list(pool.map(run, together))
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("call", type=int, choices=(1, 2, 3))
    parser.add_argument(
        "out", type=Path, help="folder; everything that must be carried away is there"
    )
    parser.add_argument(
        "--wheels",
        type=Path,
        default=ROOT / "build" / "wheels",
        help="folder of wheels: this package, nibabel, isal",
    )
    parser.add_argument(
        "--record",
        type=Path,
        default=ROOT / "build" / "gpu-record.npz",
        help="what gpu_record.py has written",
    )
    options = parser.parse_args()
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = options.out.resolve() / f"call{options.call}.jsonl"
    wheels = sorted(options.wheels.resolve().glob("*.whl"))
    unpacked = ROOT / "build" / "gpu-wheels"
    paths = [unpacked] if wheels else []
    if (
        not any(wheel.name.startswith("crfrefine-") for wheel in wheels)
        and importlib.util.find_spec("crfrefine") is None
    ):
        print(
            "there is no wheel of crfrefine: the checkout is used, without a compiled CPU engine "
            "to compare with"
        )
        paths.append(ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    os.environ.setdefault("CUPY_CACHE_DIR", str(ROOT / "build" / "cupy-cache"))
    wrong = run_call(calls(lines, options.record.resolve(), wheels, unpacked)[options.call], lines)
    print(f"{len(wrong)} steps failed, {time.monotonic() - started:.0f} s\n  " + "\n  ".join(wrong))
    sys.exit(int(bool(wrong)))


if __name__ == "__main__":
    main()
