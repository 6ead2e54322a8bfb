"""`crfrefine convert` between all pairs of formats, by nibabel, SimpleITK and pynrrd."""

import os
import re

import nibabel as nib
import nrrd as pynrrd
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from cli_helpers import files_in, run_here, run_process
from io_helpers import (
    LPS_RAS,
    OBLIQUE,
    affine_of,
    as_itk,
    itk_affine,
    itk_array,
    numbers,
    peak_memory,
    save_itk,
    save_nifti,
)

from crfrefine import io

SHAPE = (7, 5, 4)
SPACING = (0.7, 1.1, 2.5)
ORIGIN = (10.0, -20.0, 30.0)
# One world direction per voxel axis: as in RAS, both in-plane axes flipped, exchanged, oblique.
AFFINES = {
    "RAS": affine_of(SPACING, ORIGIN),
    "LPS": affine_of(SPACING, ORIGIN, np.diag([-1.0, -1.0, 1.0])),
    "sagittal": affine_of(SPACING, ORIGIN, np.eye(3)[:, [1, 2, 0]] * [-1.0, -1.0, 1.0]),
    "left-handed": affine_of(SPACING, ORIGIN, np.diag([-1.0, 1.0, 1.0])),
    "oblique": affine_of(SPACING, ORIGIN, OBLIQUE),
}
# NIfTI-1 keeps the affine in float32: 2^-24 of coordinates below 64 mm. MGH keeps directions, of
# which a half-volume is added and subtracted: a few such roundings.
FLOAT32_MM = 2e-5


def save_mgh(path, values, affine):
    nib.save(nib.MGHImage(values, affine), path)


def save_by_nibabel(path, values, affine):
    nib.save(nib.Nifti1Image(values, affine, dtype=values.dtype), path)


def save_by_simpleitk(path, values, affine):
    sitk.WriteImage(as_itk(values, affine), str(path), True)


def save_by_pynrrd(path, values, affine):
    lps = LPS_RAS @ affine
    header = {
        "space": "left-posterior-superior",
        "space directions": lps[:3, :3].T,
        "space origin": lps[:3, 3],
    }
    pynrrd.write(str(path), values, header)


def load(path):
    if path.suffix == ".mgh":  # nibabel would leave the file open.
        return nib.MGHImage.from_bytes(path.read_bytes())
    return nib.load(path)


def read_by_nibabel(path):
    image = load(path)
    values = np.asanyarray(image.dataobj)
    return values.astype(values.dtype.newbyteorder("=")), image.affine


def read_by_simpleitk(path):
    image = sitk.ReadImage(str(path))
    return itk_array(image), itk_affine(image)


def read_by_pynrrd(path):
    values, header = pynrrd.read(str(path))
    affine = np.eye(4)
    affine[:3, :3] = header["space directions"].T
    affine[:3, 3] = header["space origin"]
    return values, LPS_RAS @ affine


SAVE = {
    ".nii.gz": save_by_nibabel,
    ".nii": save_by_nibabel,
    ".mhd": save_by_simpleitk,
    ".mha": save_by_simpleitk,
    ".nrrd": save_by_pynrrd,
    ".nhdr": save_by_pynrrd,
    ".mgh": save_mgh,
    ".mgz": save_mgh,
}
READ = {
    ".nii.gz": (read_by_nibabel, read_by_simpleitk),
    ".nii": (read_by_nibabel, read_by_simpleitk),
    ".mhd": (read_by_simpleitk,),
    ".mha": (read_by_simpleitk,),
    ".nrrd": (read_by_pynrrd, read_by_simpleitk),
    ".nhdr": (read_by_pynrrd, read_by_simpleitk),
    ".mgh": (read_by_nibabel,),
    ".mgz": (read_by_nibabel,),
}
MGH_TYPES = ("uint8", "int16", "int32", "float32")
ALL_TYPES = (*MGH_TYPES, "int8", "uint16", "uint32", "int64", "uint64", "float64")


def image_of(dtype, shape=SHAPE):
    """An image with the smallest and the largest value of its type."""
    dtype = np.dtype(dtype)
    values = numbers(shape, dtype=dtype)
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    values.flat[[3, 8]] = limits.min, limits.max
    return values


def convert(*arguments):
    """Run the command, and return its sentence."""
    return run_here("convert", *arguments, status=0).stderr


@pytest.mark.parametrize("target", SAVE)
@pytest.mark.parametrize("source", SAVE)
def test_voxels_type_and_places_survive_in_every_pair_of_formats(source, target, tmp_path):
    """The types take turns with the geometries, so that each pair sees all of both."""
    has_few_types = {source, target} & {".mgh", ".mgz"}
    types = MGH_TYPES if has_few_types else ALL_TYPES
    names = list(AFFINES)
    for number in range(max(len(types), len(names))):
        name = names[number % len(names)]
        values = image_of(types[number % len(types)])
        original = tmp_path / f"a{source}"
        converted = tmp_path / f"b{target}"
        SAVE[source](original, values, AFFINES[name])
        convert(original, converted)
        for read in READ[target]:
            found, affine = read(converted)
            assert found.dtype == values.dtype, (name, read)
            np.testing.assert_array_equal(found, values)
            np.testing.assert_allclose(affine, AFFINES[name], atol=FLOAT32_MM)


@pytest.mark.parametrize("target", [".nii.gz", ".mha", ".nrrd", ".mgz"])
@pytest.mark.parametrize("source", [".nii.gz", ".mha", ".nrrd"])
def test_channels_stay_channels(source, target, tmp_path):
    for dtype in ("int16", "float32"):
        values = image_of(dtype, (3, *SHAPE))
        path = tmp_path / f"a{source}"
        out = tmp_path / f"b{target}"
        if source == ".nii.gz":
            save_nifti(path, np.moveaxis(values, 0, -1), AFFINES["oblique"])
        else:
            lps = LPS_RAS @ AFFINES["oblique"]
            save_itk(
                *(path, values),
                channels=True,
                spacing=SPACING,
                origin=tuple(lps[:3, 3]),
                direction=lps[:3, :3] / SPACING,
            )
        convert(path, out)
        if target in (".nii.gz", ".mgz"):
            found, affine = read_by_nibabel(out)
            found = np.moveaxis(found, -1, 0)
        else:
            found, affine = read_by_simpleitk(out)
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found, values)
        np.testing.assert_allclose(affine, AFFINES["oblique"], atol=FLOAT32_MM)


SCALED = {
    # stored, slope, intercept: the type, and whether the values are whole
    "CT": ([0, 1024, 4095], "uint16", 1.0, -1024.0, "int16"),
    "small": ([0, 3, 100], "int16", 2.0, 0.0, "uint8"),
    "whole halves": ([0, 2, 600], "int16", 0.5, 0.0, "int16"),
    "fractions": ([0, 1, 600], "int16", 0.5, 0.0, "float32"),
    "large": ([0, 1, 30000], "int16", 4.0, 0.0, "int32"),
    "beyond float32": ([0, 1, 30000], "int16", 2.0**127, 0.0, "float64"),
}


@pytest.mark.parametrize("name", SCALED)
def test_scaled_integers_get_the_smallest_type_that_holds_them(name, tmp_path):
    few, dtype, slope, intercept, expected = SCALED[name]
    stored = np.resize(np.array(few, dtype), SHAPE)
    path = save_nifti(tmp_path / "a.nii.gz", stored, slope=slope, inter=intercept)
    told = convert(path, tmp_path / "b.mha", "--as", "image")
    found, _ = read_by_simpleitk(tmp_path / "b.mha")
    assert found.dtype == expected
    # Products of 16 bits and a power of 2, and sums of them, are exact.
    np.testing.assert_array_equal(found, stored * np.float64(slope) + intercept)
    assert "its values are stored ×" in told
    assert f"image, {expected}" in told


def test_scaled_integers_in_mgh_get_a_type_that_it_holds(tmp_path):
    stored = np.resize(np.array([0, 1, 60000], np.uint16), SHAPE)
    path = save_nifti(tmp_path / "a.nii.gz", stored, slope=1.0, inter=2.0)
    convert(path, tmp_path / "b.mgz", "--as", "image")
    found, _ = read_by_nibabel(tmp_path / "b.mgz")
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, stored + 2.0)


@pytest.mark.parametrize("target", [".nii.gz", ".mhd", ".nrrd", ".mgz"])
def test_values_that_are_not_finite_are_kept(target, tmp_path):
    values = numbers(SHAPE)
    values.flat[[2, 5, 7]] = np.nan, np.inf, -np.inf
    path = save_nifti(tmp_path / "a.nii.gz", values)
    convert(path, tmp_path / f"b{target}")
    np.testing.assert_array_equal(READ[target][0](tmp_path / f"b{target}")[0], values)


@pytest.mark.parametrize("dtype", ["int8", "uint16", "uint32", "int64", "uint64", "float64"])
def test_a_type_that_mgh_lacks_is_an_error_that_names_other_formats(dtype, tmp_path):
    path = tmp_path / "a.nrrd"
    save_by_pynrrd(path, image_of(dtype), AFFINES["RAS"])
    result = run_here("convert", path, tmp_path / "b.mgz", status=1)
    assert f"found {dtype}; write NIfTI (.nii.gz), MetaImage (.mhd), NRRD (.nrrd)" in result.stderr
    assert files_in(tmp_path) == ["a.nrrd"]


def test_axes_that_a_format_cannot_hold_are_an_error(tmp_path):
    sheared = AFFINES["RAS"].copy()
    sheared[0, 1] = 0.3
    path = save_nifti(tmp_path / "a.nii.gz", numbers(SHAPE, dtype=np.int16) - 9, sheared)
    for target in ("b.mha", "b.nrrd", "b.mgz"):
        result = run_here("convert", path, tmp_path / target, status=1)
        assert "cannot hold the sheared axes" in result.stderr
        assert "write NIfTI (.nii.gz) instead" in result.stderr
    convert(path, tmp_path / "b.nii.gz")
    np.testing.assert_allclose(nib.load(tmp_path / "b.nii.gz").affine, sheared, atol=FLOAT32_MM)
    long = np.arange(40_000, dtype=np.int32).reshape(40_000, 1, 1) - 1
    save_by_simpleitk(tmp_path / "long.mha", long, AFFINES["RAS"])
    result = run_here("convert", tmp_path / "long.mha", tmp_path / "long.nii.gz", status=1)
    assert "at most 32767 voxels along an axis, found 40000; write MetaImage" in result.stderr


@pytest.mark.parametrize("target", [".mha", ".nrrd", ".mgz"])
def test_a_plane_with_a_place_in_space_becomes_a_slice(target, tmp_path):
    values = numbers(SHAPE[:2], dtype=np.int16) - 9
    path = save_nifti(tmp_path / "a.nii.gz", values, AFFINES["oblique"])
    convert(path, tmp_path / f"b{target}")
    found, affine = READ[target][0](tmp_path / f"b{target}")
    np.testing.assert_array_equal(found, values[..., np.newaxis])
    np.testing.assert_allclose(affine, AFFINES["oblique"], atol=FLOAT32_MM)


def blocks(dtype):
    """A label map of 40 regions, whose labels have gaps."""
    labels = np.arange(40).reshape(2, 5, 4).repeat(4, axis=0)
    return (3 * labels).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "float32", "float64"])
def test_regions_of_whole_numbers_are_a_label_map_in_the_smallest_type(dtype, tmp_path):
    path = tmp_path / "a.nrrd"
    save_by_pynrrd(path, blocks(dtype), AFFINES["oblique"])
    told = convert(path, tmp_path / "b.mgz")
    assert f"label map, {dtype}, 8×5×4 -> " in told
    found, _ = read_by_nibabel(tmp_path / "b.mgz")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, blocks(np.uint8))


def test_labels_that_were_scaled_are_rounded(tmp_path):
    """As by a program that saves each label map with a scaling of its own."""
    stored = np.resize(np.array([0, 0, 0, 1, 1, 4, 4], np.int16), SHAPE)
    path = save_nifti(tmp_path / "a.nii.gz", stored, slope=0.988)
    assert "label map, uint8" in convert(path, tmp_path / "b.mha")
    np.testing.assert_array_equal(read_by_simpleitk(tmp_path / "b.mha")[0], stored)


@pytest.mark.parametrize("largest", [0.09, 1.0])
def test_small_values_are_no_labels(largest, tmp_path):
    """Of diffusion maps all values are near 0; rounding them would lose all."""
    values = numbers(SHAPE) * (largest / 139)
    path = save_nifti(tmp_path / "a.nii.gz", values)
    assert ": image, float32, 7×5×4 -> " in convert(path, tmp_path / "b.mha")
    np.testing.assert_array_equal(read_by_simpleitk(tmp_path / "b.mha")[0], values)


def test_an_option_says_what_the_file_is(tmp_path):
    few = (numbers(SHAPE) % 3).astype(np.int16)
    many = numbers(SHAPE, dtype=np.int16)
    for values, option, expected in (
        (few, (), np.uint8),
        (few, ("--as", "image"), np.int16),
        (many, (), np.int16),
        (many, ("--as", "labels"), np.uint8),
    ):
        path = save_nifti(tmp_path / "a.nii.gz", values)
        convert(path, tmp_path / "b.nrrd", *option)
        found, _ = read_by_pynrrd(tmp_path / "b.nrrd")
        assert found.dtype == expected
        np.testing.assert_array_equal(found, values)
    scores = numbers((*SHAPE, 3), dtype=np.float64) - 99.5
    path = save_nifti(tmp_path / "a.nii.gz", scores)
    for option, told, expected in (
        ((), "3 channels, float64", np.float64),
        (("--as", "image"), "image of 3 channels, float64", np.float64),
        (("--as", "logits"), "3 labels", np.float32),
    ):
        assert told in convert(path, tmp_path / "b.nii", *option)
        found, _ = read_by_nibabel(tmp_path / "b.nii")
        assert found.dtype == expected
        np.testing.assert_array_equal(found, scores)


def test_an_image_gets_the_geometry_of_another_with_turned_axes(tmp_path):
    values = numbers(SHAPE, dtype=np.int16) - 70
    path = save_nifti(tmp_path / "a.nii.gz", values, AFFINES["RAS"])
    turned = nib.load(path).as_reoriented([[1, -1], [0, 1], [2, -1]])
    nib.save(turned, tmp_path / "like.nii.gz")
    told = convert(path, tmp_path / "b.mha", "--like", tmp_path / "like.nii.gz")
    found, affine = read_by_simpleitk(tmp_path / "b.mha")
    assert "voxel axes turned" in told
    np.testing.assert_array_equal(found, np.asanyarray(turned.dataobj))
    np.testing.assert_allclose(affine, turned.affine, atol=FLOAT32_MM)


def test_a_large_image_takes_the_memory_of_its_voxels(tmp_path):
    """Once as they are stored; beyond it a few pieces of 16 MB, of a 50 MB image."""
    shape = (300, 280, 310)
    rows = np.arange(300, dtype=np.int16)[:, np.newaxis, np.newaxis] - 100
    nib.save(nib.Nifti1Image(np.broadcast_to(rows, shape), AFFINES["RAS"]), tmp_path / "a.nii")
    num_bytes = 2 * np.prod(shape)
    for target in ("b.nii", "b.mha"):
        peak = peak_memory(lambda to=target: convert(tmp_path / "a.nii", tmp_path / to))
        assert peak < num_bytes + (48 << 20)


def write_folder(folder):
    folder.mkdir()
    save_nifti(folder / "ct.nii.gz", numbers(SHAPE, dtype=np.int16) - 70)
    save_by_simpleitk(folder / "mr.mhd", image_of("uint16"), AFFINES["oblique"])
    save_by_pynrrd(folder / "labels.nrrd", blocks(np.int32), AFFINES["LPS"])
    (folder / "cut.nii.gz").write_bytes((folder / "ct.nii.gz").read_bytes()[:200])
    (folder / "notes.txt").write_text("words")
    return folder


def test_a_folder_is_converted_file_by_file_and_one_bad_file_stops_no_other(tmp_path):
    folder = write_folder(tmp_path / "in")
    out = tmp_path / "out" / "deep"
    result = run_here("convert", folder, out, "--output-format", ".MHA", status=1)
    assert files_in(out) == ["ct.mha", "labels.mha", "mr.mha"]
    assert result.stdout.splitlines() == [str(out / name) for name in files_in(out)]
    lines = result.stderr.splitlines()
    assert lines[0] == "4 files"
    assert re.search(r"\[1/4\] .*ct\.nii\.gz: image, int16, 7×5×4 -> .*ct\.mha", result.stderr)
    assert re.search(r"crfrefine: error: .*cut\.nii\.gz: .*the file is cut off", result.stderr)
    assert lines[-2:] == ["3 done, 1 failed", "failed: cut.nii.gz"]
    np.testing.assert_array_equal(
        read_by_simpleitk(out / "ct.mha")[0], numbers(SHAPE, dtype=np.int16) - 70
    )
    np.testing.assert_array_equal(read_by_simpleitk(out / "mr.mha")[0], image_of("uint16"))
    assert read_by_simpleitk(out / "labels.mha")[0].dtype == np.uint8
    quiet = run_here("convert", folder, out, "--output-format", ".mha", "-q", status=1)
    assert quiet.stdout == ""
    assert quiet.stderr.splitlines()[-1] == "failed: cut.nii.gz"


def test_folders_that_cannot_be_converted(tmp_path):
    folder = write_folder(tmp_path / "in")
    (tmp_path / "empty").mkdir()
    before = files_in(folder)
    for arguments, words in (
        ((folder, tmp_path / "out"), "name the format of the files with --output-format"),
        (
            (folder, tmp_path / "out", "--output-format", "tiff"),
            "with --output-format, expected one of .nii.gz",
        ),
        ((folder, tmp_path / "b.nii.gz"), "expected a file, this is a folder"),
        ((folder, folder / "notes.txt", "--output-format", ".mha"), "expected a folder, this is"),
        ((tmp_path / "empty", tmp_path / "out", "--output-format", ".mha"), "holds no volumes"),
    ):
        assert words in run_here("convert", *arguments, status=1).stderr
    assert not (tmp_path / "out").exists()
    assert files_in(folder) == before


def test_of_two_files_with_one_target_the_second_fails_and_no_input_is_replaced(tmp_path):
    folder = write_folder(tmp_path / "in")
    save_by_pynrrd(folder / "ct.nrrd", image_of("int16"), AFFINES["RAS"])
    options = ("--output-format", ".nii.gz")
    result = run_here("convert", folder, tmp_path / "out", *options, status=1)
    assert "ct.nrrd: would become" in result.stderr
    assert "as ct.nii.gz does; rename one" in result.stderr
    np.testing.assert_array_equal(
        read_by_nibabel(tmp_path / "out" / "ct.nii.gz")[0], numbers(SHAPE, dtype=np.int16) - 70
    )
    before = (folder / "ct.nii.gz").read_bytes()
    within = run_here("convert", folder, folder, *options, status=1)
    assert "ct.nii.gz: would replace an input" in within.stderr
    assert (folder / "ct.nii.gz").read_bytes() == before


def test_logits_of_a_folder_become_labels(tmp_path):
    (tmp_path / "in").mkdir()
    scores = numbers((*SHAPE, 3))
    save_nifti(tmp_path / "in" / "a.nii.gz", scores)
    options = ("--to", "labels", "--output-format", ".nrrd")
    convert(tmp_path / "in", tmp_path / "out", *options)
    found, _ = read_by_pynrrd(tmp_path / "out" / "a.nrrd")
    np.testing.assert_array_equal(found, scores.argmax(axis=-1))


def test_the_file_is_whole_by_our_own_reader(tmp_path):
    path = save_nifti(tmp_path / "a.nii.gz", numbers(SHAPE, dtype=np.int16) - 70)
    for target in SAVE:
        convert(path, tmp_path / f"b{target}")
        assert io.is_intact(tmp_path / f"b{target}")


def test_the_folder_of_the_output_is_made(tmp_path):
    """As `infer` makes it; not for an input that cannot be converted."""
    save_nifti(tmp_path / "a.nii.gz", numbers(SHAPE, dtype=np.int16), AFFINES["LPS"])
    run_here("convert", tmp_path / "a.nii.gz", tmp_path / "new" / "folder" / "b.mha", status=0)
    assert io.read_header(tmp_path / "new" / "folder" / "b.mha").grid_shape == SHAPE
    other = save_nifti(tmp_path / "like.nii.gz", numbers((3, 4, 5)), AFFINES["LPS"])
    run_here("convert", tmp_path / "a.nii.gz", tmp_path / "none/b.mha", "--like", other, status=1)
    assert not (tmp_path / "none").exists()


def test_names_that_the_encoding_of_file_names_lacks_lead_from_headers_to_their_voxels(tmp_path):
    """Python's names then hold surrogates, and the header has the bytes that the disk has."""
    save_nifti(tmp_path / "é–.nii.gz", numbers((4, 5, 6)))
    ascii_names = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    for source, target in ((".nii.gz", ".mhd"), (".mhd", ".nhdr"), (".nhdr", ".mha")):
        paths = (tmp_path / f"é–{source}", tmp_path / f"é–{target}")
        run_process("convert", *paths, status=0, env=ascii_names)
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(paths[1])))
        np.testing.assert_array_equal(array.T, numbers((4, 5, 6)))
