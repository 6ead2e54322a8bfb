"""The whole chain on labeled cases, by the project's own commands: train-crf with folds, infer, evaluate; for `docs/reference/results.md`.

Usage: study.py [FOLDER ...] [--logits NAME ...] [--regions NAME=1+3+4 ...] [--resample] [--label-maps] [--train-network] [--quick]
                [-o OUTPUT]

FOLDER holds images/ labels/ logits/ and may hold logits_*/ masks/ dataset.json. Default: the data sets of $CRFREFINE_DATA, whose tables go
into docs/reference/results.md. Stopped at any point, the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from peers import BENCH, ROOT
from report import write_between_markers
from study_chain import LABEL_MAPS, Study, make_label_maps, run_study
from study_data import DataSet, find_logits, first_cases, known_data_sets
from study_findings import Findings, read_findings
from study_stages import say
from study_tables import make_document

QUICK_CASES = 6
QUICK_TRAINING = ("--folds", "2", "--num-iterations", "6")
DOCUMENT = ROOT / "docs" / "reference" / "results.md"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="train-crf with folds, infer on what was held out, evaluate against simple rivals.")
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="FOLDER", help="default: hippocampus, brats2015, atrium and acdc of $CRFREFINE_DATA"
    )
    parser.add_argument("--logits", nargs="+", metavar="NAME", help="folders of logits in FOLDER; default: logits and all logits_*")
    parser.add_argument("--regions", nargs="+", default=[], metavar="NAME=1+3+4", help="labels that count together; default: each label")
    parser.add_argument("--resample", action="store_true", help="the logits may be on another grid than the image")
    parser.add_argument(
        "--label-maps",
        action=argparse.BooleanOptionalAction,
        help="study the networks' label maps too, in place of the logits; default: of hippocampus and acdc in the full study",
    )
    parser.add_argument("--train-network", action="store_true", help="FOLDER has no logits: train a small network with folds for them")
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


def choose_data_sets(options: argparse.Namespace) -> list[DataSet]:
    """Return the data sets; of the known ones, label maps are no part of a quick study."""
    if options.folders:
        names = [folder.resolve().name for folder in options.folders]
        if len(set(names)) < len(names):
            raise SystemExit(f"study: two folders have the same name, which is that of their results: {', '.join(names)}")
        settings = tuple(options.regions), options.resample, bool(options.label_maps), options.train_network
        return [DataSet(folder.resolve(), *settings) for folder in options.folders]
    root = os.environ.get("CRFREFINE_DATA")
    if not root:
        raise SystemExit(
            "study: name a folder that holds images/ labels/ logits/, or set CRFREFINE_DATA to the one above "
            "hippocampus/, brats2015/, atrium/ and acdc/"
        )
    known = known_data_sets(Path(root).resolve())
    wanted = not options.quick if options.label_maps is None else options.label_maps
    return [replace(data, label_maps=data.label_maps and wanted) for data in known]


def make_studies(data: DataSet, names: list[str], options: argparse.Namespace, training: tuple[str, ...], output: Path) -> list[Study]:
    """Return a study for each output of a network, after training the network if the data set has none."""
    max_cases = options.max_cases or (QUICK_CASES if options.quick else None)
    folder = data.folder if max_cases is None else first_cases(data, names, max_cases, output / "cases" / data.name)
    networks = {name: folder / name for name in names}
    if data.without_logits:
        from study_network import FULL, TASTE, add_logits

        networks = {names[0]: add_logits(folder, output / data.name / "network", TASTE if options.quick else FULL)}
    studies = [Study(folder, network, name, data.regions, training, options.threads, data.resample) for name, network in networks.items()]
    if data.label_maps:
        studies += [make_label_maps(study, output / data.name / (LABEL_MAPS + study.name)) for study in studies]
    return studies


def main() -> None:
    options = parse_options()
    data_sets = choose_data_sets(options)
    logits = {data.name: find_logits(data, options.logits) for data in data_sets}
    output = (options.output or BENCH / ("study_quick" if options.quick else "study")).resolve()
    training = list(QUICK_TRAINING) if options.quick else []
    for option in ("folds", "num_iterations"):
        value = getattr(options, option)
        if value:
            training += [f"--{option.replace('_', '-')}", value]
    is_full = not (options.folders or options.logits or training or options.max_cases)
    started, findings = time.monotonic(), list[Findings]()
    total = sum(len(logits[data.name]) * (1 + data.label_maps) for data in data_sets)
    for data in data_sets:
        for study in make_studies(data, logits[data.name], options, tuple(training), output):
            number, minutes = len(findings) + 1, (time.monotonic() - started) / 60
            say(f"{number} of {total}: {study.title}, {minutes:.0f} minutes so far")
            home = run_study(study, output / data.name / study.name)
            findings.append(read_findings(data.name, study.name, home))
    text = make_document(findings)
    together = "\n".join(f"## {marker.replace('-', ' ')}\n\n{part}" for marker, part in text.items())
    (output / "results.md").write_text(together)
    document = options.document or (DOCUMENT if is_full else None)
    if document is not None:
        for marker, part in text.items():
            write_between_markers(document, marker, part)
    say(f"tables in {output / 'results.md'}" + (f" and {document}" if document else "") + f"; a report.html of each in {output}")
    sys.stdout.write(together)


if __name__ == "__main__":
    main()
