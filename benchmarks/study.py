"""The chain on labeled cases, by the project's own commands.

Train-crf with folds, infer, evaluate; for `docs/reference/results.md`.

    study.py [--quick] [--threads N] [-o OUTPUT]

$CRFREFINE_DATA holds the folders of DATA_SETS, each with images/ labels/, logits/ unless a network
is trained for them, and maybe logits_*/ masks/ dataset.json. Stopped at any point, the same command
goes on.

No case is refined with parameters, or recalibrated with values, that were fitted on it: the folds
of the training's report say which cases each fold has not seen. The parameters of all cases are
written too and used for nothing here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from report import describe, source_hash, write_between_markers
from scripts import BENCH, ROOT
from study_stages import Stages, crfrefine, link_files, listing, say
from study_tables import (
    ENVIRONMENT,
    EVALUATION,
    EVALUATION_LARGEST,
    LABEL_MAPS,
    RANKSEG,
    REPORT,
    RIVALS,
    TRAINED_LARGEST,
    make_document,
    read_findings,
)

from crfrefine.arrays.components import clean
from crfrefine.base.plain import from_plain
from crfrefine.cases.case import Case, load_case
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.discovery import Sources
from crfrefine.cases.finding import find_cases
from crfrefine.cases.reading_options import DeclaredLabels, ReadingOptions
from crfrefine.io import write_label_map
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import PostprocessParameters
from crfrefine.train.baselines import VectorScaling
from crfrefine.train.comparison import (
    DEFAULT,
    GUIDED,
    LARGEST,
    NETWORK,
    SCALING,
    TRAINED,
    with_rule,
)
from crfrefine.train.guided import Guidance
from crfrefine.train.measuring import simple_maps

QUICK_CASES = 6
QUICK_TRAINING = ("--folds", "2", "--num-iterations", "6")
DOCUMENT = ROOT / "docs" / "reference" / "results.md"

# Where the label maps of the methods are, the first four by `infer`; the network's are the argmax
# of its logits.
FOLDERS = {
    DEFAULT: "refined/default",
    LARGEST: "refined/largest",
    TRAINED: "refined/trained",
    TRAINED_LARGEST: "refined/trained_largest",
    SCALING: "rivals/scaling",
    GUIDED: "rivals/guided",
    RANKSEG: "rivals/rankseg",
}
FOLDERS |= {
    with_rule(rival, LARGEST): f"{FOLDERS[rival]}_largest" for rival in (SCALING, GUIDED, RANKSEG)
}

# `infer` then returns the network's labels.
NO_CRF = CrfParameters().replace(**{"bilateral.weight": 0.0, "spatial.weight": 0.0})


@dataclass(frozen=True)
class DataSet:
    """A folder of $CRFREFINE_DATA."""

    name: str  # Name of the folder.
    regions: tuple[str, ...] = ()  # Each as for `--regions`; empty means each label.
    resample: bool = False  # True if the logits may be on another grid than the image.
    # True if the full study has the network's label maps too, in place of its logits.
    label_maps: bool = False
    has_logits: bool = True  # True if the folder has logits; else a network is trained for them.


DATA_SETS = (
    DataSet("hippocampus", label_maps=True),
    DataSet("brats2015", ("whole=1+2+3+4", "core=1+3+4", "enhancing=4")),
    DataSet("atrium", resample=True),
    DataSet("acdc", label_maps=True, has_logits=False),
)


@dataclass(frozen=True)
class Study:
    data: Path  # Folder with images/ labels/ and maybe masks/ and dataset.json.
    network: Path  # Folder with the network's output.
    name: str  # Name of that output.
    regions: tuple[str, ...]  # Options of all commands.
    grid: tuple[str, ...]  # Options of all commands.
    training: tuple[str, ...]  # Further options of train-crf.
    threads: int  # For training and inference; processes of the evaluation.

    @property
    def title(self) -> str:
        return f"{self.data.name}/{self.name}"


def labeled_cases(data: Path, network: Path | None) -> list[CaseFiles]:
    masks = data / "masks" if (data / "masks").is_dir() else None
    networks = [] if network is None else [network]
    sources = Sources([data / "images"], networks, masks, data / "labels")
    return [case for case in find_cases(sources) if case.labels is not None]


def link_cases(cases: Sequence[CaseFiles], data: Path, folder: Path, network: str) -> None:
    """Make a folder of data that holds some of the cases, as links."""
    for case in cases:
        parts = {
            "images": case.images,
            "labels": [case.labels],
            "masks": [case.mask] if case.mask else [],
            network: case.network,
        }
        for name, files in parts.items():
            link_files(files, folder / name)
    link_files([*data.glob("dataset.json")], folder)


def make_studies(data: DataSet, options: argparse.Namespace, output: Path) -> list[Study]:
    """Return a study for each output of a network, which is trained if the data set has none."""
    folder = Path(os.environ["CRFREFINE_DATA"]).resolve() / data.name
    names = sorted(path.name for path in folder.glob("logits*") if path.is_dir())
    if options.quick:
        few = output / "cases" / data.name
        for name in names or [None]:
            link_cases(
                labeled_cases(folder, name and folder / name)[:QUICK_CASES],
                folder,
                few,
                name or "logits",
            )
        folder = few
    networks = {name: folder / name for name in names}
    if not data.has_logits:
        from study_network import FULL, TASTE, add_logits

        networks = {
            "logits": add_logits(
                folder, output / data.name / "network", TASTE if options.quick else FULL
            )
        }
    regions = tuple(word for region in data.regions for word in ("--regions", region))
    grid = ("--resample",) if data.resample else ()
    training = QUICK_TRAINING if options.quick else ()
    studies = [
        Study(folder, network, name, regions, grid, training, options.threads)
        for name, network in networks.items()
    ]
    if data.label_maps and not options.quick:
        studies += [
            make_label_maps(study, output / data.name / (LABEL_MAPS + study.name))
            for study in studies
        ]
    return studies


def make_label_maps(study: Study, folder: Path) -> Study:
    """Write the network's label maps on the grid of the images.

    Return the study that has them in place of its logits.
    """

    def work(own: Path) -> None:
        NO_CRF.save(own / "network.toml", "no CRF: the network's labels")
        _infer(study, study.data, study.network, own / "network.toml", own / "maps")

    inputs = [*listing(study.data / "images"), *listing(study.network)]
    maps = Stages(folder, f"{study.title}, label maps").run("label_maps", inputs, work) / "maps"
    links = folder / "network"  # `infer` leaves a summary beside the label maps.
    link_files(sorted(maps.glob("*.nii.gz")), links)
    return replace(study, network=links, name=LABEL_MAPS + study.name, grid=())


def run_study(study: Study, folder: Path) -> Path:
    """Run what is not there yet; return the folder with the results."""
    stages = Stages(folder, study.title)
    parts = [
        line for part in ("images", "labels", "masks") for line in listing(study.data / part)
    ] + listing(study.network)
    stages.run(
        "training",
        [study.data.resolve(), study.regions, study.training, study.grid, *parts],
        partial(_train, study),
    )
    report = json.loads((folder / REPORT).read_text())
    trained_on = json.loads((folder / ENVIRONMENT).read_text())["source"]
    if trained_on != source_hash():
        say(
            f"{study.title}: trained by sources {trained_on}, these are {source_hash()}; to train "
            f"again, remove {folder}"
        )
    stages.run("refined", [report["written"], source_hash()], partial(_refine, study, report))
    stages.run("rivals", RIVALS, partial(_write_rivals, study, report))
    stages.run(EVALUATION, [], partial(_evaluate, study, TRAINED, (NETWORK, *RIVALS), ()))
    largest = (
        LARGEST,
        *(with_rule(rival, LARGEST) for rival in (SCALING, GUIDED, RANKSEG) if rival in RIVALS),
    )
    stages.run(
        EVALUATION_LARGEST,
        [],
        partial(_evaluate, study, TRAINED_LARGEST, largest, ("--no-report",)),
    )
    return folder


def _train(study: Study, folder: Path) -> None:
    options = [
        "-p",
        study.network,
        *study.regions,
        *study.grid,
        *study.training,
        "--threads",
        study.threads,
        "--resume",
    ]
    options.append("--strict")  # Published figures are over all cases or there are none.
    peak_mib = crfrefine(
        "train-crf",
        study.data,
        "-o",
        folder / "params.toml",
        *options,
        log=folder / "standard_output.txt",
    )
    (folder / ENVIRONMENT.name).write_text(
        json.dumps({**describe("torch"), "peak_mib": round(peak_mib)}, indent=1) + "\n"
    )


def _refine(study: Study, report: dict[str, Any], folder: Path) -> None:
    """Write the label maps of the methods that `infer` can run.

    Each case by the parameters of the fold that held it out.
    """
    for number, fold in enumerate(report["folds"]):
        home = folder / f"fold_{number + 1}"
        held_out = [
            case
            for case in labeled_cases(study.data, study.network)
            if case.case_id in fold["held_out"]
        ]
        link_cases(held_out, study.data, home, "network")
        trained = CrfParameters.from_dict(fold["fit"]["parameters"])
        keep = {"postprocess.keep_largest": fold["keep_largest"]}
        methods = {
            TRAINED: trained,
            TRAINED_LARGEST: trained.replace(**keep),
            LARGEST: NO_CRF.replace(**keep),
        }
        for method, parameters in methods.items():
            output = folder.parent / FOLDERS[method]
            file = home / f"{output.name}.toml"
            parameters.save(
                file, f"{method}; {fold['name']}, held out: {' '.join(fold['held_out'])}"
            )
            _infer(
                study,
                home,
                home / "network",
                file,
                output,
                *(("--save-probabilities",) if method == TRAINED else ()),
            )
    _infer(study, study.data, study.network, "default", folder.parent / FOLDERS[DEFAULT])


def _infer(
    study: Study, data: Path, network: Path, parameters: Path | str, output: Path, *options: str
) -> None:
    mask_options = ("-m", data / "masks") if (data / "masks").is_dir() else ()
    words = [
        "-i",
        data / "images",
        "-p",
        network,
        "-o",
        output,
        "-c",
        parameters,
        *mask_options,
        *study.grid,
    ]
    if isinstance(parameters, Path):
        log = parameters.with_suffix(".txt")
    else:
        log = output.parent / f"{parameters}.txt"
    crfrefine(
        "infer",
        *words,
        *options,
        "--threads",
        study.threads,
        "--allow-vanishing",
        "--continue",
        "--quiet",
        log=log,
    )


def _write_rivals(study: Study, report: dict[str, Any], folder: Path) -> None:
    """Write the label maps that no command writes, tuned by the fold that held the case out."""
    tuned = {case: fold for fold in report["folds"] for case in fold["held_out"]}
    declared = DeclaredLabels(
        tuple(range(len(report["label_names"]))), "the report of the training"
    )
    reading = ReadingOptions(resample="linear" if study.grid else None, declared=declared)
    for files in labeled_cases(study.data, study.network):
        case = load_case(files, reading, threads=study.threads)
        for method, labels in _rival_maps(case, tuned[files.case_id]):
            file = folder.parent / FOLDERS[method] / f"{files.case_id}.nii.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_label_map(file, labels, case.like, threads=study.threads)


def _rival_maps(case: Case, fold: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    keep = PostprocessParameters(keep_largest=fold["keep_largest"])
    changed = simple_maps(
        case,
        CrfParameters.from_dict(fold["fit"]["parameters"]),
        from_plain(VectorScaling, fold["vector_scaling"]),
        Guidance(**fold["guided_filter"]),
    )
    network = changed.pop(NETWORK)
    if RANKSEG in RIVALS:
        import torch
        from rankseg import RankSEG

        counted = np.ones(network.shape, bool) if case.mask is None else case.mask
        if (padding := case.find_padding()) is not None:
            counted = counted & ~padding
        shares = torch.from_numpy(case.logits[:, counted])[None].softmax(1)
        changed[RANKSEG] = network.copy()
        changed[RANKSEG][counted] = RankSEG(metric="dice")(shares)[0].numpy()
    for method, labels in changed.items():
        yield method, labels
        yield with_rule(method, LARGEST), clean(labels, keep, case.spacing).label_map


def _evaluate(
    study: Study, method: str, baselines: Sequence[str], options: Sequence[str], folder: Path
) -> None:
    maps = {NETWORK: study.network} | {name: folder.parent / path for name, path in FOLDERS.items()}
    compared = [word for name in baselines for word in ("--baseline", f"{name}={maps[name]}")]
    words = [
        maps[method],
        study.data / "labels",
        "--name",
        method,
        *compared,
        "-i",
        study.data / "images",
    ]
    words += [
        *study.regions,
        *study.grid,
        *options,
        "--tolerance",
        "voxel",
        "--processes",
        study.threads,
    ]
    crfrefine("evaluate", *words, "--strict", "-o", folder, log=folder / "standard_output.txt")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="train-crf with folds, infer on the cases held out, evaluate against rivals."
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a taste: few cases, two folds, few iterations; proves nothing",
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="default: .bench/study, or .bench/study_quick",
    )
    options = parser.parse_args(arguments)
    if "CRFREFINE_DATA" not in os.environ:
        raise SystemExit(
            "study: set CRFREFINE_DATA to the folder above "
            + ", ".join(f"{data.name}/" for data in DATA_SETS)
        )
    if RANKSEG not in RIVALS:
        say("rankseg is left out, as it is not installed")
    output = (options.output or BENCH / ("study_quick" if options.quick else "study")).resolve()
    started = time.monotonic()
    findings = []
    for number, data in enumerate(DATA_SETS, start=1):
        for study in make_studies(data, options, output):
            say(
                f"data set {number} of {len(DATA_SETS)}: {study.title}, "
                f"{(time.monotonic() - started) / 60:.0f} minutes so far"
            )
            findings.append(
                read_findings(
                    data.name, study.name, run_study(study, output / data.name / study.name)
                )
            )
    text = make_document(findings)
    together = "\n".join(
        f"## {marker.replace('-', ' ')}\n\n{part}" for marker, part in text.items()
    )
    (output / "results.md").write_text(together)
    for marker, part in text.items() if not options.quick else ():
        write_between_markers(DOCUMENT, marker, part)
    say(
        f"tables in {output / 'results.md'}"
        + ("" if options.quick else f" and {DOCUMENT}")
        + f"; a report.html of each in {output}"
    )
    sys.stdout.write(together)


if __name__ == "__main__":
    main()
