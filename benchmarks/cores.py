"""Times on one thread to all: the engine, folders of cases, and training.

    python benchmarks/cores.py [--threads 1 2 ...] [engine] [infer] [train]

The engine runs on the workload Lm (1.4 million masked voxels) with each filter, forward and
backward; `infer` and `train-crf` on the cases of CRFREFINE_DATA. Writes the tables between the
markers of `docs/reference/benchmarks.md`; of three runs, the fastest counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from report import describe, markdown_table, provenance, write_between_markers
from scripts import BENCH, DATA, ROOT
from workers.measure import Workload
from workloads import WORKLOADS, store

from crfrefine.layer.functional import mean_field

PAGE = ROOT / "docs" / "reference" / "benchmarks.md"
REPEATS = 3
NUM_TRAINED = 20  # cases of the training
# Bandwidths with which each filter is used: theta_alpha in mm, theta_beta.
FILTERS = {"lattice": (8.0, 0.1), "truncated": (2.0, 0.05)}
STAGES = ("read", "refine", "write")


def times_in_turn(
    work: Callable[[int], float], threads: Sequence[int], repeats: int = REPEATS
) -> list[float]:
    """Return the shortest time for each number of threads, all measured in turn."""
    times = [float("inf")] * len(threads)
    for _ in range(repeats):
        for place, number in enumerate(threads):
            times[place] = min(times[place], work(number))
    return times


def shortest_time(work: Callable[[int], float], threads: int) -> float:
    """Return the shortest time of runs one after the other.

    The first run of a command may have to wait for memory that a virtual machine's host has taken
    back since a larger one; in turn with smaller ones, each would wait.
    """
    return min(work(threads) for _ in range(REPEATS))


def row(name: str, times: Sequence[float]) -> list[str]:
    """A table's row: the times, and how many times as fast each is as the first."""
    cells = [name]
    for seconds in times:
        cells.append(f"{seconds:.2f} s ({times[0] / seconds:.1f}×)")
    return cells


def engine_rows(threads: Sequence[int]) -> list[list[str]]:
    """Time the mean field of Lm with each filter, without and with gradients."""
    workload = Workload(store(WORKLOADS["Lm"], BENCH / "data"))
    rows = []
    for name in FILTERS:
        for passes in ("forward", "forward and backward"):
            work = partial(engine_seconds, workload, name, passes != "forward")
            rows.append(row(f"Lm, {name}, {passes}", times_in_turn(work, threads)))
    return rows


def engine_seconds(workload: Workload, name: str, has_gradients: bool, threads: int) -> float:
    """Run the mean field with a filter once; return its seconds."""
    theta_alpha, theta_beta = FILTERS[name]
    image = torch.from_numpy(workload.image.astype(np.float32) / np.float32(255.0))[None]
    alpha = torch.tensor(theta_alpha, requires_grad=has_gradients)
    started = time.perf_counter()
    refined = mean_field(
        torch.from_numpy(workload.logits)[None],
        image,
        bilateral=[(3.0, alpha, theta_beta)],
        spatial=(1.0, 3.0),
        spacing=WORKLOADS["Lm"].spacing,
        mask=torch.from_numpy(workload.mask),
        filter=name,
        threads=threads,
    )
    if has_gradients:
        refined.square().mean().backward()
    return time.perf_counter() - started


def command_seconds(*arguments: object) -> float:
    """Run a command of the program; return its seconds."""
    started = time.perf_counter()
    words = [sys.executable, "-P", "-m", "crfrefine", *map(str, arguments), "-q"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def infer_rows(threads: Sequence[int]) -> list[list[str]]:
    """Time `infer` of folders, with the stages of a run with one thread."""
    rows = []
    for title, folder, preset in (
        ("`infer`, 120 hippocampi", "hippocampus", "default"),
        ("`infer`, 4 heads (BraTS)", "brats2015", "brats"),
    ):
        with tempfile.TemporaryDirectory(dir=BENCH) as place:
            output = Path(place) / "out"
            work = partial(infer_seconds, DATA / folder, preset, output)
            times = [shortest_time(work, number) for number in threads]
            work(1)
            rows.append(row(f"{title} ({stage_shares(output)})", times))
    return rows


def infer_seconds(folder: Path, preset: str, output: Path, threads: int) -> float:
    """Refine a folder of cases; return the seconds."""
    shutil.rmtree(output, ignore_errors=True)
    inputs = ("-i", folder / "images", "-p", folder / "logits", "-o", output)
    return command_seconds("infer", *inputs, "-c", preset, "--threads", threads)


def stage_shares(output: Path) -> str:
    """Return how the time of the cases of a run divides into stages."""
    (record,) = (output / ".crfrefine").glob("*.jsonl")
    seconds = dict.fromkeys(STAGES, 0.0)
    for line in record.read_text().splitlines()[1:]:
        for stage in STAGES:
            seconds[stage] += json.loads(line)["times"][stage]
    total = sum(seconds.values())
    return ", ".join(f"{stage} {seconds[stage] / total:.0%}" for stage in STAGES)


def train_rows(threads: Sequence[int]) -> list[list[str]]:
    """Time `train-crf` once for each number of threads."""
    source = DATA / "hippocampus"
    cases = sorted(path.name.split(".")[0] for path in (source / "labels").iterdir())
    with tempfile.TemporaryDirectory(dir=BENCH) as place:
        folder = Path(place)
        for case in cases[:: len(cases) // NUM_TRAINED][:NUM_TRAINED]:
            for name in (
                f"images/{case}_0000.nii.gz",
                f"labels/{case}.nii.gz",
                f"logits/{case}.nii.gz",
            ):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).symlink_to(source / name)
        times = times_in_turn(partial(train_seconds, folder), threads, repeats=1)
    return [row(f"`train-crf`, {NUM_TRAINED} hippocampi", times)]


def train_seconds(folder: Path, threads: int) -> float:
    """Train on a folder of cases; return the seconds."""
    options: list[object] = ["-o", folder / "p.toml", "--threads", threads]
    for name in ("images", "labels", "logits"):
        options += [f"--{name}", folder / name]
    return command_seconds("train-crf", *options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["engine", "infer", "train"])
    parser.add_argument("--threads", type=int, nargs="+")
    options = parser.parse_args()
    torch.set_num_threads(1)
    num_cores = len(os.sched_getaffinity(0))
    threads = options.threads or [2**power for power in range(num_cores.bit_length())]
    makers = {"engine": engine_rows, "infer": infer_rows, "train": train_rows}
    rows = []
    for part in options.parts:
        rows += makers[part](threads)
    header = ["what", *(f"{number} threads" if number > 1 else "1 thread" for number in threads)]
    text = f"\n{markdown_table(header, rows)}\n{provenance(describe())}\n"
    write_between_markers(PAGE, "cores", text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
