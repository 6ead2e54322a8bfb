"""The whole chain on labeled cases, by the project's own commands: train-crf with folds, infer, evaluate; for `docs/reference/results.md`.

Usage: study.py [FOLDER ...] [--logits NAME ...] [--regions NAME=1+3+4 ...] [--quick] [-o OUTPUT]

FOLDER holds images/ labels/ logits/ and may hold logits_*/ masks/ dataset.json. Default: the data sets of $CRFREFINE_DATA, whose tables go
into docs/reference/results.md. Stopped at any point, the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from peers import BENCH, ROOT
from report import write_between_markers
from study_chain import Study, link_cases, run_study
from study_stages import say
from study_tables import Findings, paper_table, read_findings, study_section, summary_table

DATASETS = {"hippocampus": (), "brats2015": ("whole=1+2+3+4", "core=1+3+4", "enhancing=4")}
"""Of $CRFREFINE_DATA, with their regions."""

QUICK_CASES = 6
QUICK_TRAINING = ("--folds", "2", "--num-iterations", "6")
DOCUMENT = ROOT / "docs" / "reference" / "results.md"


def find_logits(data: Path, wanted: list[str] | None) -> list[str]:
    """Names of the folders of logits; stops with a sentence where something is missing."""
    missing = [name for name in ("images", "labels", *(wanted or ())) if not (data / name).is_dir()]
    if missing:
        raise SystemExit(f"study: {data}: no folder {', '.join(missing)}; expected images/ labels/ logits/ [logits_*/] [masks/]")
    found = wanted or sorted(
        path.name for path in data.iterdir() if path.is_dir() and (path.name == "logits" or path.name.startswith("logits_"))
    )
    if not found:
        raise SystemExit(f"study: {data}: no folder logits/ or logits_*/; expected one with the network's output of each case")
    return found


def first_cases(data: Path, logits: list[str], count: int, output: Path) -> Path:
    """A folder with links to the first cases of another one, under the same name."""
    folder = output / "cases" / data.name
    cases = [case.case_id for case in Study(data, logits[0]).cases()[:count]]
    link_cases(Study(data, logits[0]), cases, folder, all_logits=logits)
    return folder


def make_document(studies: list[Findings]) -> dict[str, str]:
    """The text of each pair of markers."""
    return {"summary": summary_table(studies), "study": "\n".join(map(study_section, studies)), "paper": paper_table(studies)}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="train-crf with folds, infer on what was held out, evaluate against simple rivals.")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="default: hippocampus and brats2015 of $CRFREFINE_DATA")
    parser.add_argument("--logits", nargs="+", metavar="NAME", help="folders of logits in FOLDER; default: logits and all logits_*")
    parser.add_argument("--regions", nargs="+", default=[], metavar="NAME=1+3+4", help="labels that count together; default: each label")
    parser.add_argument("--folds", metavar="K", help="as for train-crf")
    parser.add_argument("--num-iterations", metavar="N", help="as for train-crf")
    parser.add_argument("--max-cases", type=int, metavar="N", help="the first N of each folder alone")
    parser.add_argument("--quick", action="store_true", help="a taste: few cases, two folds, few iterations; proves nothing")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="default: .bench/study, or .bench/study_quick")
    parser.add_argument(
        "--document",
        type=Path,
        metavar="FILE",
        help="gets the tables between its markers; default, of the full study: docs/reference/results.md",
    )
    return parser.parse_args()


def choose_folders(options: argparse.Namespace) -> dict[Path, tuple[str, ...]]:
    """The data sets, with the regions of each."""
    if options.folders:
        names = [folder.resolve().name for folder in options.folders]
        if len(set(names)) < len(names):
            raise SystemExit(f"study: two folders have the same name, which is that of their results: {', '.join(names)}")
        return {folder.resolve(): tuple(options.regions) for folder in options.folders}
    root = os.environ.get("CRFREFINE_DATA")
    if not root:
        raise SystemExit(
            "study: name a folder that holds images/ labels/ logits/, or set CRFREFINE_DATA to the one above hippocampus/ and brats2015/"
        )
    return {Path(root).resolve() / name: regions for name, regions in DATASETS.items()}


def main() -> None:
    options = parse_options()
    folders = choose_folders(options)
    logits = {folder: find_logits(folder, options.logits) for folder in folders}
    output = (options.output or BENCH / ("study_quick" if options.quick else "study")).resolve()
    training = list(QUICK_TRAINING) if options.quick else []
    for option in ("folds", "num_iterations"):
        value = getattr(options, option)
        if value:
            training += [f"--{option.replace('_', '-')}", value]
    max_cases = options.max_cases or (QUICK_CASES if options.quick else None)
    is_full = not (options.folders or options.logits or training or max_cases)
    started, studies = time.monotonic(), []
    total, number = sum(map(len, logits.values())), 0
    for folder, regions in folders.items():
        data = folder if max_cases is None else first_cases(folder, logits[folder], max_cases, output)
        for name in logits[folder]:
            number += 1
            say(f"{number} of {total}: {folder.name}/{name}, {(time.monotonic() - started) / 60:.0f} minutes so far")
            study = Study(data, name, regions, tuple(training), options.threads)
            home = run_study(study, output / folder.name / name)
            studies.append(read_findings(folder.name, name, home))
    text = make_document(studies)
    (output / "results.md").write_text("\n".join(text.values()))
    document = options.document or (DOCUMENT if is_full else None)
    if document is not None:
        for marker, part in text.items():
            write_between_markers(document, marker, part)
    say(f"tables in {output / 'results.md'}" + (f" and {document}" if document else "") + f"; a report.html of each in {output}")
    sys.stdout.write("\n".join(text.values()))


if __name__ == "__main__":
    main()
