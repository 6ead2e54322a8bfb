"""`evaluate --lesions` from files to files: drawn lesions with known answers, what became of the
baseline's, and what is refused.
"""

import csv
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from cli_helpers import files_in, run_here
from evaluation_helpers import SHAPE, SPACING, Study, affine, read_metrics, save_map
from io_helpers import save_nifti

from crfrefine.base.lesion_rules import LESION_RULES
from crfrefine.evaluate import measuring, report
from crfrefine.evaluate.report.charts import draw_lesions
from crfrefine.metrics.lesion_scores import Lesion, measure_lesions
from crfrefine.pictures.preview import draw_preview

VOXEL_MM3 = math.prod(SPACING)
# Boxes by name: of two cases, label 1 unless said otherwise.
AT_BORDER = (slice(0, 2), slice(0, 3), slice(0, 1))  # 6 voxels
MIDDLE = (slice(5, 7), slice(5, 7), slice(3, 4))  # 4 voxels
FAR = (slice(10, 12), slice(8, 10), slice(5, 6))  # 4 voxels
SMALL = (slice(12, 13), slice(0, 1), slice(6, 7))  # 1 voxel
FALSE = (slice(8, 9), slice(2, 4), slice(1, 2))
OTHER_FALSE = (slice(3, 4), slice(8, 10), slice(5, 6))
NEW_FALSE = (slice(6, 8), slice(0, 1), slice(0, 1))
LEFT = (slice(1, 3), slice(4, 5), slice(2, 3))  # LEFT and RIGHT are apart, LONG is over both.
RIGHT = (slice(6, 8), slice(4, 5), slice(2, 3))
LONG = (slice(1, 8), slice(4, 5), slice(2, 3))


def drawn(*boxes, label=1):
    values = np.zeros(SHAPE, np.uint8)
    for box in boxes:
        values[box] = label
    return values


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Case a: the method loses MIDDLE and gains FAR, removes FALSE, keeps part of OTHER_FALSE, and
    makes NEW_FALSE. Case b: no label 2 in the reference, which the baseline has; LONG is over two
    lesions, and under two of the baseline.
    """
    part = (*OTHER_FALSE[:1], slice(8, 9), *OTHER_FALSE[2:])
    maps = {
        "labels": {
            "a": drawn(AT_BORDER, MIDDLE, FAR, SMALL),
            "b": drawn(LEFT, RIGHT) + drawn(AT_BORDER, label=3),
        },
        "before": {
            "a": drawn(AT_BORDER, MIDDLE, FALSE, OTHER_FALSE),
            "b": drawn(LONG) + drawn(FAR, label=2) + drawn(AT_BORDER, label=3),
        },
        "after": {
            "a": drawn(AT_BORDER, FAR, part, NEW_FALSE),
            "b": drawn(LEFT, RIGHT) + drawn(AT_BORDER, label=3),
        },
    }
    root = tmp_path_factory.mktemp("lesions")
    for folder, cases in maps.items():
        for case, values in cases.items():
            save_map(root / folder / f"{case}.nii.gz", values)
    return Study(root, maps)


def evaluate(study, output, *options):
    arguments = [*study.arguments[:-1], output]
    return run_here(*arguments, *options, status=0)


def read_lesions(output):
    with (output / "lesions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_lesions_are_counted_and_compared_with_those_of_the_baseline(study, tmp_path):
    result = evaluate(study, tmp_path, "--lesions", "--lesion-min-volume", 1.5 * VOXEL_MM3)
    metrics = read_metrics(tmp_path)

    def counts(case, method, label="1"):
        names = ("lesions", "lesions_found", "lesions_missed", "lesions_false")
        return [metrics[case, label, name, method] for name in names]

    assert counts("a", "before") == [3, 2, 1, 2], "SMALL does not count"
    assert counts("a", "prediction") == [3, 2, 1, 2]
    assert counts("b", "before") == [2, 2, 0, 0], "one component over two lesions finds both"
    assert counts("b", "before", "2") == [0, 0, 0, 1], "an empty reference"
    assert counts("a", "before", "2") == [0, 0, 0, 0]
    assert math.isnan(metrics["b", "2", "lesion_sensitivity", "before"])
    changes = [
        metrics["a", "1", f"lesions_{name}", "prediction"]
        for name in ("lost", "gained", "made", "removed")
    ]
    assert changes == [1, 1, 1, 1]
    assert metrics["b", "2", "lesions_removed", "prediction"] == 1
    assert ("a", "1", "lesions_lost", "before") not in metrics

    totals = json.loads((tmp_path / "summary.json").read_text())["lesions"]
    assert totals["prediction"]["1"] == {
        **{"lesions": 5, "lesions_found": 4, "lesions_missed": 1, "lesions_false": 2},
        **{"lesion_sensitivity": 0.8, "lesion_precision": 4 / 6, "lesion_f1": 8 / 11},
        **{"lesions_lost": 1, "lesions_gained": 1, "lesions_made": 1, "lesions_removed": 1},
        "worst_case": "a",
    }
    assert totals["before"]["2"]["lesion_sensitivity"] is None
    assert "worst_case" not in totals["before"]["1"]
    last = result.stdout.splitlines()[-1]
    assert last.endswith(
        "Lesions: of 5 lesions that before finds, the prediction loses 1 (worst case: a), "
        "and gains 1; of 3 false ones, it removes 2, and makes 1; F1 0.7143 → 0.7692."
    )
    shown = [line.split("\t") for line in result.stdout.splitlines() if line.startswith("1\t")]
    counted = ["1", "prediction", "5", "4", "1", "2", "1", "1", "1", "1"]
    assert shown[0] == [*counted, "0.8000", "0.6667", "0.7273", "a"]


def test_a_case_whose_lesions_cannot_be_measured_has_no_values(study, tmp_path, monkeypatch):
    def fail(label_map, reference, *others):
        if (reference == 3).any():
            raise ZeroDivisionError
        return measure_lesions(label_map, reference, *others)

    monkeypatch.setattr(measuring, "measure_lesions", fail)
    result = run_here(*study.arguments[:-1], tmp_path, "--lesions", status=1)
    assert "unexpected ZeroDivisionError" in result.stderr
    assert {case for case, *_ in read_metrics(tmp_path)} == {"a"}


def test_a_case_that_fails_after_its_first_lesions_has_none_of_them(study, tmp_path, monkeypatch):
    others = []

    def fail(label_map, reference, *rest):
        others.append(label_map)
        if len(others) > 1:
            raise MemoryError
        return measure_lesions(label_map, reference, *rest)

    monkeypatch.setattr(measuring, "measure_lesions", fail)
    run_here(*study.arguments[:-1], tmp_path, "--lesions", status=1)
    assert not read_lesions(tmp_path)


def test_the_table_has_a_row_for_each_lesion_with_its_place(study, tmp_path):
    evaluate(study, tmp_path, "--lesions", "isles")
    rows = [
        row for row in read_lesions(tmp_path) if (row["case"], row["method"]) == ("a", "before")
    ]
    assert [row["outcome"] for row in rows] == [
        "found",
        "found",
        "missed",
        "missed",
        "false",
        "false",
    ]
    middle = rows[1]
    assert float(middle["volume_ml"]) == pytest.approx(4 * VOXEL_MM3 / 1000)
    place = affine() @ [5.5, 5.5, 3.0, 1.0]
    found = [float(middle[name]) for name in ("x_mm", "y_mm", "z_mm")]
    # The file has float32 of its geometry.
    np.testing.assert_allclose(found, place[:3], atol=1e-4)
    assert (middle["matched_to"], middle["dice"], middle["hd95_mm"]) != ("", "0.0", "374.0")
    assert (rows[2]["matched_to"], rows[2]["dice"], rows[2]["hd95_mm"]) == ("", "0.0", "374.0")
    by_change = {row["change"]: row for row in read_lesions(tmp_path) if row["change"]}
    assert set(by_change) == {"lost", "gained", "made"}
    assert by_change["lost"]["lesion"] == middle["lesion"]
    both = [row for row in read_lesions(tmp_path) if (row["case"], row["label"]) == ("b", "1")]
    assert [row["matched_to"] for row in both if row["method"] == "before"] == ["1", "1"]


def test_rules_of_matching_and_neighbors_count(study, tmp_path):
    evaluate(study, tmp_path, "--lesions", "autopet", "--lesion-match", "iou")
    metrics = read_metrics(tmp_path)
    assert metrics["b", "1", "lesions_found", "before"] == 0, "4 of 7 voxels are two lesions"
    settings = json.loads((tmp_path / "summary.json").read_text())["settings"]["lesions"]
    rules = {"rules_of": "autopet", **vars(LESION_RULES["autopet"]), "match": "iou"}
    assert settings == rules


def test_the_report_leads_from_each_lost_lesion_to_its_picture(study, tmp_path):
    arguments = [word for word in study.arguments[:-1] if word != "--no-report"]
    run_here(*arguments, tmp_path, "--lesions", status=0)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("Found and false lesions by volume") == 1
    assert '<a href="#lesion-1"><bdi>a</bdi>: lesion 2 of 1, 0.012 ml</a>' in page
    assert page.count('<h3 id="lesion-1"><bdi>a</bdi>: lost lesion 2 of 1, 0.012 ml</h3>') == 1
    assert "#lesion-2" not in page


def test_a_baseline_that_no_case_has_leaves_its_lesions_out(study, tmp_path):
    for case in study.maps["before"]:
        (tmp_path / "before").mkdir(exist_ok=True)
        (tmp_path / "before" / f"{case}.nii.gz").write_bytes(b"cut off")
    arguments = ["evaluate", study.after, study.labels, "-b", f"before={tmp_path / 'before'}"]
    result = run_here(*arguments, "--lesions", "-o", tmp_path / "out", status=1)
    assert "no verdict" in result.stdout
    totals = json.loads((tmp_path / "out" / "summary.json").read_text())["lesions"]
    assert set(totals) == {"prediction"}
    assert "lesions_lost" not in totals["prediction"]["1"]


def test_the_sentence_is_on_cases_that_both_methods_have(study, tmp_path):
    for folder in ("labels", "before", "after"):
        shutil.copytree(study.root / folder, tmp_path / folder)
    for name in ("c", "d"):  # In b and c, which are equal, a lesion is lost.
        (tmp_path / "labels" / f"{name}.nii.gz").write_bytes(
            (study.labels / "a.nii.gz").read_bytes()
        )
        for folder, source in (("before", study.labels), ("after", study.before)):
            (tmp_path / folder / f"{name}.nii.gz").write_bytes((source / "a.nii.gz").read_bytes())
    (tmp_path / "after" / "a.nii.gz").write_bytes(b"cut off")
    arguments = ["evaluate", tmp_path / "after", tmp_path / "labels", "--lesions", "-o"]
    arguments += [tmp_path / "out", "-b", f"before={tmp_path / 'before'}", "--regions", "one=1"]
    result = run_here(*arguments, "--no-report", status=1)
    assert result.stdout.splitlines()[-1].endswith(
        "Lesions: of 10 lesions that before finds, the prediction loses 4 (worst case: c), "
        "and gains 0; of 0 false ones, it removes 0, and makes 4; F1 1.0000 → 0.6000."
    )
    assert f"written: {tmp_path / 'out' / 'lesions.csv'}" in result.stderr
    written = [tmp_path / "out" / name for name in ("metrics.csv", "lesions.csv", "summary.json")]
    assert written == sorted(written, key=lambda path: path.stat().st_mtime_ns)

    result = run_here(*arguments[:-1], "none=9", "--no-report", status=1)
    assert result.stdout.splitlines()[-1].endswith("F1 undefined → undefined.")


def test_the_picture_of_a_lesion_of_several_parts_shows_one_of_them(tmp_path, monkeypatch):
    for name, boxes in (("after", (NEW_FALSE,)), ("labels", (LEFT, RIGHT)), ("before", (LONG,))):
        save_map(tmp_path / f"{name}.nii.gz", drawn(*boxes))
    after, labels, before = (tmp_path / f"{name}.nii.gz" for name in ("after", "labels", "before"))
    drawn_through = []

    def draw(*arguments, through, **options):
        drawn_through.append(through)
        return draw_preview(*arguments, through=through, **options)

    monkeypatch.setattr(report, "draw_preview", draw)
    arguments = ["evaluate", after, labels, "-b", f"before={before}", "-o", tmp_path / "out"]
    run_here(*arguments, "--lesions=brats", "--lesion-min-volume", 0.5, status=0)
    assert drawn(LEFT, RIGHT)[drawn_through[-1]] == 1, "the center is between the two"
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "dilation of 3 voxels, match by overlap, and lesions of the reference above 0.5" in page


@pytest.mark.parametrize("volumes", [(), (1e-7, 0.001, 12000.0)])
def test_the_chart_shows_lesions_of_every_volume(volumes, monkeypatch):
    lesions = [Lesion("1", "found", 1, volume, (0.0, 0.0, 0.0)) for volume in volumes]
    result = SimpleNamespace(case_id="a", lesions={"network": lesions})
    unused = SimpleNamespace(case_id="learned", lesions={"network": 5 * lesions})
    evaluation = SimpleNamespace(
        results=[result, unused],
        table=SimpleNamespace(cases=("a",)),
        compared=["network"],
        judged_regions=("1",),
        options=SimpleNamespace(name="network"),
    )
    axes_class = pytest.importorskip("matplotlib.axes").Axes
    counts = []
    hist = axes_class.hist

    def count(axes, *arguments, **options):
        counts.append(hist(axes, *arguments, **options)[0].sum())

    monkeypatch.setattr(axes_class, "hist", count)
    assert draw_lesions(evaluation)
    assert counts == [len(volumes), 0]


def test_a_slice_has_lesions_too(tmp_path):
    paths = []
    for name, rows in (("after", slice(6, 7)), ("labels", slice(2, 4)), ("before", slice(2, 4))):
        values = np.zeros((9, 7), np.uint8)
        values[rows, 1:3] = 1
        paths.append(save_nifti(tmp_path / f"{name}.nii.gz", values, affine()))
    after, labels, before = paths
    output = tmp_path / "out"
    run_here(
        "evaluate", after, labels, "-b", f"before={before}", "--lesions", "-o", output, status=0
    )
    rows = read_lesions(output)
    assert [row["change"] for row in rows] == ["lost", "made", ""]
    found = [float(rows[0][name]) for name in ("x_mm", "y_mm", "z_mm")]
    np.testing.assert_allclose(found, (affine() @ [2.5, 1.5, 0, 1])[:3], atol=1e-4)
    assert 'id="lesion-1"' in (output / "report.html").read_text(encoding="utf-8")


def test_without_lesions_nothing_is_about_them(study, tmp_path):
    arguments = [word for word in study.arguments[:-1] if word != "--no-report"]
    run_here(*arguments, tmp_path, status=0)
    assert files_in(tmp_path) == ["metrics.csv", "report.html", "summary.json"]
    assert "lesion" not in (tmp_path / "metrics.csv").read_text()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "lesions" not in {**summary, **summary["settings"]}
    assert 'id="lesions"' not in (tmp_path / "report.html").read_text(encoding="utf-8")
    (tmp_path / "lesions.csv").write_text("from an earlier run")
    result = run_here(*arguments, tmp_path, status=0)
    assert "lesions.csv is from an earlier run" in result.stderr


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--lesion-match", "iou"], "--lesion-match: is a rule of --lesions; add that option"),
        (["--lesion-min-volume", "0"], "--lesion-min-volume: is a rule of --lesions"),
        (["--lesions", "--lesion-min-volume", "-1"], "volume of lesions: expected mm³, at least 0"),
        (["--lesions", "--lesion-min-volume", "nan"], "expected mm³, at least 0, got nan"),
        (["--lesions", "--lesion-min-volume", "big"], "--lesion-min-volume"),
        (["--lesions=fives"], "isles"),
        (["--lesions", "--lesion-connectivity", "8"], "expected 6, 18 or 26, got 8"),
    ],
)
def test_bad_rules_are_refused(study, tmp_path, options, problem):
    result = run_here(*study.arguments[:-1], tmp_path / "out", *options)
    assert result.status != 0
    assert problem in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()
