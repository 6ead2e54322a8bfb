"""`infer --statistics` writes the volumes and mean intensities of each label."""

import csv
import json
import math
import re

import numpy as np
import pytest
from cli_helpers import (
    GRID_SHAPE,
    SPACING,
    infer,
    load_nifti,
    run_here,
    save_nifti,
    summary_of,
    write_folders,
)
from scipy import ndimage

from crfrefine.demo.phantom import make_phantom
from crfrefine.infer.label_statistics import distinct_titles
from crfrefine.metrics.lesion_matching import component_changes

ML = math.prod(SPACING) / 1000
NAMES = {"background": 0, "shell": 1, "=core": 2, "cyst": 3}


@pytest.fixture
def folders(tmp_path):
    names = {"0": "T1", "1": "FLAIR"}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": NAMES, "channel_names": names}))
    return write_folders(tmp_path, "b", "a", "c")


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def cases_in(path):
    return [*dict.fromkeys(row["case"] for row in table(path))]


def test_each_row_has_volumes_and_means_of_its_label(folders):
    infer(folders, "--statistics", "--jobs", "3", status=0)
    rows = table(folders.output / "statistics.csv")
    assert list(rows[0]) == [
        *("case", "label", "name", "ml_before", "ml_after", "mean_T1", "mean_FLAIR"),
        *("vanished", "made", "merged", "split", "largest_vanished_ml"),
    ]
    assert cases_in(folders.output / "statistics.csv") == ["a", "b", "c"]
    for row in rows:
        label = int(row["label"])
        before = folders.scores(row["case"]).argmax(axis=0) == label
        after = load_nifti(folders.output / f"{row['case']}.nii.gz") == label
        assert row["name"] == {1: "shell", 2: "'=core", 3: "cyst"}[label]
        assert float(row["ml_before"]) == pytest.approx(before.sum() * ML, rel=1e-6)
        assert float(row["ml_after"]) == pytest.approx(after.sum() * ML, rel=1e-6)
        image = folders.image(row["case"]).astype(np.float64)
        for modality, name in enumerate(("mean_T1", "mean_FLAIR")):
            assert float(row[name]) == pytest.approx(image[modality][after].mean(), rel=1e-12)
    assert len(rows) == 9


def test_the_summary_has_the_same_rows(folders):
    summary = summary_of(folders, "--statistics")
    rows = []
    for case in summary["cases"]:
        for row in case["statistics"]:
            assert row["name"] == case["label_names"][str(row["label"])]
            rows.append([case["case_id"], row["ml_before"], row["ml_after"], *row["means"]])
    found = []
    for row in table(folders.output / "statistics.csv"):
        numbers = [float(row[key]) for key in row if key.startswith(("ml", "mean"))]
        found.append([row["case"], *numbers])
    assert found == rows
    assert summary_of(folders)["cases"][0]["statistics"] is None


def test_a_label_that_vanishes_has_no_mean(folders):
    infer(folders, "--statistics", "--set", "postprocess.min_component_ml=500", "--allow-vanishing")
    rows = table(folders.output / "statistics.csv")
    assert {(row["ml_after"], row["mean_T1"]) for row in rows} == {("0.0", "")}


def test_components_that_vanish_are_named(folders):
    arguments = ("--statistics", "--preview", "--set", "postprocess.min_component_ml=0.05")
    told = infer(folders, *arguments, "--allow-vanishing", status=0).stderr
    largest = {}
    total = 0
    for case in ("a", "b", "c"):
        before = folders.scores(case).argmax(axis=0)
        after = load_nifti(folders.output / f"{case}.nii.gz")
        for row in table(folders.output / "statistics.csv"):
            if row["case"] == case:
                label = int(row["label"])
                parts, count = ndimage.label(before == label, np.ones((3, 3, 3)))
                sizes = np.bincount(parts.ravel(), minlength=count + 1)
                sizes[np.unique(parts[after == label])] = 0
                sizes[0] = 0
                assert int(row["vanished"]) == np.count_nonzero(sizes)
                largest_ml = float(row["largest_vanished_ml"])
                assert largest_ml == pytest.approx(sizes.max() * ML, rel=1e-6)
                largest[case] = max(largest.get(case, 0.0), largest_ml)
                total += np.count_nonzero(sizes)
    assert total
    order = sorted(largest, key=largest.get, reverse=True)
    worst = f"the largest that vanished has {largest[order[0]]:.3g} ml ({order[0]})"
    assert re.search(rf"components: {total} vanished, \d+ made, .*; {re.escape(worst)}", told)
    result = run_here("status", folders.output)
    names = ", ".join(f"{case} ({largest[case]:.3g} ml)" for case in order)
    assert f"largest component that vanished: {names}" in result.stdout


def test_components_merge_and_split():
    """Two components become one, one becomes two, one vanishes and one is made."""
    before = np.zeros((40, 9, 2), np.uint8)
    after = np.zeros_like(before)
    before[[1, 3]] = 4
    after[1:4] = 4
    before[34:37] = 4
    after[[34, 36]] = 4
    before[10, 2:5] = 4
    after[12] = 4
    after[20, 2:4] = 7
    changes = component_changes(before, after, (4, 7))
    assert changes == {4: ((1, 1, 1, 1), 6), 7: ((0, 1, 0, 0), 0)}


def test_rows_of_cases_that_were_done_earlier_stay(folders):
    whole = folders.output / "statistics.csv"
    infer(folders, "--statistics", status=0)
    expected = whole.read_bytes()
    (folders.output / "b.nii.gz").unlink()
    infer(folders, "--statistics", "--continue", status=0)
    assert whole.read_bytes() == expected
    # What was done without statistics is refined again.
    infer(folders, status=0)
    done = infer(folders, "--statistics", "--continue", status=0)
    assert "3 cases (a, b, c): done without --statistics; refined again" in done.stderr
    assert whole.read_bytes() == expected


def test_a_failed_case_has_no_rows_and_the_others_have_theirs(folders):
    (folders.logits / "b.nii.gz").write_bytes(b"damaged")
    infer(folders, "--statistics", status=1)
    assert cases_in(folders.output / "statistics.csv") == ["a", "c"]


def test_each_part_of_an_array_has_its_own_table(folders):
    for part in range(2):
        infer(folders, "--statistics", "--num-parts", 2, "--part-id", part, status=0)
    assert cases_in(folders.output / "statistics-0-of-2.csv") == ["a", "c"]
    assert cases_in(folders.output / "statistics-1-of-2.csv") == ["b"]


def test_the_table_of_a_single_output_lies_beside_it(folders, tmp_path):
    images = []
    for modality in range(2):
        images += ["-i", folders.images / f"a_{modality:04d}.nii.gz"]
    logits = folders.logits / "a.nii.gz"
    output = tmp_path / "one" / "refined.nii.gz"
    run_here("infer", *images, "-p", logits, "-o", output, "--statistics", status=0)
    assert len(table(tmp_path / "one" / "refined_statistics.csv")) == 3


def test_voxels_that_are_nan_count_in_no_mean(folders):
    image = folders.image("a")
    labels = make_phantom(1, GRID_SHAPE, SPACING).logits.argmax(axis=0)
    is_nan = np.zeros(GRID_SHAPE, bool)
    is_nan[tuple(np.argwhere(labels == 2)[::3].T)] = True
    for modality, values in enumerate(image):
        path = folders.images / f"a_{modality:04d}.nii.gz"
        save_nifti(path, np.where(is_nan, np.nan, values).astype(np.float32))
    infer(folders, "--statistics", status=0)
    after = (load_nifti(folders.output / "a.nii.gz") == 2) & ~is_nan
    row = next(row for row in table(folders.output / "statistics.csv") if row["label"] == "2")
    assert row["case"] == "a"
    assert float(row["mean_T1"]) == pytest.approx(image[0][after].astype(float).mean(), rel=1e-6)


def test_with_nan_and_a_mask_means_are_over_the_same_voxels_as_without_nan(folders):
    """A mask says where the model applies, and not which voxels of a label are measured."""
    image = folders.image("a")
    mask = np.zeros(GRID_SHAPE, np.uint8)
    mask[2:-3, 1:-2, 1:] = 1
    save_nifti(folders.images.with_name("masks") / "a.nii.gz", mask)
    labels = make_phantom(0, GRID_SHAPE, SPACING).logits.argmax(axis=0)
    corner = tuple(np.argwhere(labels == 0)[0])
    options = ("-m", folders.images.with_name("masks"), "--statistics")
    for path in (*folders.images.glob("[bc]_*"), *folders.logits.glob("[bc].*")):
        path.unlink()
    infer(folders, *options, status=0)
    expected = table(folders.output / "statistics.csv")
    for modality, values in enumerate(image):
        values[corner] = np.nan
        save_nifti(folders.images / f"a_{modality:04d}.nii.gz", values.astype(np.float32))
    infer(folders, *options, status=0)
    found = table(folders.output / "statistics.csv")
    for row, wanted in zip(found, expected, strict=True):
        assert (row["label"], row["ml_after"]) == (wanted["label"], wanted["ml_after"])
        assert float(row["mean_T1"]) == pytest.approx(float(wanted["mean_T1"]), rel=1e-6)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (("CT", "CT"), ["mean_CT_1", "mean_CT_2"]),
        (("CT", "PET", "CT", "CT_1"), ["mean_CT_1_", "mean_PET", "mean_CT_2", "mean_CT_1"]),
        (("T1", "T2"), ["mean_T1", "mean_T2"]),
    ],
)
def test_columns_of_modalities_with_one_name_get_numbers(names, columns):
    assert [f"mean_{title}" for title in distinct_titles(names)] == columns


def test_each_modality_has_its_own_column_though_both_are_named_ct(folders, tmp_path):
    content = {"labels": NAMES, "channel_names": {"0": "CT", "1": "CT"}}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    infer(folders, "--statistics", status=0)
    row = table(folders.output / "statistics.csv")[0]
    assert [name for name in row if name.startswith("mean")] == ["mean_CT_1", "mean_CT_2"]
    assert row["mean_CT_1"] != row["mean_CT_2"]


def test_tables_of_parts_are_merged_to_that_of_one_run(folders, tmp_path):
    """With more parts than cases, and a part that has not run yet."""
    whole = folders._replace(output=tmp_path / "whole")
    infer(whole, "--statistics", status=0)
    for part in range(3):
        infer(folders, "--statistics", "--num-parts", 4, "--part-id", part, status=0)
        status = int(part < 2)
        merged = run_here("status", folders.output, "--merge", status=status)
    table_of_one_run = (whole.output / "statistics.csv").read_bytes()
    assert (folders.output / "statistics.csv").read_bytes() == table_of_one_run
    assert (folders.output / "statistics-2-of-4.csv").exists()
    assert "3 cases: 3 done" in merged.stdout
    (folders.output / "statistics-1-of-4.csv").unlink()
    refused = run_here("status", folders.output, "--merge", status=1)
    assert "lacks statistics-1-of-4.csv: run these parts with --statistics" in refused.stderr
    assert "its run has no parts" in run_here("status", whole.output, "--merge", status=1).stderr
