"""The study's chain in miniature: on each case parameters that have not seen it, figures from the files that the commands wrote."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest
from cli_helpers import load_nifti, run_here
from scipy import stats
from script_imports import importing_from
from training_helpers import shorten, write_cases

from crfrefine.cases.case import ReadingOptions, discover_cases, load_case
from crfrefine.parameters.model import CrfParameters
from crfrefine.refinement.case import refine
from crfrefine.train.baselines import VectorScaling

pytestmark = pytest.mark.long

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TABLES = ("summary", "study", "size", "quality", "calibration", "cost", "label-maps", "paper")  # by their markers in the page
NUM_CASES = 4
MARKERS = {name: (f"<!-- {name}:begin -->", f"<!-- {name}:end -->") for name in TABLES}
REGIONS = ("whole=1+2", "cyst=3")


@dataclass(frozen=True)
class Outcome:
    data: Path
    output: Path
    document: Path

    @property
    def home(self) -> Path:
        return self.output / "data" / "logits"

    @property
    def folds(self) -> list[dict]:
        return json.loads((self.home / "training" / "params.report.json").read_text())["folds"]


def keep_every_other_plane(file):
    """Bring logits onto a grid of their own, which ends where the image's does or one voxel earlier."""
    volume = nibabel.load(file)
    nibabel.Nifti1Image(np.asarray(volume.dataobj)[:, ::2], volume.affine @ np.diag([1.0, 2.0, 1.0, 1.0])).to_filename(file)


def run_command(*arguments, log):
    """Instead of a process for each of ten commands."""
    result = run_here(*arguments)
    assert result.status == 0, result.stderr
    log.write_text(result.stdout)
    return 100.0


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    data = write_cases(root / "data", NUM_CASES)
    for file in (data / "logits").iterdir():
        keep_every_other_plane(file)
    document = root / "results.md"
    begin_study, end_study = MARKERS["study"]
    others = [line for name in TABLES[2:] for line in MARKERS[name]]
    lines = ["kept before", *MARKERS["summary"], begin_study, "replaced", end_study, "kept", *others, "kept after", ""]
    document.write_text("\n".join(lines))
    options = ["--resample", "--folds", 2, "--num-iterations", 2, "--threads", 1, "-o", root / "out", "--document", document]
    with pytest.MonkeyPatch.context() as patch, importing_from(BENCHMARKS) as load:
        shorten(patch)
        patch.setattr(sys, "argv", ["study.py", *map(str, [data, "--regions", *REGIONS, *options])])
        patch.setattr(load("study_chain"), "crfrefine", run_command)
        load("study").main()
    return Outcome(data, root / "out", document)


def case_of(study, case_id):
    files = discover_cases(study.data / "images", study.data / "logits", labels=study.data / "labels")
    return load_case(next(case for case in files if case.case_id == case_id), ReadingOptions(resample=True), with_labels=True)


def test_each_case_is_refined_and_recalibrated_by_the_fold_that_has_not_seen_it(study):
    """The label map is that of the fold which held the case out, and another fold's would be another one."""
    folds = study.folds
    assert sorted(case for fold in folds for case in fold["held_out"]) == [f"case{number}" for number in range(NUM_CASES)]
    num_other = 0
    for fold, other in (folds, folds[::-1]):
        assert not {*fold["training"], *fold["deciding"]} & set(fold["held_out"])
        scaling = VectorScaling(fold["vector_scaling"]["temperature"], tuple(fold["vector_scaling"]["bias"]))
        for case_id in fold["held_out"]:
            case = case_of(study, case_id)
            own_map, other_map = (
                refine(
                    case.logits, case.image, spacing=case.spacing, parameters=CrfParameters.from_dict(one["fit"]["parameters"])
                ).label_map
                for one in (fold, other)
            )
            np.testing.assert_array_equal(load_nifti(study.home / "refined" / "trained" / f"{case_id}.nii.gz"), own_map)
            num_other += bool((own_map != other_map).any())
            recalibrated = load_nifti(study.home / "rivals" / "scaling" / f"{case_id}.nii.gz")
            np.testing.assert_array_equal(recalibrated, scaling.apply(case.logits).argmax(axis=0))
    assert num_other > 0


def metrics(study):
    with (study.home / "evaluation" / "metrics.csv").open() as stream:
        rows = {(row["case"], row["label"], row["metric"], row["method"]): row["value"] for row in csv.DictReader(stream)}
    return {key: float(value) for key, value in rows.items() if value}


def test_the_tables_are_those_of_the_files(study):
    values = metrics(study)
    cases = sorted({key[0] for key in values})
    before, after = (np.array([values[case, "whole", "dice", method] for case in cases]) for method in ("network", "trained CRF"))
    text = study.document.read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert next(row for row in rows if row[0].startswith("the network"))[1] == f"{before.mean():.4f}"
    trained = next(row for row in rows if row[0] == "**trained CRF**")
    assert trained[1] == f"{100 * (after - before).mean():+.2f}".replace("-", "−")
    own = next(row for row in rows if row[:2] == ["data, `logits`", "whole"])
    assert own[2:5] == [str(NUM_CASES), *(f"{dice.mean():.3f} ± {dice.std(ddof=1):.3f}" for dice in (before, after))]
    assert float(own[6]) == pytest.approx(stats.ttest_rel(after, before).pvalue, rel=0.1)  # printed with one or two digits
    assert float(own[7]) == pytest.approx(stats.wilcoxon(after - before).pvalue, rel=0.1)
    verdict = json.loads((study.home / "evaluation" / "summary.json").read_text())["verdict"]
    assert f"> {verdict['sentence']}" in text
    rivals = ["vector scaling", "Gaussian smoothing", "guided filter", "Dice decision", "largest component", "default CRF"]
    assert [rival["name"] for rival in verdict["rivals"]] == rivals
