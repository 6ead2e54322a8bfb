"""`--nnunet` on what nnU-Net itself writes: planned, trained for a minute, validated, predicted.
`make test-nnunet` runs it.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import AFFINE, load_nifti, run_here, save_nifti

from crfrefine.demo.phantom import make_phantom

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("nnunetv2") is None,
    reason="nnU-Net is not installed: make test-nnunet",
)

DATASET = "Dataset007_Phantom"
# AFFINE: a quarter turn and two flips
GRID_SHAPE = (26, 22, 14)
SPACING = (1.0, 1.25, 2.5)
NUM_CASES = 6
NUM_TEST_CASES = 2
TRAIN = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "nnunet_brief.py")]
NAMES = ("-tr", "nnUNetTrainer", "-p", "nnUNetPlans")
AS_IT_IS = ("--set", "bilateral.weight=0", "--set", "spatial.weight=0", "-q")


def nnunet(root, *arguments):
    """Run a command of nnU-Net; `nnUNetv2_train` is the brief one."""
    command, *rest = arguments
    own = TRAIN if command == "nnUNetv2_train" else [str(Path(sys.executable).with_name(command))]
    done = subprocess.run(
        [*own, *rest],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        env=environment(root),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def environment(root):
    folders = {
        name: str(root / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    }
    few = {
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "1",
        "nnUNet_compile": "f",
        "OMP_NUM_THREADS": "2",
    }
    return {**os.environ, **folders, **few}


def write_dataset(root):
    raw = root / "nnUNet_raw" / DATASET
    for number in range(NUM_CASES + NUM_TEST_CASES):
        case = make_phantom(number, GRID_SHAPE, SPACING)
        folder = raw / ("imagesTr" if number < NUM_CASES else "imagesTs")
        for modality, values in enumerate(case.image):
            save_nifti(
                folder / f"case{number}_{modality:04d}.nii.gz", values.astype(np.int16), AFFINE
            )
        if number < NUM_CASES:
            save_nifti(raw / "labelsTr" / f"case{number}.nii.gz", case.labels, AFFINE)
    labels = {"background": 0, "shell": 1, "core": 2, "cyst": 3}
    about = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": labels,
        "numTraining": NUM_CASES,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(about))
    cases = [f"case{number}" for number in range(NUM_CASES)]
    splits = [{"train": cases[1 - fold :: 2], "val": cases[fold::2]} for fold in range(2)]
    (root / "nnUNet_preprocessed" / DATASET).mkdir(parents=True)
    (root / "nnUNet_preprocessed" / DATASET / "splits_final.json").write_text(json.dumps(splits))


def shrink_plans(path):
    plans = json.loads(path.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    configuration["batch_size"] = 2
    network = configuration["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [8] * network["n_stages"]
    path.write_text(json.dumps(plans))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two folds: the first validated with --npz, the second without."""
    root = tmp_path_factory.mktemp("nnunet")
    write_dataset(root)
    nnunet(
        root,
        "nnUNetv2_plan_and_preprocess",
        "-d",
        "7",
        "-c",
        "3d_fullres",
        "-npfp",
        "1",
        "-np",
        "1",
    )
    shrink_plans(root / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json")
    nnunet(root, "nnUNetv2_train", "7", "3d_fullres", "0", "--npz", "-device", "cpu")
    nnunet(root, "nnUNetv2_train", "7", "3d_fullres", "1", "-device", "cpu")
    return root


@pytest.fixture(scope="module")
def network(root):
    return root / "nnUNet_results" / DATASET / "nnUNetTrainer__nnUNetPlans__3d_fullres"


@pytest.fixture(scope="module")
def trained(root, network):
    """Both folds, after the command that the first run of train-crf has named, and its result."""
    run_here("train-crf", "--nnunet", network, "--strict", status=1)
    left_out = run_here(
        "train-crf",
        "--nnunet",
        network,
        "-o",
        root / "early.toml",
        "--folds",
        2,
        "--num-iterations",
        4,
        status=0,
    )
    assert (
        "3 of 6 cases are left out: no probabilities in fold_1/validation (3): case1, case3, case5"
        in left_out.stderr
    )
    (command,) = (
        line.partition(": ")[2]
        for line in left_out.stderr.splitlines()
        if "not validated with --npz: " in line
    )
    command = command[command.index("nnUNetv2_train") :]
    assert command == f"nnUNetv2_train {DATASET} 3d_fullres 1 --val --npz {' '.join(NAMES)}"
    nnunet(root, *shlex.split(command), "-device", "cpu")
    return run_here("train-crf", "--nnunet", network, "--folds", 2, "--num-iterations", 4)


def test_training_takes_every_case_from_its_fold(trained, network):
    """The Dice of the network is the one that nnU-Net has measured in its own validation."""
    assert trained.status == 0, trained.stderr
    assert "left out" not in trained.stderr
    report = json.loads((network / "crfrefine.report.json").read_text())
    assert report["cases"] == [f"case{number}" for number in range(NUM_CASES)]
    assert trained.stdout.splitlines()[-1].startswith("verdict: ")
    own = {
        (line["case"], line["method"], line["metric"], line["region"]): line["value"]
        for line in report["measurements"]
    }
    for fold in range(2):
        measured = json.loads(
            (network / f"fold_{fold}" / "validation" / "summary.json").read_text()
        )
        for case in measured["metric_per_case"]:
            case_id = Path(case["prediction_file"]).name.removesuffix(".nii.gz")
            for name, label in (("shell", "1"), ("core", "2"), ("cyst", "3")):
                wanted = case["metrics"][label]["Dice"]
                assert own[case_id, "network", "dice", name] == pytest.approx(wanted, nan_ok=True)


def test_without_weights_the_validated_label_maps_come_back(trained, network, tmp_path):
    """So the axes of the .npz are read as they were written: on an image with a quarter turn and
    two flips.
    """
    run_here("infer", "--nnunet", network, "-o", tmp_path / "out", *AS_IT_IS, status=0)
    for number in range(NUM_CASES):
        theirs = load_nifti(network / f"fold_{number % 2}" / "validation" / f"case{number}.nii.gz")
        np.testing.assert_array_equal(load_nifti(tmp_path / "out" / f"case{number}.nii.gz"), theirs)


def test_predictions_are_refined_with_what_was_learned(trained, root, network, tmp_path):
    images = root / "nnUNet_raw" / DATASET / "imagesTs"
    predict = (
        "nnUNetv2_predict",
        "-i",
        str(images),
        "-o",
        str(root / "predictions"),
        "-d",
        "7",
        "-c",
        "3d_fullres",
        "-f",
        "0",
        "1",
    )
    nnunet(root, *predict, "-device", "cpu", "-npp", "1", "-nps", "1", "--disable_tta")
    result = run_here("infer", "--nnunet", root / "predictions", "-o", tmp_path / "out", status=1)
    assert "no CASE.npz; predict with nnUNetv2_predict" in result.stderr
    shutil.rmtree(root / "predictions")
    nnunet(
        root,
        *predict,
        "-device",
        "cpu",
        "-npp",
        "1",
        "-nps",
        "1",
        "--disable_tta",
        "--save_probabilities",
    )
    result = run_here(
        *("infer", "--nnunet", root / "predictions", "-o", tmp_path / "as it is", *AS_IT_IS),
        "--save-probabilities",
        status=0,
    )
    folders = [str(root / "predictions"), str(tmp_path / "as it is")]
    nnunet(root, "nnUNetv2_ensemble", "-i", *folders, "-o", str(tmp_path / "ensemble"))
    result = run_here(
        "infer",
        "--nnunet",
        root / "predictions",
        "-o",
        tmp_path / "refined",
        "-c",
        network / "crfrefine.toml",
        status=0,
    )
    for number in range(NUM_CASES, NUM_CASES + NUM_TEST_CASES):
        name = f"case{number}.nii.gz"
        np.testing.assert_array_equal(
            load_nifti(tmp_path / "as it is" / name), load_nifti(root / "predictions" / name)
        )
        np.testing.assert_array_equal(
            load_nifti(tmp_path / "ensemble" / name), load_nifti(root / "predictions" / name)
        )
        assert load_nifti(tmp_path / "refined" / name).shape == GRID_SHAPE


def test_export_in_place_of_nnunets_own(root, network, tmp_path):
    """The block of the guide runs; without the CRF it writes the labels that nnU-Net writes from
    the same logits.
    """
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "nnunet.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    case = f"case{NUM_CASES}"
    images = root / "nnUNet_raw" / DATASET / "imagesTs"
    block = block.replace("CASE_0", f"{images}/{case}_0").replace(
        '"nnUNetTrainer__nnUNetPlans__3d_fullres"', repr(str(network))
    )
    own = """
from crfrefine import CrfParameters
from nnunetv2.inference.export_prediction import export_prediction_from_logits
for name, weight in (("ours", 0.0), ("strong", 50.0)):
    model = CrfParameters().replace(**{"bilateral.weight": weight, "bilateral.theta_beta": 1.0})
    export_prediction(
        logits, properties, files, name + ".nii.gz", parameters=model,
        transpose_forward=plans.transpose_forward, configuration_spacing=configuration.spacing,
    )
export_prediction_from_logits(
    logits, properties, configuration, plans, predictor.dataset_json, "theirs"
)
"""
    run = [sys.executable, "-c", block + own]
    done = subprocess.run(
        run,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        env=environment(root),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    np.testing.assert_array_equal(
        load_nifti(tmp_path / "ours.nii.gz"), load_nifti(tmp_path / "theirs.nii.gz")
    )
    assert load_nifti(tmp_path / "CASE.nii.gz").shape == GRID_SHAPE
    assert (load_nifti(tmp_path / "strong.nii.gz") != load_nifti(tmp_path / "theirs.nii.gz")).any()
