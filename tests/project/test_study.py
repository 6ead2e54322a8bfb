"""The study's chain in miniature: on each case parameters that have not seen it, figures from the files that the commands wrote."""

from __future__ import annotations

import csv
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest
from cli_helpers import load_nifti
from scipy import stats
from study_helpers import BENCHMARKS, TABLES, run_script
from training_helpers import write_cases

from crfrefine.cases.case import ReadingOptions, discover_cases, load_case
from crfrefine.parameters.model import CrfParameters
from crfrefine.refinement.case import refine
from crfrefine.train.baselines import VectorScaling

pytestmark = pytest.mark.long

NUM_CASES = 4
MARKERS = {name: (f"<!-- {name}:begin -->", f"<!-- {name}:end -->") for name in TABLES}
REGIONS = ("whole=1+2", "cyst=3")


def run_study(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_script("study.py", *arguments)


@dataclass(frozen=True)
class Outcome:
    data: Path
    output: Path
    document: Path
    arguments: tuple[object, ...]
    done: subprocess.CompletedProcess[str]

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
    arguments = (
        data,
        "--regions",
        *REGIONS,
        "--resample",
        "--folds",
        2,
        "--num-iterations",
        3,
        "--threads",
        1,
        "-o",
        root / "out",
        "--document",
        document,
    )
    done = run_study(*arguments)
    assert done.returncode == 0, done.stderr
    return Outcome(data, root / "out", document, arguments, done)


def case_of(study, case_id):
    files = discover_cases(study.data / "images", study.data / "logits", labels=study.data / "labels")
    return load_case(next(case for case in files if case.case_id == case_id), ReadingOptions(resample=True), with_labels=True)


def test_each_case_is_refined_by_the_fold_that_has_not_seen_it(study):
    """The label map is that of the fold which held the case out, and another fold's would be another one."""
    folds = study.folds
    assert sorted(case for fold in folds for case in fold["held_out"]) == [f"case{number}" for number in range(NUM_CASES)]
    num_other = 0
    for fold, other in (folds, folds[::-1]):
        assert not {*fold["training"], *fold["deciding"]} & set(fold["held_out"])
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
    assert num_other > 0


def test_recalibration_is_that_of_the_fold_that_has_not_seen_the_case(study):
    for fold in study.folds:
        scaling = VectorScaling(fold["vector_scaling"]["temperature"], tuple(fold["vector_scaling"]["bias"]))
        for case_id in fold["held_out"]:
            expected = scaling.apply(case_of(study, case_id).logits).argmax(axis=0)
            np.testing.assert_array_equal(load_nifti(study.home / "rivals" / "scaling" / f"{case_id}.nii.gz"), expected)


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
    network = next(row for row in rows if row[0].startswith("the network"))
    trained = next(row for row in rows if row[0] == "**trained CRF**")
    assert network[1] == f"{before.mean():.4f}"
    assert trained[1] == f"{100 * (after - before).mean():+.2f}".replace("-", "−")
    own = next(row for row in rows if row[:2] == ["data, `logits`", "whole"])
    head = next(row for row in rows if row[:2] == ["data, `logits`", str(NUM_CASES)])
    _, mean, interval, p_value, counts = trained[len(REGIONS) : len(REGIONS) + 5]
    assert head[2:7] == [network[len(REGIONS) + 1], head[3], f"{mean} ({interval})", p_value, counts]
    assert head[8] == "too few cases"
    gains = {row[0]: float(row[len(REGIONS) + 1].replace("−", "-")) for row in rows[rows.index(network) + 1 : rows.index(trained)]}
    best = max(gains, key=lambda name: gains[name])
    assert head[7].split(", ")[1] == f"{gains[best]:+.2f}".replace("-", "−")
    assert head[3] == next(row for row in rows if row[0] == "`default`, untrained")[len(REGIONS) + 1]
    assert own[2] == str(NUM_CASES)
    assert own[3] == f"{before.mean():.3f} ± {before.std(ddof=1):.3f}"
    assert own[4] == f"{after.mean():.3f} ± {after.std(ddof=1):.3f}"
    assert float(own[6]) == pytest.approx(stats.ttest_rel(after, before).pvalue, rel=0.1)  # printed with one or two digits
    assert float(own[7]) == pytest.approx(stats.wilcoxon(after - before).pvalue, rel=0.1)
    verdict = json.loads((study.home / "evaluation" / "summary.json").read_text())["verdict"]
    assert f"> {verdict['sentence']}" in text
    assert verdict["outcome"] == "too few cases"
    rivals = ["vector scaling", "Gaussian smoothing", "guided filter", "Dice decision", "largest component", "default CRF"]
    assert [rival["name"] for rival in verdict["rivals"]] == rivals


def test_label_maps_have_a_table_of_their_own_beside_their_logits(study, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from study_findings import read_findings
    from study_tables import make_document

    logits, maps = (read_findings("data", name, study.home) for name in ("logits", "label_maps_of_logits"))
    text = make_document([logits, maps])
    assert text["summary"] == make_document([logits])["summary"]
    *_, head, _, row = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text["label-maps"].splitlines()]
    assert (head[0], row[0], row[1], row[7]) == ("label maps of", "data, `logits`", str(NUM_CASES), "too few cases")
    assert row[8] == row[4].split(" (")[0]  # here both are of the same files
    assert "| label maps of data, `logits` |" in text["cost"]


def test_stages_are_kept_gone_on_with_or_done_anew(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from study_stages import Stages

    def run(inputs, fails=False):
        """Two stages, each of which finds what is there and adds to it; the folders' contents, and what was done."""
        done = []

        def work(folder):
            done.append((folder.name, len(list(folder.iterdir()))))
            (folder / f"file{len(list(folder.iterdir()))}").touch()
            if fails and folder.name == "second":
                raise KeyboardInterrupt

        stages = Stages(tmp_path / "own", "test")
        stages.run("first", inputs, work)
        stages.run("second", [], work)
        return done

    with pytest.raises(KeyboardInterrupt):
        run(["a"], fails=True)
    assert run(["a"]) == [("second", 1)]  # goes on with what the stopped one left
    assert run(["a"]) == []
    assert run(["b"]) == [("first", 0), ("second", 0)]  # the second rests on the first
