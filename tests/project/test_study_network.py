"""Cases without logits, label maps alone, and who gains: what the study does beside its plain chain."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import nibabel
import numpy as np
import pytest
from cli_helpers import load_nifti
from study_helpers import BENCHMARKS, run_script
from training_helpers import write_cases

from crfrefine.statistics.comparison import Measurement, ResultTable
from crfrefine.train.baselines import VectorScaling

NUM_CASES = 5


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


@pytest.fixture(scope="module")
def hearts(tmp_path_factory):
    """Cases without logits, thick along the second axis."""
    data = write_cases(tmp_path_factory.mktemp("hearts") / "hearts", NUM_CASES)
    for file in [*(data / "images").iterdir(), *(data / "labels").iterdir()]:
        volume = nibabel.load(file)
        nibabel.Nifti1Image(np.asarray(volume.dataobj), np.diag([1.9, 9.5, 1.5, 1.0])).to_filename(file)
    shutil.rmtree(data / "logits")
    return data


def test_each_case_has_logits_of_a_network_that_has_not_seen_it_also_after_an_interruption(hearts, tmp_path):
    """A fold that was not complete is trained again, with the same result; the others are not touched."""
    network = tmp_path / "network"
    first = run_script("study_network.py", hearts, network, "--num-steps", 1)
    assert first.returncode == 0, first.stderr
    folds = sorted(network.glob("fold_*"))
    held_out = [list(json.loads((fold / "fold.json").read_text())["dice"]) for fold in folds]
    assert sorted(case for fold in held_out for case in fold) == [f"case{number}" for number in range(NUM_CASES)]
    for fold, cases in zip(folds, held_out, strict=True):
        for case in cases:
            link = network / "logits" / f"{case}.nii.gz"
            assert link.resolve() == (fold / "logits" / link.name).resolve()
            assert nibabel.load(link).shape[:3] == nibabel.load(hearts / "images" / f"{case}_0000.nii.gz").shape

    before = {file.name: file.read_bytes() for file in (network / "logits").iterdir()}
    stages = json.loads((network / "stages.json").read_text())
    stages["fold_2"]["complete"] = False
    (network / "stages.json").write_text(json.dumps(stages))
    for file in (network / "fold_2" / "logits").iterdir():
        file.write_bytes(b"half")
    again = run_script("study_network.py", hearts, network, "--num-steps", 1)
    assert again.stderr.count("is there already") == 4
    assert {file.name: file.read_bytes() for file in (network / "logits").iterdir()} == before


def test_label_maps_are_the_networks_and_rivals_know_all_labels(tmp_path, monkeypatch):
    """A bias is added to the logits of each label; a label that a label map lacks has a channel, and stays away."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from study_chain import Study, make_label_maps
    from study_rivals import write_rivals

    data = write_cases(tmp_path / "data", 2)
    file = data / "logits" / "case1.nii.gz"
    volume = nibabel.load(file)
    logits = np.asarray(volume.dataobj).copy()
    logits[..., -1] = logits.min() - 1
    nibabel.Nifti1Image(logits, volume.affine).to_filename(file)
    study = make_label_maps(Study(data, data / "logits", "logits"), tmp_path / "out")
    assert study.name == "label_maps_of_logits"
    for case in ("case0", "case1"):
        found = load_nifti(study.network / f"{case}.nii.gz")
        np.testing.assert_array_equal(found, load_nifti(data / "logits" / f"{case}.nii.gz").argmax(axis=-1))

    num_labels = logits.shape[-1]
    fold = {
        "held_out": ["case0", "case1"],
        "keep_largest": "each",
        "vector_scaling": asdict(VectorScaling(1.0, (0.0,) * (num_labels - 1) + (50.0,))),
        "smoothing_sigma_mm": 0.0,
        "guided_filter": {"radius_mm": 0.0, "epsilon": 0.0},
        "dice_decision": None,
    }
    report = {"label_names": [f"label {number}" for number in range(num_labels)], "folds": [fold]}
    write_rivals(study.cases(), report, tmp_path / "rivals", resample=False, threads=1)
    networks = {case: load_nifti(study.network / f"{case}.nii.gz") for case in fold["held_out"]}
    for case, network in networks.items():
        np.testing.assert_array_equal(load_nifti(tmp_path / "rivals" / "smoothing" / f"{case}.nii.gz"), network)
    assert (load_nifti(tmp_path / "rivals" / "scaling" / "case0.nii.gz") == num_labels - 1).all()
    np.testing.assert_array_equal(load_nifti(tmp_path / "rivals" / "scaling" / "case1.nii.gz"), networks["case1"])


def test_a_folder_without_logits_says_what_to_do(hearts, tmp_path):
    done = run_script("study.py", hearts, "-o", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.endswith("or --train-network to have a small network trained\n")


def test_cases_are_grouped_by_size_and_by_the_networks_dice(monkeypatch):
    """Ten cases: the small ones gain 4 points, the others lose 1; the network is the better the larger they are."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from study_findings import Findings
    from study_groups import quality_table, size_table

    lines = []
    for number in range(10):
        case, network = f"case{number}", 0.5 + 0.03 * number
        trained = network + (0.04 if number < 4 else -0.01)
        error = (-1) ** number * 0.25
        values = {"dice": network, "volume_ml": 2 + number + error, "volume_difference_ml": error}
        lines += [Measurement(case, "atrium", metric, value, "network") for metric, value in values.items()]
        lines.append(Measurement(case, "atrium", "dice", trained, "trained CRF"))
    summary = {"judged_regions": ["atrium"], "titles": {"atrium": "atrium"}}
    findings = Findings("heart", "logits", {}, summary, {}, ResultTable(lines), {})
    assert rows_of(size_table([findings]))[-1] == [
        "heart, `logits`",
        "atrium",
        "2 to 5 ml: +4.00 (4 / 0)",
        "6 to 8 ml: −1.00 (0 / 3)",
        "9 to 11 ml: −1.00 (0 / 3)",
    ]
    assert rows_of(quality_table([findings]))[-1][1] == "0.50 to 0.59: +4.00 (4 / 0)"
    few = Findings("heart", "logits", {}, summary, {}, ResultTable(line for line in lines if line.case < "case8"), {})
    assert "Thirds need 9 cases" in size_table([few])
