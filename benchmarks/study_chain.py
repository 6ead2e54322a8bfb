"""The chain on one data set and one set of logits: train-crf with folds, infer on what each fold held out, simple rivals, evaluate.

No case is refined with parameters, or recalibrated with values, that were fitted on it: the folds of the training's report say which
cases each one has not seen. The parameters of all cases are written too and used for nothing here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from environment import describe, source_hash
from study_stages import Stages, crfrefine, link_files, listing, say

from crfrefine.arrays.components import postprocess
from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.cases.case import Case, CaseFiles, discover_cases, load_case
from crfrefine.io import write_label_map
from crfrefine.parameters.model import CrfParameters, PostprocessParameters
from crfrefine.train.baselines import VectorScaling, smoothed
from crfrefine.train.dice_rival import decided_labels
from crfrefine.train.guided_filter import Guidance, guided_labels
from crfrefine.train.methods import (
    DEFAULT,
    DICE,
    DICE_LARGEST,
    GUIDED,
    GUIDED_LARGEST,
    LARGEST,
    NETWORK,
    SCALING,
    SCALING_LARGEST,
    SMOOTHING,
    SMOOTHING_LARGEST,
    TRAINED,
    TRAINED_LARGEST,
)

FOLDERS = {
    DEFAULT: "default",
    LARGEST: "largest",
    TRAINED: "trained",
    TRAINED_LARGEST: "trained_largest",
    SCALING: "scaling",
    SCALING_LARGEST: "scaling_largest",
    SMOOTHING: "smoothing",
    SMOOTHING_LARGEST: "smoothing_largest",
    GUIDED: "guided",
    GUIDED_LARGEST: "guided_largest",
    DICE: "dice",
    DICE_LARGEST: "dice_largest",
}
"""Where the label maps of each method are; the network's are the argmax of its logits."""

RIVALS = (SCALING, SMOOTHING, GUIDED, DICE, LARGEST, DEFAULT)
RIVALS_LARGEST = (SCALING_LARGEST, SMOOTHING_LARGEST, GUIDED_LARGEST, DICE_LARGEST)

EVALUATION, EVALUATION_LARGEST = "evaluation", "evaluation_largest"
REPORT = Path("training") / "params.report.json"
ENVIRONMENT = "environment.json"
"""Beside the report: what the training ran on."""


@dataclass(frozen=True)
class Study:
    """What is studied.

    Attributes:
        data: folder with images/ labels/ and logits, and maybe masks/ and dataset.json.
        logits: name of the folder of logits in it.
        regions: each as for `--regions`; empty: each label.
        training: further options of train-crf.
        threads: for training and inference; processes of the evaluation.
    """

    data: Path
    logits: str
    regions: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    threads: int = 1

    @property
    def name(self) -> str:
        return f"{self.data.name}/{self.logits}"

    def cases(self) -> list[CaseFiles]:
        masks = self.data / "masks" if (self.data / "masks").is_dir() else None
        found = discover_cases(self.data / "images", self.data / self.logits, masks, self.data / "labels")
        return [case for case in found if case.labels is not None]

    @property
    def region_options(self) -> tuple[str, ...]:
        return tuple(word for region in self.regions for word in ("--regions", region))


def run_study(study: Study, folder: Path) -> Path:
    """Run what is not there yet; return the folder with the results."""
    stages = Stages(folder, study.name)
    parts = [line for part in ("images", "labels", study.logits, "masks") for line in listing(study.data / part)]
    stages.run("training", [study.data.resolve(), study.regions, study.training, *parts], lambda own: _train(study, own))
    report = json.loads((folder / REPORT).read_text())
    check_folds(report)
    trained_on = json.loads((folder / REPORT).with_name(ENVIRONMENT).read_text())["source"]
    if trained_on != source_hash():
        say(f"{study.name}: trained by sources {trained_on}, these are {source_hash()}; to train again, remove {folder}")
    stages.run("refined", [report["written"], source_hash()], lambda own: _refine(study, report, own))
    stages.run("rivals", [], lambda own: _write_rivals(study, report, own))
    compared = {
        EVALUATION: (TRAINED, (NETWORK, *RIVALS), ()),
        EVALUATION_LARGEST: (TRAINED_LARGEST, (LARGEST, *RIVALS_LARGEST), ("--no-report",)),
    }
    for stage, (method, baselines, options) in compared.items():
        stages.run(stage, [], partial(_evaluate, study, folder, method, baselines, options))
    return folder


def check_folds(report: dict[str, Any]) -> None:
    """Every case is held out once, by a fold that has not seen it."""
    held_out = [case for fold in report["folds"] for case in fold["held_out"]]
    if sorted(held_out) != sorted(report["cases"]):
        raise SystemExit("study: the report of the training does not hold out every case exactly once")
    for fold in report["folds"]:
        seen = {*fold["training"], *fold["deciding"]} & set(fold["held_out"])
        if seen:
            raise SystemExit(f"study: {fold['name']} was trained on cases that it holds out: {', '.join(sorted(seen))}")


def link_cases(study: Study, wanted: Sequence[str], folder: Path, *, all_logits: Sequence[str] = ()) -> None:
    """Make a folder of data that holds some of the cases, as links."""
    for number, logits in enumerate(all_logits or (study.logits,)):
        for case in Study(study.data, logits).cases():
            if case.case_id not in wanted:
                continue
            link_files(case.logits, folder / logits)
            if number == 0:
                assert case.labels is not None
                link_files(case.images, folder / "images")
                link_files([case.labels], folder / "labels")
                if case.mask is not None:
                    link_files([case.mask], folder / "masks")
    description = study.data / "dataset.json"
    if description.is_file():
        link_files([description], folder)


def _train(study: Study, folder: Path) -> None:
    options = ["-p", study.data / study.logits, *study.region_options, *study.training, "--threads", study.threads, "--resume"]
    options.append("--strict")  # Published figures are over all cases or there are none.
    crfrefine("train-crf", study.data, "-o", folder / "params.toml", *options, log=folder / "standard_output.txt")
    (folder / ENVIRONMENT).write_text(json.dumps(describe("torch"), indent=1) + "\n")


def _refine(study: Study, report: dict[str, Any], folder: Path) -> None:
    """Write the label maps of the methods that `infer` can run: each case by the parameters of the fold that held it out."""
    for number, fold in enumerate(report["folds"]):
        home = folder / f"fold_{number + 1}"
        link_cases(study, fold["held_out"], home)
        trained = CrfParameters.from_dict(fold["fit"]["parameters"])
        keep = {"postprocess.keep_largest": fold["keep_largest"]}
        no_crf = CrfParameters().replace(**{"bilateral.weight": 0.0, "spatial.weight": 0.0})
        methods = {TRAINED: trained, TRAINED_LARGEST: trained.replace(**keep), LARGEST: no_crf.replace(**keep)}
        for method, parameters in methods.items():
            file = home / f"{FOLDERS[method]}.toml"
            parameters.save(file, f"{method}; {fold['name']}, held out: {' '.join(fold['held_out'])}")
            _infer(study, home, file, folder / FOLDERS[method], "--save-probabilities" if method == TRAINED else None)
    _infer(study, study.data, "default", folder / FOLDERS[DEFAULT])


def _infer(study: Study, data: Path, parameters: Path | str, output: Path, *options: str | None) -> None:
    masks = data / "masks"
    mask_options = ("-m", masks) if masks.is_dir() else ()
    words = ["-i", data / "images", "-p", data / study.logits, "-o", output, "-c", parameters, *mask_options, "--threads", study.threads]
    stem = parameters.stem if isinstance(parameters, Path) else parameters
    log = (data if isinstance(parameters, Path) else output.parent) / f"{stem}.txt"
    crfrefine("infer", *words, *(option for option in options if option), "--continue", "--quiet", log=log)


def _write_rivals(study: Study, report: dict[str, Any], folder: Path) -> None:
    """Write the label maps of the rivals that no command writes, as the fold that held a case out has tuned them."""
    tuned = {case: fold for fold in report["folds"] for case in fold["held_out"]}
    for files in study.cases():
        case = load_case(files, threads=study.threads)
        for method, labels in _rival_maps(case, tuned[files.case_id]):
            home = folder / FOLDERS[method]
            home.mkdir(exist_ok=True)
            write_label_map(home / f"{files.case_id}.nii.gz", labels, case.like, threads=study.threads)


def _rival_maps(case: Case, fold: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    keep, voxel_ml = PostprocessParameters(keep_largest=fold["keep_largest"]), float(np.prod(case.spacing)) / 1000
    network = argmax_labels(case.logits)
    changed = {
        (SCALING, SCALING_LARGEST): argmax_labels(_scaling(fold["vector_scaling"]).apply(case.logits)),
        (SMOOTHING, SMOOTHING_LARGEST): argmax_labels(smoothed(case.logits, fold["smoothing_sigma_mm"], case.spacing)),
        (GUIDED, GUIDED_LARGEST): network,
        (DICE, DICE_LARGEST): network,
    }
    guidance = Guidance(**fold["guided_filter"])
    if guidance.radius_mm > 0:
        image = normalize_intensity(case.image, CrfParameters.from_dict(fold["fit"]["parameters"]).intensity, case.mask)
        changed[GUIDED, GUIDED_LARGEST] = guided_labels(case.logits, image, guidance, case.spacing, None)
    if fold["dice_decision"] is not None:
        changed[DICE, DICE_LARGEST] = decided_labels(case.logits, _scaling(fold["dice_decision"]), None, case.mask)
    for (method, with_largest), found in changed.items():
        labels = found if case.mask is None else np.where(case.mask, found, network)
        yield method, labels
        yield with_largest, postprocess(labels, keep, voxel_ml)


def _scaling(values: dict[str, Any]) -> VectorScaling:
    return VectorScaling(values["temperature"], tuple(values["bias"]))


def _evaluate(study: Study, home: Path, method: str, baselines: Sequence[str], options: Sequence[str], folder: Path) -> None:
    def maps(name: str) -> Path:
        if name == NETWORK:
            return study.data / study.logits
        return home / ("rivals" if name in (SCALING, SMOOTHING, GUIDED, DICE, *RIVALS_LARGEST) else "refined") / FOLDERS[name]

    compared = [word for name in baselines for word in ("--baseline", f"{name}={maps(name)}")]
    words = [maps(method), study.data / "labels", "--name", method, *compared, "-i", study.data / "images", *study.region_options, *options]
    crfrefine("evaluate", *words, "--processes", study.threads, "--strict", "--continue", "-o", folder, log=folder / "standard_output.txt")
