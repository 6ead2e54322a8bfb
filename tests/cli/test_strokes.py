"""`infer --strokes`: files of drawn voxels, of one case or of a folder."""

import json

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from cli_helpers import AFFINE, FAST, GRID_SHAPE, SPACING, infer, load_nifti, run_here, save_nifti, statuses, write_folders

import crfrefine
from crfrefine.runs.cases import case as cases

STROKE = (slice(6, 10), 7, 5)


def draw(value=2, where=STROKE, shape=GRID_SHAPE):
    drawn = np.zeros(shape, np.uint8)
    drawn[where] = value
    return drawn


@pytest.fixture
def folders(tmp_path):
    return write_folders(tmp_path, "a", "b")


def expected(folders, drawn, **options):
    parameters = crfrefine.CrfParameters().replace(**{"mean_field.filter": "lattice"})
    return crfrefine.refine(
        folders.scores("a"), folders.image("a"), spacing=SPACING, parameters=parameters, strokes=drawn, **options
    ).label_map


def test_a_folder_has_strokes_of_some_cases(folders):
    save_nifti(folders.output.parent / "strokes" / "a.nii.gz", draw())
    result = infer(folders, "--strokes", folders.output.parent / "strokes", status=0)
    assert "strokes of 1 of 2 cases" in result.stderr
    np.testing.assert_array_equal(load_nifti(folders.output / "a.nii.gz"), expected(folders, draw()))
    assert (load_nifti(folders.output / "a.nii.gz")[STROKE] == 2).all()
    summary = json.loads((folders.output / ".crfrefine" / "record.jsonl").read_text().splitlines()[1])
    assert any("4 voxels of label 2" in note for note in summary["notes"])


def test_a_case_with_new_strokes_is_refined_again(folders):
    strokes = folders.output.parent / "strokes" / "a.nii.gz"
    save_nifti(strokes, draw())
    options = ("--strokes", strokes.parent)
    infer(folders, *options, status=0)
    assert dict(statuses(infer(folders, *options, "--continue", status=0))) == {"a": "skipped", "b": "skipped"}
    save_nifti(strokes, draw(1))
    again = infer(folders, *options, "--continue", status=0)
    assert dict(statuses(again)) == {"a": "done", "b": "skipped"}
    assert "other strokes" in again.stderr
    np.testing.assert_array_equal(load_nifti(folders.output / "a.nii.gz"), expected(folders, draw(1)))


def arguments(folders, *strokes):
    images = [word for path in sorted(folders.images.glob("a_*")) for word in ("-i", path)]
    options = [word for path in strokes for word in ("--strokes", path)]
    return ("infer", *images, "-p", folders.logits / "a.nii.gz", "-o", folders.output.parent / "a.nii.gz", *FAST, *options)


def test_files_of_a_case_are_united_unless_they_contradict_each_other(folders, tmp_path):
    other = draw(255, (3, slice(4, 8), 2))
    paths = [save_nifti(tmp_path / name, drawn) for name, drawn in (("one.nii.gz", draw()), ("two.nii.gz", other))]
    run_here(*arguments(folders, *paths), status=0)
    np.testing.assert_array_equal(load_nifti(tmp_path / "a.nii.gz"), expected(folders, draw() + other))
    save_nifti(paths[1], draw(1, (slice(8, 12), 7, 5)))
    failed = run_here(*arguments(folders, *paths), status=1)
    assert "contradict each other at 2 voxels, such as (8, 7, 5), (9, 7, 5)" in failed.stderr


def test_nrrd_as_other_programs_write_it(folders, tmp_path):
    drawn = draw()
    nifti = sitk.ReadImage(str(folders.images / "a_0000.nii.gz"))
    image = sitk.GetImageFromArray(drawn.transpose(2, 1, 0))
    image.CopyInformation(nifti)
    sitk.WriteImage(sitk.DICOMOrient(image, "LPS"), str(tmp_path / "drawn.nrrd"))
    run_here(*arguments(folders, tmp_path / "drawn.nrrd"), status=0)
    np.testing.assert_array_equal(load_nifti(tmp_path / "a.nii.gz"), expected(folders, drawn))


@pytest.mark.parametrize("on_coarse_grid", [False, True])
def test_streamed_logits_give_what_logits_in_memory_give(folders, tmp_path, monkeypatch, on_coarse_grid):
    options = ["--set", "mean_field.filter=truncated", "--device", "cpu"]
    drawn = save_nifti(tmp_path / "drawn.nii.gz", draw(3) + draw(255, (3, slice(4, 8), 2)))
    if on_coarse_grid:
        scores = np.moveaxis(folders.scores("a"), 0, -1)[::2, ::2]
        affine = AFFINE @ np.diag([2.0, 2.0, 1.0, 1.0])
        save_nifti(folders.logits / "a.nii.gz", scores, affine)
        options.append("--resample")
    run_here(*arguments(folders, drawn), *options, status=0)
    in_memory = load_nifti(tmp_path / "a.nii.gz")
    for name in ("MAX_IN_MEMORY", "MIN_STREAMED"):
        monkeypatch.setattr(cases, name, 1)
    streamed = run_here(*arguments(folders, drawn), *options, "-v", status=0)
    assert "are taken as logits" in streamed.stderr or "is taken as logits" in streamed.stderr
    differing = (load_nifti(tmp_path / "a.nii.gz") != in_memory).mean()
    assert differing == 0.0
    assert (in_memory == 3).sum() > 4


def test_strokes_of_another_grid_are_refused(folders, tmp_path):
    path = save_nifti(tmp_path / "drawn.nii.gz", draw()[::2], AFFINE @ np.diag([2.0, 1.0, 1.0, 1.0]))
    for option in ((), ("--resample",)):
        assert "strokes are not resampled" in run_here(*arguments(folders, path), *option, status=1).stderr


def test_strokes_need_a_network_and_a_case(folders, tmp_path):
    path = save_nifti(tmp_path / "strokes" / "c.nii.gz", draw())
    assert "strokes of none of the cases, a, b" in infer(folders, "--strokes", path.parent, status=1).stderr
    save_nifti(path.parent / "a.nii.gz", draw())
    assert "c: strokes of no case" in infer(folders, "--strokes", path.parent, status=1).stderr
    images = ("-i", folders.images, "-o", folders.output)
    assert "--logits" in run_here("infer", *images, "--strokes", path.parent, status=2).stderr


def test_a_convention_of_its_own(folders, tmp_path):
    scribbles = np.where(draw() == 0, 4, draw())
    scribbles[3, 4:8, 2] = 0
    path = save_nifti(tmp_path / "drawn.nii.gz", scribbles)
    run_here(*arguments(folders, path), "--strokes-ignore", 4, status=0)
    drawn = draw() + draw(255, (3, slice(4, 8), 2))
    np.testing.assert_array_equal(load_nifti(tmp_path / "a.nii.gz"), expected(folders, drawn))
    assert "--strokes-ignore" in run_here(*arguments(folders, path), status=1).stderr
