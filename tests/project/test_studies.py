"""The studies in miniature: what is measured on a case comes from folds that have not seen it, and
the tables are those of the files.
"""

import csv
import json
from importlib.util import find_spec
from pathlib import Path

import nibabel
import numpy as np
import pytest
from cli_helpers import load_nifti, run_here
from data_sets import found_cases
from script_imports import importing_from
from training_helpers import shorten, write_cases

from crfrefine.cases.case import load_case
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.parameters.model import CrfParameters
from crfrefine.refinement.case import refine

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_torch_thread")]

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def keep_every_other_plane(file):
    """Bring logits onto a grid of their own, which ends where the image's does or one voxel
    earlier.
    """
    volume = nibabel.load(file)
    nibabel.Nifti1Image(
        np.asarray(volume.dataobj)[:, ::2], volume.affine @ np.diag([1.0, 2.0, 1.0, 1.0])
    ).to_filename(file)


def run_command(*arguments, log):
    """Instead of a process for each of ten commands."""
    result = run_here(*arguments, status=0)
    log.write_text(result.stdout)
    return 100.0


def test_each_case_is_refined_by_the_fold_that_has_not_seen_it(tmp_path, monkeypatch):
    data = write_cases(tmp_path / "data", 4)
    for file in (data / "logits").iterdir():
        keep_every_other_plane(file)
    shorten(monkeypatch)
    monkeypatch.setenv("CRFREFINE_DATA", str(tmp_path))
    with importing_from(BENCHMARKS) as load:
        study = load("study")
        monkeypatch.setattr(
            study, "DATA_SETS", (study.DataSet("data", ("whole=1+2", "cyst=3"), resample=True),)
        )
        monkeypatch.setattr(study, "QUICK_TRAINING", ("--folds", "2", "--num-iterations", "8"))
        monkeypatch.setattr(study, "crfrefine", run_command)
        study.main(["--quick", "--threads", "1", "-o", str(tmp_path / "out")])
    home = tmp_path / "out" / "data" / "logits"
    folds = json.loads((home / "training" / "params.report.json").read_text())["folds"]
    assert sorted(case for fold in folds for case in fold["held_out"]) == [
        f"case{number}" for number in range(4)
    ]
    differ = []
    for files in found_cases(data / "images", data / "logits", labels=data / "labels"):
        case = load_case(files, ReadingOptions(resample="linear"), with_labels=True)
        maps = []
        for fold in sorted(folds, key=lambda fold: files.case_id not in fold["held_out"]):
            assert (files.case_id in fold["held_out"]) != (
                files.case_id in {*fold["training"], *fold["deciding"]}
            )
            parameters = CrfParameters.from_dict(fold["fit"]["parameters"])
            maps.append(
                refine(
                    case.logits, case.image, spacing=case.spacing, parameters=parameters
                ).label_map
            )
        np.testing.assert_array_equal(
            load_nifti(home / "refined" / "trained" / f"{files.case_id}.nii.gz"), maps[0]
        )
        differ.append((maps[0] != maps[1]).any())
    assert any(differ), "else the case above could be refined by either fold"
    with (home / "evaluation" / "metrics.csv").open() as stream:
        found = [
            row
            for row in csv.DictReader(stream)
            if (row["label"], row["metric"]) == ("whole", "dice")
        ]
    before, after = (
        np.mean([float(row["value"]) for row in found if row["method"] == name])
        for name in ("network", "trained CRF")
    )
    text = (tmp_path / "out" / "results.md").read_text()
    rows = {
        cells[1].strip(" *"): cells[2].strip()
        for line in text.splitlines()
        if len(cells := line.split("|")) > 3
    }
    assert (
        next(value for name, value in rows.items() if name.startswith("the network"))
        == f"{before:.4f}"
    )
    assert rows["trained CRF"] == f"{100 * (after - before):+.2f}".replace("-", "−")
    verdict = json.loads((home / "evaluation" / "summary.json").read_text())["verdict"]
    assert f"> {verdict['sentence']}" in text
    has_rankseg = find_spec("rankseg") is not None
    rivals = [
        "vector scaling",
        "guided filter",
        "largest component",
        "default preset",
        *(["rankseg"] if has_rankseg else []),
    ]
    assert ("`rankseg` was not installed and is left out." in text) != has_rankseg
    assert "**4 cases: an anecdote.**" in text
    assert [rival["name"] for rival in verdict["rivals"]] == rivals
