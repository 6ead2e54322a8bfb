"""Errors about grids name the cause: another transform in a header, or axes in another order."""

import ast
import shlex
import subprocess
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from cli_helpers import run_here
from io_helpers import OBLIQUE, affine_of, numbers, save_nifti

from crfrefine.cases.case import load_case
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.errors import GridMismatchError

SHAPE = (13, 12, 10)
AFFINE = affine_of((1.0, 1.5, 2.0), (3.0, -4.0, 5.0), OBLIQUE)
SHIFTED = AFFINE.copy()
SHIFTED[2, 3] += 2.0
RESAMPLE = ReadingOptions(resample="linear")
LABELS = (numbers(SHAPE) % 3).astype(np.uint8)
SCORES = np.random.default_rng(5).normal(0, 3, (*SHAPE, 3)).astype(np.float32)
VALUES = {"label map": LABELS, "logits": SCORES, "mask": LABELS, "labels": LABELS}


def save_both(path, values, sform, qform):
    image = nib.Nifti1Image(values, None)
    image.set_sform(sform, 1)
    image.set_qform(qform, 1)
    nib.save(image, path)
    return path


def files_of(folder, image, what, path):
    """A case with a file on another grid, and all others on that of the image."""
    scores = save_nifti(folder / "scores.nii.gz", SCORES, nib.load(image).affine)
    files = CaseFiles("a", (image,), (scores,))
    if what in ("label map", "logits"):
        return replace(files, network=(path,))
    return replace(files, **{what: path})


def error_of(files, options):
    with pytest.raises(GridMismatchError) as caught:
        load_case(files, options, with_labels=True)
    return str(caught.value)


@pytest.mark.parametrize("options", [ReadingOptions(), RESAMPLE], ids=["plain", "resample"])
@pytest.mark.parametrize("what", VALUES)
def test_a_file_that_agrees_with_the_qform_of_the_image(what, options, tmp_path):
    image = save_both(tmp_path / "a_0000.nii.gz", numbers(SHAPE), SHIFTED, AFFINE)
    other = save_nifti(tmp_path / "other.nii.gz", VALUES[what], AFFINE)
    text = error_of(files_of(tmp_path, image, what, other), options)
    agrees = "agree" if what in ("logits", "labels") else "agrees"
    assert (
        f"The {what} {agrees} with the image's qform; the sform of the image is 2.00 mm off" in text
    )
    assert f"fslorient -copyqform2sform {image}" in text
    assert f"If the sform is right, save the {what} with the affine of the image" in text


@pytest.mark.parametrize("options", [ReadingOptions(), RESAMPLE], ids=["plain", "resample"])
def test_an_image_that_agrees_with_the_qform_of_the_file(options, tmp_path):
    """Its axes are mirrored: it would be turned if its sform were right."""
    image = save_nifti(tmp_path / "a_0000.nii.gz", numbers(SHAPE), AFFINE)
    flip = np.diag([-1.0, 1.0, 1.0, 1.0])
    flip[0, 3] = SHAPE[0] - 1
    other = save_both(tmp_path / "map.nii.gz", LABELS, SHIFTED @ flip, AFFINE @ flip)
    text = error_of(files_of(tmp_path, image, "label map", other), options)
    assert (
        "The image agrees with the qform of the label map; "
        "the sform of the label map is 2.00 mm off" in text
    )
    assert f"fslorient -copyqform2sform {other}" in text


def test_qforms_of_both_that_agree(tmp_path):
    image = save_both(tmp_path / "a_0000.nii.gz", numbers(SHAPE), SHIFTED, AFFINE)
    elsewhere = AFFINE.copy()
    elsewhere[0, 3] -= 5.25
    other = save_both(tmp_path / "map.nii.gz", LABELS, elsewhere, AFFINE)
    text = error_of(files_of(tmp_path, image, "label map", other), ReadingOptions())
    assert (
        "The qforms of the image and the label map agree; the sform of the image is 2.00 mm off, "
        "the sform of the label map is 5.25 mm off"
    ) in text


def test_the_command_of_the_error_mends_the_file(tmp_path):
    image = save_both(tmp_path / "a_0000.nii.gz", numbers(SHAPE), SHIFTED, AFFINE)
    other = save_nifti(tmp_path / "map.nii.gz", LABELS, AFFINE)
    files = files_of(tmp_path, image, "label map", other)
    text = error_of(files, ReadingOptions())
    (line,) = (line for line in text.splitlines() if line.lstrip().startswith("python -c"))
    program, *arguments = shlex.split(line)[2:]
    subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=tmp_path, check=True, timeout=60
    )
    case = load_case(replace(files, images=(tmp_path / "NEW.nii.gz",)))
    assert case.image.shape == (1, *SHAPE)


def test_other_differences_are_not_blamed_on_the_qform(tmp_path):
    image = save_both(tmp_path / "a_0000.nii.gz", numbers(SHAPE), SHIFTED, AFFINE)
    elsewhere = AFFINE.copy()
    elsewhere[0, 3] -= 1.25
    other = save_nifti(tmp_path / "map.nii.gz", LABELS, elsewhere)
    files = files_of(tmp_path, image, "label map", other)
    assert "qform" not in error_of(files, ReadingOptions())
    assert load_case(files, RESAMPLE).image.shape == (1, *SHAPE)


def test_info_prints_both_transforms_where_they_differ(tmp_path):
    straight = affine_of((1.0, 1.5, 2.0), (3.0, -4.0, 5.0))
    moved = straight.copy()
    moved[1, 3] += 2.0
    path = save_both(tmp_path / "a.nii.gz", numbers(SHAPE), moved, straight)
    text = run_here("info", path, status=0).stdout
    assert "  sform         1 0 0 3; 0 1.5 0 -2; 0 0 2 5 (used)\n" in text
    assert "  qform         1 0 0 3; 0 1.5 0 -4; 0 0 2 5 (up to 2.00 mm away)\n" in text
    assert "sform and qform differ by up to 2.00 mm; the sform is used" in text
    text = run_here("info", "--json", path, status=0).stdout
    assert '"qform": "1 0 0 3; 0 1.5 0 -4; 0 0 2 5 (up to 2.00 mm away)"' in text
    path = save_both(tmp_path / "b.nii.gz", numbers(SHAPE), straight, straight)
    text = run_here("info", path, status=0).stdout
    assert "  qform  " not in text
    assert "differ" not in text


@pytest.mark.parametrize("options", [ReadingOptions(), RESAMPLE], ids=["plain", "resample"])
@pytest.mark.parametrize("what", VALUES)
def test_reversed_axes_with_the_affine_of_the_image(what, options, tmp_path):
    """As libraries write that load (z, y, x): three quarters of the image would be covered."""
    image = save_nifti(tmp_path / "a_0000.nii.gz", numbers(SHAPE), AFFINE)
    values = np.moveaxis(VALUES[what], (0, 1, 2), (2, 1, 0))
    other = save_nifti(tmp_path / "other.nii.gz", values, AFFINE)
    text = error_of(files_of(tmp_path, image, what, other), options)
    assert (
        "Its axes are in another order: 10×12×13 voxels are the image's 13×12×10 as (z, y, x)"
        in text
    )
    order = "(2, 1, 0, 3)" if what == "logits" else "(2, 1, 0)"
    assert f"np.transpose(array, {order}) of the array that nibabel loads" in text
    assert "Or give --resample" not in text
    # What the error says is right.
    mended = np.transpose(nib.load(other).get_fdata(), ast.literal_eval(order))
    np.testing.assert_array_equal(mended.astype(VALUES[what].dtype), VALUES[what])


def test_a_cycle_of_axes_and_an_affine_of_its_own(tmp_path):
    """An identity in place of the affine: with --resample hardly a voxel would be covered."""
    image = save_nifti(tmp_path / "a_0000.nii.gz", numbers(SHAPE), AFFINE)
    values = np.transpose(LABELS, (1, 2, 0))
    other = save_nifti(tmp_path / "other.nii.gz", values, np.eye(4))
    for options in (ReadingOptions(), RESAMPLE):
        text = error_of(files_of(tmp_path, image, "label map", other), options)
        assert "12×10×13 voxels are the image's 13×12×10 as (y, z, x)" in text
        assert "np.transpose(array, (2, 0, 1))" in text
    np.testing.assert_array_equal(np.transpose(values, (2, 0, 1)), LABELS)


def test_an_archive_with_reversed_axes(tmp_path):
    image = save_nifti(tmp_path / "a_0000.nii.gz", numbers(SHAPE), AFFINE)
    right = np.transpose(SCORES, (3, 2, 1, 0))
    for order in ((0, 3, 2, 1), (0, 2, 3, 1)):
        stored = np.transpose(right, order)
        np.savez(tmp_path / "a.npz", logits=stored)
        files = files_of(tmp_path, image, "logits", tmp_path / "a.npz")
        for options in (ReadingOptions(), RESAMPLE):
            text = error_of(files, options)
            found = text.partition("np.transpose(array, ")[2].partition("):")[0]
            np.testing.assert_array_equal(np.transpose(stored, ast.literal_eval(found)), right)


def test_a_proper_grid_whose_sizes_are_those_of_the_image_in_another_order(tmp_path):
    """A grid with an affine of its own may have the sizes of the image by chance."""
    image = save_nifti(tmp_path / "a_0000.nii.gz", numbers(SHAPE), AFFINE)
    turned = AFFINE[:, [2, 1, 0, 3]]
    turned[:3, 3] += 0.25
    values = np.transpose(LABELS, (2, 1, 0))
    other = save_nifti(tmp_path / "other.nii.gz", values, turned)
    files = files_of(tmp_path, image, "label map", other)
    assert "Or give --resample" in error_of(files, ReadingOptions())
    case = load_case(files, RESAMPLE)
    # Voxels are a fourth of a millimeter off, so the nearest ones are the image's own.
    np.testing.assert_array_equal(case.logits.argmax(axis=0), LABELS)


def test_evaluate_says_both_of_the_reference(tmp_path):
    for folder in ("truth", "after", "reversed"):
        (tmp_path / folder).mkdir()
    save_both(tmp_path / "truth" / "a.nii.gz", LABELS, SHIFTED, AFFINE)
    save_nifti(tmp_path / "after" / "a.nii.gz", LABELS, AFFINE)
    save_nifti(tmp_path / "reversed" / "a.nii.gz", np.transpose(LABELS, (2, 1, 0)), SHIFTED)
    expected = {
        "after": "The label map agrees with the reference's qform; the sform of the reference is "
        "2.00 mm off",
        "reversed": "10×12×13 voxels are the reference's 13×12×10 as (z, y, x)",
    }
    for folder, text in expected.items():
        for options in ((), ("--resample",)):
            measured = (tmp_path / folder, tmp_path / "truth", "-o", tmp_path / "measured")
            assert text in run_here("evaluate", *measured, *options, status=1).stderr


def test_a_file_in_another_unit_of_length(tmp_path):
    """The image is in µm, which its header says; a program has ignored that and written mm."""
    image = tmp_path / "a.nrrd"
    write = sitk.ImageFileWriter()
    write.SetFileName(str(image))
    write.Execute(sitk.GetImageFromArray(numbers(SHAPE[::-1])))
    text, _, voxels = image.read_bytes().partition(b"\n\n")
    image.write_bytes(text + b'\nspace units: "um" "um" "um"\n\n' + voxels)
    other = save_nifti(tmp_path / "other.nii.gz", SCORES, np.diag([-1.0, -1.0, 1.0, 1.0]))
    text = error_of(CaseFiles("a", (image,), (other,)), ReadingOptions())
    assert "that of two units of length" in text
