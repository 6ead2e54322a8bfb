"""`crfrefine train-crf` from folders to files: what it writes and prints, what it refuses, how it
stops and goes on.
"""

import itertools
import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
from cli_helpers import errors, files_in, load_nifti, run_here, run_process, wait_for
from training_helpers import phantom, shorten, write_cases

from crfrefine.demo.phantom import write_phantom
from crfrefine.engines import unexpected_device
from crfrefine.parameters.model import CrfParameters
from crfrefine.statistics.verdict import Outcome
from crfrefine.train import stages
from crfrefine.train.comparison import (
    COARSE_RIVALS,
    MEASURED,
    METHODS,
    METRICS,
    SMALLEST,
    TRAINED,
    with_rule,
)
from crfrefine.train.material import choose_device

SHORT = ("--folds", 2, "--num-iterations", 4)
# For tests that do not look at the learned values: thetas that are learned have many starts, which
# take ten times as long.
REGIONS = ("--regions", "whole=1+2", "--regions", "cyst=3")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_cases(tmp_path_factory.mktemp("data"), 4)
    names = {"background": 0, "shell": 1, "core": 2, "cyst": 3}
    (folder / "dataset.json").write_text(
        json.dumps({"labels": names, "channel_names": {"0": "a", "1": "b"}})
    )
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "params.toml"
    with pytest.MonkeyPatch.context() as patched:
        shorten(patched)
        result = run_here(
            "train-crf", data, "-o", output, *SHORT, *REGIONS, "--threads", 1, status=0
        )
    return output, result


@pytest.fixture
def short_trainings(monkeypatch):
    """For tests that look at nothing that the fits of vector scaling, or the choice of a start,
    decide.
    """
    shorten(monkeypatch)


def report_of(output):
    return json.loads(output.with_suffix(".report.json").read_text())


def test_the_files_say_where_they_come_from_and_there_are_no_others(trained):
    output, result = trained
    assert files_in(output.parent) == ["params.report.json", "params.toml"]
    device = choose_device("auto").name
    assert report_of(output)["device"] == device
    told = unexpected_device("auto", device)
    means = "1 thread" if told is None else f"{told}, 1 thread"
    assert f"; {means}\n" in result.stderr
    head = " ".join(output.read_text().partition("schema")[0].replace("#", " ").split())
    assert re.fullmatch(
        r"Written by crfrefine \S+ train-crf on \S+ from 4 cases: "
        r"params\.report\.json has the verdict\.",
        head,
    )
    assert "# mm" in output.read_text()
    assert CrfParameters.load(output).trained_on == ("case0", "case1", "case2", "case3")


def test_the_table_and_the_verdict_are_on_standard_output(trained):
    output, result = trained
    lines = result.stdout.splitlines()
    rows = {}
    for line in lines[1:]:
        if "\t" in line:
            row = line.split("\t")
            rows[row[0], row[1]] = row
    assert lines[-4].startswith(
        "p (Holm): Wilcoxon's signed-rank test, after Holm's correction within each method and "
        "family: endpoint "
    )
    assert lines[0].split("\t")[:3] == ["region", "method", "Dice"]
    others = (*COARSE_RIVALS, SMALLEST, with_rule(TRAINED, SMALLEST))
    methods = [method for method in METHODS if method not in others]
    assert list(rows) == list(itertools.product(("whole", "cyst", "mean"), methods))
    assert float(rows["mean", "trained CRF"][2]) > float(rows["mean", "network"][2]) + 0.02
    assert ": too few cases, at least 6 are needed for p < 0.05. The folds and " in lines[-1]
    judged = report_of(output)["verdict"]
    assert lines[-3:-1] == [judged["probabilities"]["sentence"], judged["harm"]["sentence"]]
    assert lines[-3].startswith(
        "The probabilities of all labels: too few cases to tell, negative log likelihood "
    )
    # Dice is judged in the mean over two regions; sensitivity, precision, volume and surfaces are
    # looked at there too.
    assert judged["harm"]["num_comparisons"] == 6 * 3 + 2


def test_the_report_holds_what_was_found(trained, data):
    output, _ = trained
    report = report_of(output)
    assert report["schema"] == 1
    assert report["label_names"] == ["background", "shell", "core", "cyst"]
    assert report["regions"] == {"whole": [1, 2], "cyst": [3]}
    assert report["verdict"]["outcome"] == Outcome.TOO_FEW
    held_out = []
    for fold in report["folds"]:
        held_out += fold["held_out"]
    assert sorted(held_out) == ["case0", "case1", "case2", "case3"]
    for fold in report["folds"]:
        assert not set(fold["held_out"]) & {*fold["training"], *fold["deciding"]}
        assert CrfParameters.from_dict(fold["fit"]["parameters"]).mean_field.tolerance == 0.0
        assert fold["vector_scaling"]["temperature"] > 0
    assert CrfParameters.from_dict(report["parameters"]) == CrfParameters.load(output)
    measured = {
        (line["case"], line["method"], line["region"], line["metric"]): line["value"]
        for line in report["measurements"]
    }
    others = (*COARSE_RIVALS, SMALLEST)
    methods = {name for name in MEASURED if not any(other in name for other in others)}
    assert {method for _, method, *_ in measured} == methods
    assert len(measured) == 4 * len(methods) * 2 * len(METRICS)
    truth = load_nifti(data / "labels" / "case2.nii.gz") == 3
    network = load_nifti(data / "logits" / "case2.nii.gz").argmax(-1) == 3
    by_hand = 2 * (truth & network).sum() / (truth.sum() + network.sum())
    assert measured["case2", "network", "cyst", "dice"] == pytest.approx(by_hand)


@pytest.mark.long
@pytest.mark.usefixtures("short_trainings")
def test_the_same_seed_gives_the_same_file_at_any_number_of_threads_interrupted_or_not(
    trained, data, tmp_path, monkeypatch
):
    """The folders are named; the run is stopped in the second fold, when the first one is done."""
    named = ["--images", data / "images", "--labels", data / "labels", "--logits", data / "logits"]
    arguments = (
        "train-crf",
        *named,
        "-o",
        tmp_path / "p.toml",
        *SHORT,
        *REGIONS,
        "-q",
        "--threads",
        2,
    )
    train_fold = stages.train_fold

    def interrupted(number, **arguments):
        if number == 1:  # Folds run side by side.
            wait_for((tmp_path / "p.fold1.json").exists)
            raise KeyboardInterrupt
        return train_fold(number, **arguments)

    monkeypatch.setattr(stages, "train_fold", interrupted)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run_here(*arguments)
    assert "--resume" in stopped.value.__notes__[0]
    monkeypatch.setattr(stages, "train_fold", train_fold)
    assert files_in(tmp_path) == ["p.fold1.json"]
    other = run_here(*arguments, "--resume", "--seed", 1, status=1)
    assert (
        "p.fold1.json: not a fold of this run: it is of a run with other data, options"
        in other.stderr
    )
    result = run_here(*arguments, "--resume", status=0)
    assert CrfParameters.load(tmp_path / "p.toml") == CrfParameters.load(trained[0])
    assert report_of(tmp_path / "p.toml")["measurements"] == report_of(trained[0])["measurements"]
    assert result.stdout.count("\n") == 1
    assert files_in(tmp_path) == ["p.report.json", "p.toml"]


def with_specks(case):
    """Return logits as files have them, with three false lesions of a voxel in the background."""
    logits = case.logits.copy()
    far = np.argwhere(case.labels == 0)[[0, 40, -1]]
    logits[:, *far.T] = np.array([0.0, 4.0, 0.0, 0.0], np.float32)[:, None]
    return np.moveaxis(logits, 0, -1)


@pytest.mark.usefixtures("short_trainings")
def test_lesions_are_scored_and_the_smallest_volume_is_a_rival_and_part_of_the_file(tmp_path):
    """False lesions hardly count in Dice: by their F1, the rule that removes them is taken."""
    data = write_cases(tmp_path / "data", 4, network=with_specks)
    config = ("-c", "default", "--set", "bilateral.weight=0.5", "--learn", "temperature,bias")
    output = tmp_path / "p.toml"
    told = run_here("train-crf", data, "-o", output, *SHORT, *config, "--lesions", status=0)
    report = report_of(output)
    assert report["options"]["lesions"] == "isles"
    largest = {fold["keep_largest"] for fold in report["folds"]}
    smallest = {fold["min_component_ml"] for fold in report["folds"]}
    assert largest == {"none"}
    assert all(ml > 0.2257 for ml in smallest), "a voxel has so many ml"
    f1 = {}
    for line in report["measurements"]:
        assert "largest component" not in line["method"]
        if line["metric"] == "lesion_f1":
            f1.setdefault(line["method"], []).append(line["value"])
    assert np.mean(f1["smallest volume"]) > np.mean(f1["network"]) + 0.05
    assert {"trained CRF", "trained CRF + smallest volume"} < f1.keys()
    assert report["comparison_with_smallest_volume"]
    judged = report["verdict"]
    assert "smallest volume" in {rival["name"] for rival in judged["rivals"]} | {judged["baseline"]}
    means = [f"{np.mean(f1[name]):.3f}" for name in ("network", "smallest volume", "trained CRF")]
    assert f"Mean lesion F1 is {means[0]} for the network, {means[1]} with the " in told.stdout
    assert "\tLesion F1" in told.stdout
    assert "lesion F1 0." in told.stderr, "a line of each fold"
    is_taken = judged["method"] == "trained CRF + smallest volume"
    assert f"{'has' if is_taken else 'does not have'} it; on all cases it is " in told.stdout
    found = CrfParameters.load(output).postprocess.min_component_ml
    assert found == (report["min_component_ml"] if is_taken else 0.0)


@pytest.mark.usefixtures("short_trainings")
def test_what_is_not_learned_stays_as_given(data, tmp_path):
    CrfParameters().replace(
        **{"bilateral.theta_alpha": 7.0, "postprocess.keep_largest": "foreground"}
    ).save(tmp_path / "start.toml")
    options = (
        "-c",
        tmp_path / "start.toml",
        "--set",
        "bilateral.theta_beta=0.12",
        "--learn",
        "weights,temperature",
    )
    run_here("train-crf", data, "-o", tmp_path / "p.toml", *SHORT, *options, status=0)
    found = CrfParameters.load(tmp_path / "p.toml")
    assert found.bilateral[0].theta_alpha == 7.0
    assert found.bilateral[0].theta_beta == 0.12
    assert found.postprocess.keep_largest == "foreground"
    assert found.bilateral[0].weight != 4.0


def test_arguments_paths_and_cases_are_checked_before_pytorch_is_imported(data, tmp_path):
    """Its import takes seconds; here it raises what no guard catches."""
    (tmp_path / "torch.py").write_text("raise AssertionError('torch was imported')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    incomplete = write_cases(tmp_path / "incomplete", 2)
    (incomplete / "labels" / "case1.nii.gz").unlink()
    for words, message in (
        ((tmp_path / "nowhere",), "no folder of images and labels and logits"),
        ((data, "--labels", tmp_path / "nowhere"), "nowhere: no such folder"),
        ((data, "--regions", "core=1+9"), "label 9 is not among the logits' 0 to 3"),
        ((data, "--folds", 9), "--folds: expected 2 to 4"),
        ((data, "--device", "cuda:99"), "NVIDIA GPU"),
        ((incomplete, "--strict"), "case1"),
    ):
        arguments = ("train-crf", *words, "-o", tmp_path / "p.toml")
        result = run_process(*arguments, status=1, env=environment)
        assert message in result.stderr
        assert "torch was imported" not in result.stderr


REFUSED = {
    "--learn weights,thetas": (
        "--learn: expected some of weights, compatibility, theta, temperature"
    ),
    "--learn ,": "got nothing",
    "--set postprocess.decision=dice": "postprocess.decision: this key is gone",
    "--regions core=1+9": "--regions core: label 9 is not among the logits' 0 to 3",
    "--regions core": "expected NAME=LABEL",
    "--regions 1=1+2": "region '1': is the name of a label, or of all labels together",
    "--device cuda:99": "NVIDIA GPU",
    "-c nowhere.toml": "no such file or preset",
    "-c {root}/start.toml -o {root}/start.toml": "would replace an input",
    "-o {root}": "ending in .toml",
    "-o {root}/params.json": "ending in .toml",
    "-o {root}/broken.toml --resume": "broken.fold2.json: not a fold of this run",
    "-o {root}/piped.toml": "piped.fold1.json: cannot be written: it exists and is no regular file",
    "--set bilateral.weight=[1,2]": "bilateral.weight: it has 2 values, but the case has 4 labels",
    "{background}": "no case has a foreground label",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_cannot_be_followed_is_refused_in_one_message(data, tmp_path, options):
    """A finished fold is written and read back, so it is not kept in a pipe, which is found out
    before the cases are read.
    """
    CrfParameters().save(tmp_path / "start.toml")
    (tmp_path / "broken.fold2.json").write_text("[1, 2")
    os.mkfifo(tmp_path / "piped.fold1.json")
    for seed in range(2 if "background" in options else 0):
        case = phantom(seed)
        write_phantom(
            replace(case, labels=np.zeros_like(case.labels)), tmp_path / "background", f"case{seed}"
        )
    words = options.format(root=tmp_path, background="").split()
    folder = tmp_path / "background" if "background" in options else data
    before = files_in(tmp_path)
    result = run_here(
        "train-crf",
        folder,
        *(() if "-o" in words else ("-o", tmp_path / "p.toml")),
        *words,
        status=1,
    )
    assert (result.stdout, len(errors(result.stderr))) == ("", 1)
    assert REFUSED[options] in result.stderr
    assert files_in(tmp_path) == before
    assert (tmp_path / "piped.fold1.json").is_fifo()
