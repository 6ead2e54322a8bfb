"""Does a network segment better if a CRF learns with it? The reference paper's experiment, for `docs/reference/end-to-end.md`.

Usage: study_end_to_end.py [FOLDER ...] [--cases 8 24 all] [--folds 1 2 ...] [--workers N] [--max-hours H] [--quick] [-o OUTPUT]

FOLDER holds images/ labels/ dataset.json. Default: hippocampus of $CRFREFINE_DATA, whose tables go into docs/reference/end-to-end.md.
Stopped at any point, the same command goes on. Several commands may work on other folds at the same time, with the same OUTPUT.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path

import environment
import numpy as np
from end_to_end_arms import Setup, Unit, run_unit
from end_to_end_findings import ENVIRONMENT, find_results
from end_to_end_tables import make_sections
from end_to_end_training import TimeIsUpError, Watch
from peers import BENCH, ROOT
from report import write_between_markers
from study_stages import say

from crfrefine.apps.demo.phantom import make_phantom, write_phantom
from crfrefine.cases.dataset_description import read_dataset_description
from crfrefine.cases.discovery import discover_cases
from crfrefine.errors import CrfRefineError
from crfrefine.io.atomic import atomic_files
from crfrefine.train.folds import make_folds

DOCUMENT = ROOT / "docs" / "reference" / "end-to-end.md"
DEFAULT, NUM_FOLDS, SEED = "hippocampus", 5, 0
SETUPS = {
    DEFAULT: Setup(sides=(32, 48, 32)),
    "atrium": Setup(sides=(64, 64, 32), shrink=2),
    "acdc": Setup(sides=(96, 96, 8)),
}
OTHER = Setup(sides=(64, 64, 32))
TASTE = {"num_steps": 6, "num_further_steps": 6, "num_crf_steps": 2, "width": 4}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A network alone, with a CRF that learns with it, and with a CRF added at the end.")
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="FOLDER", help=f"holds images/ labels/; default: {DEFAULT} of $CRFREFINE_DATA"
    )
    parser.add_argument(
        "--cases", nargs="+", default=["8", "24", "all"], metavar="N", help="to train on, a number or all; default: 8 24 all"
    )
    parser.add_argument("--folds", nargs="+", type=int, metavar="K", help=f"which of {NUM_FOLDS}; default: all")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="trainings at a time, a core each")
    parser.add_argument("--max-hours", type=float, metavar="H", help="stop after so long; the same command goes on")
    parser.add_argument("--quick", action="store_true", help="a taste on generated cases: under a minute; proves nothing")
    parser.add_argument("-o", "--output", type=Path, metavar="OUTPUT", help="default: .bench/end_to_end, or .bench/end_to_end_quick")
    parser.add_argument("--document", type=Path, metavar="FILE", help="gets the tables; default, of a study without FOLDER: the page above")
    options = parser.parse_args()
    for wanted in options.cases:
        if wanted != "all" and not (wanted.isdecimal() and int(wanted) > 0):
            parser.error(f"--cases: expected numbers above 0, or all; got {wanted}")
    if options.workers < 1:
        parser.error(f"--workers: expected 1 or more, got {options.workers}")
    num_folds = 2 if options.quick else NUM_FOLDS
    options.folds = options.folds or list(range(1, num_folds + 1))
    if not set(options.folds) <= set(range(1, num_folds + 1)):
        parser.error(f"--folds: expected numbers from 1 to {num_folds}, got {' '.join(map(str, options.folds))}")
    return options


def make_units(folder: Path, options: argparse.Namespace, output: Path) -> list[Unit]:
    """Return what there is to train on a folder: few cases first, fold by fold."""
    missing = [name for name in ("images", "labels", "dataset.json") if not (folder / name).exists()]
    if missing:
        raise SystemExit(f"study: {folder}: no {', '.join(missing)}; expected images/ labels/ dataset.json")
    description = read_dataset_description(folder)
    assert description is not None
    names = tuple(description.label_names.get(label, str(label)) for label in range(description.num_labels))
    files = [case for case in discover_cases(folder / "images", None, None, folder / "labels") if case.labels is not None]
    setup = SETUPS.get(folder.name, OTHER)
    folds = make_folds(len(files), 2 if options.quick else NUM_FOLDS, SEED)
    units = []
    for wanted in options.cases:
        for fold in options.folds:
            split = folds[fold - 1]
            order = np.random.default_rng([SEED, fold]).permutation(split.seen)
            if wanted != "all" and int(wanted) > len(order):
                raise SystemExit(f"study: {folder}: --cases {wanted}, but fold {fold} has {len(order)} cases to train on")
            chosen = sorted(order if wanted == "all" else order[: int(wanted)])
            seen, held_out = (tuple(files[number] for number in part) for part in (chosen, split.held_out))
            name, home = f"{folder.name}, {wanted} cases, fold {fold}", output / folder.name / f"cases_{wanted}" / f"fold_{fold}"
            units.append(Unit(name, home, seen, held_out, names, replace(setup, **TASTE) if options.quick else setup, SEED + 10 * fold))
    return units


def train_unit(unit: Unit, deadline: float) -> None:
    """Train and measure what a process is given, until the time is up or the command that started the process is gone."""
    parent = os.getppid()
    run_unit(unit, Watch(lambda text: say(f"{unit.name}: {text}"), lambda: time.time() > deadline or os.getppid() != parent))
    head = json.dumps(environment.describe("torch"), indent=1)
    with atomic_files(unit.folder / ENVIRONMENT) as (stream,):
        stream.write(head.encode())


def train_all(units: Sequence[Unit], options: argparse.Namespace) -> list[str]:
    """Train several at a time; return what went wrong, a sentence each."""
    hours = float("inf") if options.max_hours is None else options.max_hours
    work, problems, started = partial(train_unit, deadline=time.time() + 3600 * hours), [], time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=min(options.workers, len(units)), mp_context=context) as pool:
        waiting = {pool.submit(work, unit): unit for unit in units}
        for number, done in enumerate(as_completed(waiting), start=1):
            unit = waiting[done]
            try:
                done.result()
                say(f"{number} of {len(units)}: {unit.name} is complete, {(time.monotonic() - started) / 60:.0f} minutes so far")
            except TimeIsUpError as error:
                problems.append(f"{unit.name}: {error}")
            except CrfRefineError as error:
                problems.append(f"{unit.name}: {error}")
                say(problems[-1])
    return problems


def write_generated_cases(folder: Path, count: int = 6) -> Path:
    """Write small phantoms, for a taste, unless they are there; return the folder."""
    if (folder / "dataset.json").exists():
        return folder
    for seed in range(count):
        write_phantom(make_phantom(seed, (28, 24, 12), (1.0, 1.2, 2.5)), folder, f"case{seed}")
    labels = {"background": 0, "shell": 1, "core": 2, "cyst": 3}
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "first", "1": "second"}, "labels": labels}))
    return folder


def main() -> None:
    options = parse_options()
    output = (options.output or BENCH / ("end_to_end_quick" if options.quick else "end_to_end")).resolve()
    folders = [folder.resolve() for folder in options.folders]
    if options.quick:
        folders, options.cases = folders or [write_generated_cases(output / "generated")], ["2"]
    elif not folders:
        if "CRFREFINE_DATA" not in os.environ:
            raise SystemExit(f"study: name a folder that holds images/ labels/, or set CRFREFINE_DATA to the one above {DEFAULT}/")
        folders = [Path(os.environ["CRFREFINE_DATA"]).resolve() / DEFAULT]
        options.document = options.document or DOCUMENT
    problems = train_all([unit for folder in folders for unit in make_units(folder, options, output)], options)
    sections = make_sections(find_results(output))
    (output / "results.md").write_text("\n".join(sections.values()))
    if options.document is not None:
        for marker, text in sections.items():
            write_between_markers(options.document, marker, text)
    sys.stdout.write("\n".join(sections.values()))
    if problems:
        raise SystemExit("study: not everything is there:\n" + "\n".join(f"  {problem}" for problem in problems))


if __name__ == "__main__":
    try:
        main()
    except CrfRefineError as error:
        sys.exit(f"study: {error}")
