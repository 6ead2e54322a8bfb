"""The chain on one data set and one output of a network: train-crf with folds, infer on what each fold held out, simple rivals, evaluate.

No case is refined with parameters, or recalibrated with values, that were fitted on it: the folds of the training's report say which
cases each one has not seen. The parameters of all cases are written too and used for nothing here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from environment import describe, source_hash
from study_rivals import RIVAL_FOLDERS, RIVALS, RIVALS_LARGEST, write_rivals
from study_stages import Stages, crfrefine, link_files, listing, say

from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.discovery import discover_cases
from crfrefine.parameters.model import CrfParameters
from crfrefine.train.methods import DEFAULT, LARGEST, NETWORK, TRAINED, TRAINED_LARGEST

FOLDERS = {DEFAULT: "default", LARGEST: "largest", TRAINED: "trained", TRAINED_LARGEST: "trained_largest"}
"""Where the label maps of the methods are that `infer` runs; the network's are the argmax of its logits."""

LABEL_MAPS = "label_maps_of_"
"""Name of the study of the label maps of logits: this and the name of the logits."""

NO_CRF = CrfParameters().replace(**{"bilateral.weight": 0.0, "spatial.weight": 0.0})
"""`infer` then returns the network's labels."""

EVALUATION, EVALUATION_LARGEST = "evaluation", "evaluation_largest"
REPORT = Path("training") / "params.report.json"
ENVIRONMENT = "environment.json"
"""Beside the report: what the training ran on, and its memory."""


@dataclass(frozen=True)
class Study:
    """What is studied.

    Attributes:
        data: folder with images/ labels/ and maybe masks/ and dataset.json.
        network: folder with the network's output.
        name: of that output, in messages and as a folder in links to a part of the cases.
        regions: each as for `--regions`; empty: each label.
        training: further options of train-crf.
        threads: for training and inference; processes of the evaluation.
        resample: whether the network's output may be on another grid than the image.
    """

    data: Path
    network: Path
    name: str
    regions: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    threads: int = 1
    resample: bool = False

    @property
    def title(self) -> str:
        return f"{self.data.name}/{self.name}"

    def cases(self) -> list[CaseFiles]:
        masks = self.data / "masks" if (self.data / "masks").is_dir() else None
        found = discover_cases(self.data / "images", self.network, masks, self.data / "labels")
        return [case for case in found if case.labels is not None]

    @property
    def region_options(self) -> tuple[str, ...]:
        return tuple(word for region in self.regions for word in ("--regions", region))

    @property
    def grid_options(self) -> tuple[str, ...]:
        return ("--resample",) if self.resample else ()


def run_study(study: Study, folder: Path) -> Path:
    """Run what is not there yet; return the folder with the results."""
    stages = Stages(folder, study.title)
    parts = [line for part in ("images", "labels", "masks") for line in listing(study.data / part)] + listing(study.network)
    inputs = [study.data.resolve(), study.regions, study.training, study.resample, *parts]
    stages.run("training", inputs, lambda own: _train(study, own))
    report = json.loads((folder / REPORT).read_text())
    check_folds(report)
    trained_on = json.loads((folder / REPORT).with_name(ENVIRONMENT).read_text())["source"]
    if trained_on != source_hash():
        say(f"{study.title}: trained by sources {trained_on}, these are {source_hash()}; to train again, remove {folder}")
    stages.run("refined", [report["written"], source_hash()], lambda own: _refine(study, report, own))
    write = partial(write_rivals, study.cases(), report, resample=study.resample, threads=study.threads)
    stages.run("rivals", [], write)
    compared = {
        EVALUATION: (TRAINED, (NETWORK, *RIVALS), ()),
        EVALUATION_LARGEST: (TRAINED_LARGEST, (LARGEST, *RIVALS_LARGEST), ("--no-report",)),
    }
    for stage, (method, baselines, options) in compared.items():
        stages.run(stage, [], partial(_evaluate, study, folder, method, baselines, options))
    return folder


def make_label_maps(study: Study, folder: Path) -> Study:
    """Write the network's label maps on the grid of the images; return the study that has them in place of its logits."""

    def work(own: Path) -> None:
        NO_CRF.save(own / "network.toml", "no CRF: the network's labels")
        _infer(study, study.data, study.network, own / "network.toml", own / "maps")

    inputs = [*listing(study.data / "images"), *listing(study.network)]
    maps = Stages(folder, f"{study.title}, label maps").run("label_maps", inputs, work) / "maps"
    links = folder / "network"  # `infer` leaves a summary beside the label maps.
    link_files(sorted(maps.glob("*.nii.gz")), links)
    return replace(study, network=links, name=LABEL_MAPS + study.name, resample=False)


def check_folds(report: dict[str, Any]) -> None:
    """Every case is held out once, by a fold that has not seen it."""
    held_out = [case for fold in report["folds"] for case in fold["held_out"]]
    if sorted(held_out) != sorted(report["cases"]):
        raise SystemExit("study: the report of the training does not hold out every case exactly once")
    for fold in report["folds"]:
        seen = {*fold["training"], *fold["deciding"]} & set(fold["held_out"])
        if seen:
            raise SystemExit(f"study: {fold['name']} was trained on cases that it holds out: {', '.join(sorted(seen))}")


def _train(study: Study, folder: Path) -> None:
    options = ["-p", study.network, *study.region_options, *study.grid_options, *study.training, "--threads", study.threads, "--resume"]
    options.append("--strict")  # Published figures are over all cases or there are none.
    peak_mib = crfrefine("train-crf", study.data, "-o", folder / "params.toml", *options, log=folder / "standard_output.txt")
    (folder / ENVIRONMENT).write_text(json.dumps({**describe("torch"), "peak_mib": round(peak_mib)}, indent=1) + "\n")


def _refine(study: Study, report: dict[str, Any], folder: Path) -> None:
    """Write the label maps of the methods that `infer` can run: each case by the parameters of the fold that held it out."""
    for number, fold in enumerate(report["folds"]):
        home = folder / f"fold_{number + 1}"
        held_out = [case for case in study.cases() if case.case_id in fold["held_out"]]
        link_cases(held_out, study.data, home)
        for case in held_out:
            link_files(case.logits, home / "network")
        trained = CrfParameters.from_dict(fold["fit"]["parameters"])
        keep = {"postprocess.keep_largest": fold["keep_largest"]}
        methods = {TRAINED: trained, TRAINED_LARGEST: trained.replace(**keep), LARGEST: NO_CRF.replace(**keep)}
        for method, parameters in methods.items():
            file = home / f"{FOLDERS[method]}.toml"
            parameters.save(file, f"{method}; {fold['name']}, held out: {' '.join(fold['held_out'])}")
            further = ("--save-probabilities",) if method == TRAINED else ()
            _infer(study, home, home / "network", file, folder / FOLDERS[method], *further)
    _infer(study, study.data, study.network, "default", folder / FOLDERS[DEFAULT])


def link_cases(cases: Sequence[CaseFiles], data: Path, folder: Path) -> None:
    """Make a folder of data that holds some of the cases, as links, without the network's output."""
    for case in cases:
        assert case.labels is not None
        link_files(case.images, folder / "images")
        link_files([case.labels], folder / "labels")
        if case.mask is not None:
            link_files([case.mask], folder / "masks")
    if (data / "dataset.json").is_file():
        link_files([data / "dataset.json"], folder)


def _infer(study: Study, data: Path, network: Path, parameters: Path | str, output: Path, *options: str) -> None:
    masks = data / "masks"
    mask_options = ("-m", masks) if masks.is_dir() else ()
    words = ["-i", data / "images", "-p", network, "-o", output, "-c", parameters, *mask_options, *study.grid_options]
    log = parameters.with_suffix(".txt") if isinstance(parameters, Path) else output.parent / f"{parameters}.txt"
    crfrefine("infer", *words, *options, "--threads", study.threads, "--allow-vanishing", "--continue", "--quiet", log=log)


def _evaluate(study: Study, home: Path, method: str, baselines: Sequence[str], options: Sequence[str], folder: Path) -> None:
    def maps(name: str) -> Path:
        if name == NETWORK:
            return study.network
        return home / "rivals" / RIVAL_FOLDERS[name] if name in RIVAL_FOLDERS else home / "refined" / FOLDERS[name]

    compared = [word for name in baselines for word in ("--baseline", f"{name}={maps(name)}")]
    words = [maps(method), study.data / "labels", "--name", method, *compared, "-i", study.data / "images"]
    words += [*study.region_options, *study.grid_options, *options, "--processes", study.threads, "--strict", "-o", folder]
    crfrefine("evaluate", *words, log=folder / "standard_output.txt")
