"""Cases without logits, logits on another grid, label maps alone, and who gains: what the study does beside its plain chain."""

from __future__ import annotations

import json
import shutil

import nibabel
import numpy as np
import pytest
from cli_helpers import load_nifti
from study_helpers import BENCHMARKS, run_script
from training_helpers import write_cases

from crfrefine.statistics.comparison import Measurement, ResultTable

NUM_CASES = 6
SHORT = ("--folds", 2, "--num-iterations", 3, "--threads", 1)


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


@pytest.fixture(scope="module")
def heart(tmp_path_factory):
    """Cases without logits, thick along the second axis; a taste of a study of them, with label maps."""
    root = tmp_path_factory.mktemp("heart")
    data = write_cases(root / "all", NUM_CASES)
    for file in [*(data / "images").iterdir(), *(data / "labels").iterdir()]:
        volume = nibabel.load(file)
        nibabel.Nifti1Image(np.asarray(volume.dataobj), np.diag([1.9, 9.5, 1.5, 1.0])).to_filename(file)
    shutil.rmtree(data / "logits")
    arguments = (data, "--train-network", "--label-maps", "--quick", "--threads", 1, "-o", root / "out")
    done = run_script("study.py", *arguments)
    assert done.returncode == 0, done.stderr
    return data, root / "out", arguments, done


def test_each_case_has_logits_of_a_network_that_has_not_seen_it(heart):
    data, output, _, _ = heart
    network = output / "all" / "network"
    held_out = [list(json.loads((fold / "fold.json").read_text())["dice"]) for fold in sorted(network.glob("fold_*"))]
    assert sorted(case for fold in held_out for case in fold) == [f"case{number}" for number in range(NUM_CASES)]
    for number, cases in enumerate(held_out, start=1):
        for case in cases:
            link = network / "logits" / f"{case}.nii.gz"
            assert link.resolve().parent.parent == network.resolve() / f"fold_{number}"
            assert nibabel.load(link).shape[:3] == nibabel.load(data / "images" / f"{case}_0000.nii.gz").shape


def test_label_maps_are_studied_beside_their_logits(heart):
    _, output, _, done = heart
    of_logits, of_maps = output / "all" / "logits", output / "all" / "label_maps_of_logits"
    report = json.loads((of_maps / "training" / "params.report.json").read_text())
    assert report["options"]["input_type"] == "labels"
    for case in report["cases"]:
        logits = load_nifti(output / "all" / "network" / "logits" / f"{case}.nii.gz")
        np.testing.assert_array_equal(load_nifti(of_maps / "network" / f"{case}.nii.gz"), logits.argmax(axis=-1))
    parts = rows_of(done.stdout)
    row = next(row for row in parts if row[0] == "all, `logits`" and len(row) == 9 and row[-1] not in ("", "too few cases"))
    summary = json.loads((of_maps / "evaluation" / "summary.json").read_text())
    assert row[7] == summary["verdict"]["outcome"]
    assert [cells[0] for cells in parts if cells[-1].endswith("GiB")] == ["all, `logits`", "label maps of all, `logits`"]
    assert (of_logits / "evaluation" / "report.html").exists()


def test_every_step_is_the_same_whatever_was_left_of_an_interrupted_run(heart, tmp_path):
    """A fold that was not complete is trained again, with the same result; the others are not touched."""
    data, _, _, _ = heart
    network = tmp_path / "network"
    first = run_script("study_network.py", data, network, "--num-steps", 2)
    assert first.returncode == 0, first.stderr
    before = {file.name: file.read_bytes() for file in (network / "logits").iterdir()}
    stages = json.loads((network / "stages.json").read_text())
    stages["fold_2"]["complete"] = False
    (network / "stages.json").write_text(json.dumps(stages))
    for file in (network / "fold_2" / "logits").iterdir():
        file.write_bytes(b"half")
    again = run_script("study_network.py", data, network, "--num-steps", 2)
    assert again.stderr.count("is there already") == 4
    assert {file.name: file.read_bytes() for file in (network / "logits").iterdir()} == before


def test_logits_on_another_grid_are_brought_onto_that_of_the_image(tmp_path):
    data = write_cases(tmp_path / "coarse", 4)
    for file in (data / "logits").iterdir():
        volume = nibabel.load(file)
        steps = np.diag([2.0, 1.0, 1.0, 1.0])
        nibabel.Nifti1Image(np.asarray(volume.dataobj)[::2], volume.affine @ steps).to_filename(file)
    refused = run_script("study.py", data, *SHORT, "-o", tmp_path / "refused")
    assert refused.returncode == 1
    assert "different grids" in refused.stderr
    done = run_script("study.py", data, "--resample", *SHORT, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    home = tmp_path / "out" / "coarse" / "logits"
    shape = load_nifti(data / "labels" / "case0.nii.gz").shape
    for folder in (home / "refined" / "trained", home / "rivals" / "scaling", home / "rivals" / "guided"):
        assert load_nifti(folder / "case0.nii.gz").shape == shape
    assert "as `infer` and `evaluate` give it: the same." in done.stdout


def test_a_folder_without_logits_says_what_to_do(heart):
    data, _, _, _ = heart
    done = run_script("study.py", data, "-o", data.parent / "none")
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
