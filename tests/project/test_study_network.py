"""Cases without logits, label maps alone, and who gains: what the study does beside its plain chain."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from script_imports import importing_from
from training_helpers import write_cases

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_torch_thread")]

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NUM_CASES = 3


@pytest.fixture(scope="module")
def hearts(tmp_path_factory):
    """Cases without logits, thick along the second axis."""
    data = write_cases(tmp_path_factory.mktemp("hearts") / "hearts", NUM_CASES)
    for file in [*(data / "images").iterdir(), *(data / "labels").iterdir()]:
        volume = nibabel.load(file)
        nibabel.Nifti1Image(np.asarray(volume.dataobj), np.diag([1.9, 9.5, 1.5, 1.0])).to_filename(file)
    shutil.rmtree(data / "logits")
    return data


def test_each_case_has_logits_of_a_network_that_has_not_seen_it_also_after_an_interruption(hearts, tmp_path, capsys):
    """A fold that was not complete is trained again, with the same result; the others are not touched."""
    network = tmp_path / "network"
    with importing_from(BENCHMARKS) as load:
        schedule = load("study_unet").Schedule(num_steps=1, batch=2, patch=16, width=4)
        load("study_network").add_logits(hearts, network, schedule)
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
        load("study_network").add_logits(hearts, network, schedule)
    output = capsys.readouterr()
    assert (output.out + output.err).count("is there already") == NUM_CASES - 1
    assert {file.name: file.read_bytes() for file in (network / "logits").iterdir()} == before
