"""Cases without logits, label maps alone, and who gains: what the study does beside its plain chain."""

from __future__ import annotations

import json
import shutil

import nibabel
import numpy as np
import pytest
from study_helpers import BENCHMARKS, run_script
from training_helpers import write_cases

from crfrefine.statistics.comparison import Measurement, ResultTable

pytestmark = pytest.mark.long

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
