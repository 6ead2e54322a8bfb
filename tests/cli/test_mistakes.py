"""Inputs that are not what the user takes them for, and one cause that fails many cases: recognized, and reported once."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import GRID_SHAPE, Folders, load_nifti, run_here, save_nifti, write_folders
from dicom_helpers import save, slices

from crfrefine.failures import Causes

FAST = ("--set", "mean_field.filter=lattice")
EXCHANGED = "-i and -p seem to be exchanged"


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return write_folders(tmp_path, "c0", "c1", "c2")


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("crfrefine: error:")]


def test_logits_that_no_case_has_are_one_error(folders):
    """With the names that are there."""
    for path in sorted(folders.logits.iterdir()):
        path.rename(path.with_name(f"other{path.name}"))
    result = run_here("infer", *folders.arguments)
    assert result.status == 1
    (line,) = errors(result.stderr)
    assert line.endswith(
        f"{folders.logits}: no logits of any of the 3 cases, c0, c1, c2; expected names such as c0.nii.gz, c0.npz or the like"
    )
    assert "There are otherc0.nii.gz, otherc1.nii.gz, otherc2.nii.gz." in result.stderr
    assert EXCHANGED not in result.stderr
    shutil.rmtree(folders.logits)
    folders.logits.mkdir()
    result = run_here("infer", *folders.arguments)
    assert "The folder is empty." in result.stderr
    assert result.stdout == ""
    assert not folders.output.exists()


def test_logits_on_another_grid_are_told_once_and_the_other_cases_named(folders):
    for case_id in ("c1", "c2"):
        path = folders.logits / f"{case_id}.nii.gz"
        save_nifti(path, load_nifti(path)[:-2])
    result = run_here("infer", *folders.arguments, "-q", *FAST)
    assert result.status == 1
    first, second = errors(result.stderr)
    assert first == "crfrefine: error: case 'c1': logits and image are on different grids"
    assert second == "crfrefine: error: 1 more case failed like 'c1' (c2): logits and image are on different grids"
    assert result.stderr.count("--resample") == 1
    assert len(errors(run_here("infer", *folders.arguments, "-v", *FAST).stderr)) == 2, "verbose tells each"
    shown = run_here("info", folders.images.parent).stdout
    assert shown.count("  wrong: case") == 2
    assert shown.count("--resample") == 1


def test_causes_are_told_apart_but_not_by_names_and_numbers():
    causes = Causes()
    told = {
        "a": "case 'a': p/a.nii.gz: 3 values are NaN",
        "b": "case 'b': p/b.nii.gz: 12 values are NaN",
        "c": "case 'c': p/c.nii.gz: cut off",
    }
    assert [causes.is_new(case_id, message) for case_id, message in told.items()] == [True, False, True]
    assert causes.others() == ["1 more case failed like 'a' (b): p/a.nii.gz: 3 values are NaN"]


def test_exchanged_folders_are_named(folders, tmp_path):
    """Numbered images; and archives, which are no images at all."""
    exchanged = ("-i", folders.logits, "-p", folders.images, "-o", folders.output)
    assert EXCHANGED in run_here("infer", *exchanged).stderr
    (tmp_path / "archives").mkdir()
    for path in folders.logits.iterdir():
        np.savez(tmp_path / "archives" / path.name.replace(".nii.gz", ".npz"), logits=load_nifti(path).transpose())
    for images in (tmp_path / "archives", tmp_path / "archives" / "c0.npz"):
        logits = folders.images if images.is_dir() else folders.images / "c0_0000.nii.gz"
        result = run_here("infer", "-i", images, "-p", logits, "-o", folders.output)
        assert result.status == 1
        assert EXCHANGED in result.stderr


def test_exchanged_files_of_one_name_are_named(folders, tmp_path):
    image = load_nifti(folders.images / "c0_0000.nii.gz") * 0.37
    save_nifti(tmp_path / "plain" / "c0.nii.gz", image.astype(np.float32))
    for images, logits in ((folders.logits, tmp_path / "plain"), (folders.logits / "c0.nii.gz", tmp_path / "plain" / "c0.nii.gz")):
        result = run_here("infer", "-i", images, "-p", logits, "-o", folders.output)
        assert result.status == 1
        assert EXCHANGED in result.stderr


def test_a_label_map_in_place_of_an_image_is_noted(folders, tmp_path):
    labels = np.zeros(GRID_SHAPE, np.uint8)
    labels[2:12, 3:10, 2:8] = 1
    labels[5:9, 5:9, 3:7] = 117
    image = save_nifti(tmp_path / "labels.nii.gz", labels)
    for logits in (folders.logits / "c0.nii.gz", image):
        result = run_here("infer", "-i", image, "-p", logits, "-o", folders.output / "x.nii.gz", *FAST)
        assert result.status == 0
        assert result.stderr.count("labels.nii.gz looks like a label map, not like an image: 3 values") == 1


def test_images_are_not_taken_for_label_maps(folders, tmp_path):
    """Whole numbers with noise, 8 bits, few values."""
    values = np.random.default_rng(0).integers(0, 40, GRID_SHAPE).astype(np.uint8)
    image = save_nifti(tmp_path / "image.nii.gz", values)
    result = run_here("infer", "-i", image, "-p", folders.logits / "c0.nii.gz", "-o", folders.output / "x.nii.gz", *FAST)
    assert result.status == 0
    assert "looks like" not in result.stderr


def test_the_layout_of_totalsegmentators_data_sets_is_found(tmp_path):
    """s0001/ct.nii.gz with s0001/segmentations/NAME.nii.gz, by infer, evaluate and info."""
    data = tmp_path / "data"
    for seed, case_id in enumerate(("s0001", "s0002")):
        save_nifti(data / case_id / "ct.nii.gz", np.random.default_rng(seed).normal(0, 90, GRID_SHAPE).astype(np.int16))
        for number, name in enumerate(("aorta", "liver", "spleen")):
            mask = np.zeros(GRID_SHAPE, np.uint8)
            mask[4 * number : 4 * number + 3, 3:11, 2:9] = 1
            save_nifti(data / case_id / "segmentations" / f"{name}.nii.gz", mask)
    (data / "meta.csv").write_text("image_id;age\n")
    without = run_here("infer", "-i", data, "-p", data, "-o", tmp_path / "out")
    assert len(errors(without.stderr)) == 1
    assert "--input-type labels" in without.stderr
    result = run_here("infer", "-i", data, "-p", data, "-o", tmp_path / "out", "--input-type", "labels", "--set", "bilateral.weight=0")
    assert result.status == 0, result.stderr
    assert "such as s0001/ct.nii.gz" in result.stderr
    assert load_nifti(tmp_path / "out" / "s0002.nii.gz").max() == 3
    judged = run_here("evaluate", tmp_path / "out", data, "-o", tmp_path / "report", "--processes", 1, "--no-report", "-i", data)
    assert judged.status == 0, judged.stderr
    assert "liver" in judged.stdout
    shown = run_here("info", data).stdout
    assert "s0001  3 structures" in shown
    assert f"-p {data} and -i {data} and --input-type labels" in shown


def test_series_of_dicom_slices_are_images(folders, tmp_path):
    """Given with -p, they were exchanged; given with -i, they were not, whatever their files are called."""
    values = np.arange(5 * 6 * 4, dtype=np.int16).reshape(5, 6, 4)
    found = list(slices(values, np.diag([1.0, 1.25, 2.5, 1.0])))
    labels = folders.logits / "c0.nii.gz"
    exchanged = run_here("infer", "-i", labels, "-p", save(tmp_path / "scan", found), "-o", tmp_path / "out.nii.gz")
    assert exchanged.status == 1
    assert EXCHANGED in exchanged.stderr
    (tmp_path / "pred").mkdir()
    shutil.copy(labels, tmp_path / "pred" / "c1.nii.gz")
    right = run_here("infer", "-i", save(tmp_path / "other", found, name="c{}.dcm"), "-p", tmp_path / "pred", "-o", tmp_path / "out")
    assert right.status == 1
    assert EXCHANGED not in right.stderr
    assert "other is taken for the DICOM series of one case; several cases need a folder each." in right.stderr
