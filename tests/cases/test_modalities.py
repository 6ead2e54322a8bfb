"""Modalities of one case on several grids: with --resample they lie on the grid of the first."""

import numpy as np
import pytest
from cli_helpers import FAST, load_nifti, run_here
from io_helpers import OBLIQUE, affine_of, save_nifti
from scipy.ndimage import gaussian_filter, map_coordinates

from crfrefine import CrfParameters, refine
from crfrefine.cases.case import load_case
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.case_headers import read_case_headers
from crfrefine.cases.memory import bytes_of_case
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.errors import GridMismatchError
from crfrefine.infer.options import InferenceOptions
from crfrefine.tune.case import CaseRefiner, open_case

SPACING = (0.9, 1.1, 2.5)
SHAPE = (26, 21, 12)
CT_AFFINE = affine_of(SPACING, (-11.0, -12.0, 5.0))
PARAMETERS = CrfParameters().replace(**{"mean_field.filter": "lattice"})  # those of FAST
RESAMPLE = ReadingOptions(resample="linear")


def smooth(shape, seed, height=100.0):
    field = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2.0)
    return (field / field.std() * height).astype(np.float32)


CT = smooth(SHAPE, 0)


def positions_on(affine, other, shape=SHAPE):
    """The voxels of a grid as indices on another one, (axes, *grid)."""
    matrix = np.linalg.inv(other) @ affine
    return np.tensordot(matrix[:3, :3], np.indices(shape), 1) + matrix[:3, 3, None, None, None]


def expected_on_ct(values, affine):
    """What scipy interpolates linearly, NaN more than half a voxel beyond the outermost samples."""
    places = positions_on(CT_AFFINE, affine)
    last = np.array(values.shape)[:, None, None, None] - 1
    expected = map_coordinates(values.astype(float), places, order=1, mode="nearest")
    is_outside = ((places < -0.5 - 1e-4) | (places > last + 0.5 + 1e-4)).any(axis=0)
    expected[is_outside] = np.nan
    return expected


def grid_around_ct(spacing, shape, shift=(0.3, -0.2, 0.7), direction=None):
    """The affine of a grid with nearly the center of the CT."""
    affine = affine_of(spacing, direction=direction)
    center = CT_AFFINE[:3] @ (*(np.array(SHAPE) - 1) / 2, 1.0) + shift
    affine[:3, 3] = center - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


GRIDS = {
    "coarser and larger": ((2.1, 3.0, 4.0), (15, 11, 9), None),
    "finer": ((0.5, 0.7, 1.3), (60, 45, 31), None),
    "smaller": ((2.0, 2.0, 3.0), (10, 10, 9), None),
    "mirrored, other axes": ((3.0, 1.7, 2.0), (11, 19, 14), np.eye(3)[:, [2, 0, 1]] * (-1, 1, 1)),
    "oblique": ((2.1, 2.6, 3.1), (13, 11, 12), OBLIQUE),
}


def write_case(folder, values, affine):
    """CT, another modality, and a network's scores and label map on the grid of the CT."""
    logits = np.stack([smooth(SHAPE, seed, 3.0) for seed in (1, 2)], axis=-1)
    save_nifti(folder / "a_0000.nii.gz", CT, CT_AFFINE)
    save_nifti(folder / "a_0001.nii.gz", values, affine)
    save_nifti(folder / "p" / "a.nii.gz", logits, CT_AFFINE)
    save_nifti(folder / "labels.nii.gz", logits.argmax(axis=-1).astype(np.uint8), CT_AFFINE)
    images = (folder / "a_0000.nii.gz", folder / "a_0001.nii.gz")
    return CaseFiles("a", images, (folder / "p" / "a.nii.gz",)), np.moveaxis(logits, -1, 0)


@pytest.mark.parametrize("name", GRIDS)
def test_a_modality_is_interpolated_as_by_scipy(name, tmp_path):
    spacing, shape, direction = GRIDS[name]
    affine = grid_around_ct(spacing, shape, direction=direction)
    values = smooth(shape, 3)
    (tmp_path / "p").mkdir()
    files, _ = write_case(tmp_path, values, affine)
    expected = expected_on_ct(values, affine)
    is_outside = np.isnan(expected)
    for kept in (files, CaseFiles("a", files.images, (tmp_path / "labels.nii.gz",))):
        case = load_case(kept, RESAMPLE)
        np.testing.assert_array_equal(case.image[0][~is_outside], CT[~is_outside])
        # The affine is float32 in the header, and so are the sums.
        np.testing.assert_allclose(case.image[1][~is_outside], expected[~is_outside], atol=0.02)
        if is_outside.any():
            np.testing.assert_array_equal(case.mask, ~is_outside)
        else:
            assert case.mask is None
        notes = list(map(str, case.notes))
        told = f"modality a_0001.nii.gz interpolated linearly from {'×'.join(map(str, shape))}"
        assert any(note.startswith(told) for note in notes)
        told = f"modality a_0001.nii.gz take no part, as if outside the mask: {is_outside.sum()} of"
        assert any(told in note for note in notes) == is_outside.any()
        assert not any("NaN" in note for note in notes)
    assert is_outside.any() == (name in ("smaller", "oblique"))


def test_a_voxel_with_a_sample_that_is_nan_is_nan(tmp_path):
    """Also where it is on the grid of the modality; samples of no weight do not count."""
    affine = CT_AFFINE @ np.diag([2.0, 1.0, 1.0, 1.0])
    values = smooth((14, 21, 12), 3)
    values[4, 10, 6] = np.nan
    (tmp_path / "p").mkdir()
    files, _ = write_case(tmp_path, values, affine)
    case = load_case(files, RESAMPLE)
    expected = np.ones(SHAPE, bool)
    expected[7:10, 10, 6] = False
    np.testing.assert_array_equal(case.mask, expected)
    between = (values[2:4, 10, 6].sum() / 2).astype(np.float32)
    np.testing.assert_allclose(case.image[1][5, 10, 6], between, rtol=1e-5)
    assert any("3 of 6552 voxels (0.0%) of the image are NaN" in str(note) for note in case.notes)


@pytest.fixture
def pet(tmp_path):
    """A case whose second modality is coarser, and does not reach to the ends of the first."""
    spacing, shape, _ = GRIDS["smaller"]
    affine = grid_around_ct(spacing, shape)
    values = smooth(shape, 3)
    (tmp_path / "p").mkdir()
    files, logits = write_case(tmp_path, values, affine)
    return files, logits, expected_on_ct(values, affine)


def test_a_case_is_refined_as_its_interpolated_image(pet, tmp_path):
    """Voxels that a modality does not show keep the network's label."""
    files, logits, expected = pet
    inputs = ("-i", files.images[0], "-i", files.images[1], "-p", files.network[0])
    output = tmp_path / "out.nii.gz"
    options = ("-o", output, *FAST)
    refused = run_here("infer", *inputs, *options, status=1).stderr
    assert "modality and image are on different grids" in refused
    assert "Or give --resample, which interpolates onto the image's grid" in refused
    result = run_here("infer", *inputs, *options, "--resample", status=0)
    assert "a: modality a_0001.nii.gz interpolated linearly from 10×10×9" in result.stderr

    is_outside = np.isnan(expected)
    image = np.stack([CT, np.where(is_outside, 0.0, expected).astype(np.float32)])
    by_hand = refine(
        logits,
        image,
        input_type="logits",
        mask=~is_outside,
        spacing=SPACING,
        parameters=PARAMETERS,
    )
    found = load_nifti(output)
    assert np.mean(found != by_hand.label_map) < 1e-3
    np.testing.assert_array_equal(found[is_outside], by_hand.network_label_map[is_outside])
    assert (found != by_hand.network_label_map).any()


def test_tune_opens_such_a_case(pet, tmp_path):
    files, logits, expected = pet
    case = open_case(files, RESAMPLE, 1)
    refined = CaseRefiner(case, InferenceOptions(*3 * [tmp_path], resample="linear")).refine(
        PARAMETERS
    )
    is_outside = np.isnan(expected)
    network = logits.argmax(axis=0)
    np.testing.assert_array_equal(refined.label_map[is_outside], network[is_outside])
    assert (refined.label_map != network).any()


def test_a_modality_that_shows_too_little_is_refused(tmp_path):
    """And --resample is not proposed where it would be refused."""
    shape = (6, 10, 9)
    affine = grid_around_ct((2.0, 2.0, 3.0), shape, (-6.0, 0.0, 0.0))
    (tmp_path / "p").mkdir()
    files, _ = write_case(tmp_path, smooth(shape, 3), affine)
    told = r"covers \d\d\.\d% of the voxels of the image; "
    with pytest.raises(GridMismatchError, match=told + "--resample expects at least half"):
        read_case_headers(files)
    with pytest.raises(GridMismatchError, match=told + "expected at least half of them") as error:
        read_case_headers(files, RESAMPLE)
    assert "the grid is that of the first modality" in str(error.value)


def test_the_memory_of_a_modality_on_its_own_grid_counts(tmp_path):
    finer = grid_around_ct((0.5, 0.7, 1.3), (60, 45, 31))
    (tmp_path / "p").mkdir()
    files, _ = write_case(tmp_path, smooth((60, 45, 31), 3), finer)
    needed, *_ = bytes_of_case(read_case_headers(files, RESAMPLE))
    save_nifti(tmp_path / "a_0001.nii.gz", CT, CT_AFFINE)
    on_one_grid, *_ = bytes_of_case(read_case_headers(files, RESAMPLE))
    assert needed - on_one_grid == 4 * 60 * 45 * 31


def test_that_a_modality_is_interpolated_is_told_of_one_of_many_cases(pet, tmp_path):
    files, _, _ = pet
    for case in ("a", "b"):
        for number, name in enumerate(("CT", "PET")):
            place = tmp_path / name / f"{case}.nii.gz"
            place.parent.mkdir(exist_ok=True)
            place.symlink_to(files.images[number])
        (tmp_path / "net").mkdir(exist_ok=True)
        (tmp_path / "net" / f"{case}.nii.gz").symlink_to(files.network[0])
    inputs = ("-i", tmp_path / "{modality:CT,PET}/{case}.nii.gz", "-p", tmp_path / "net")
    told = run_here("infer", *inputs, "-o", tmp_path / "o", *FAST, "--resample", status=0).stderr
    assert told.count("interpolated linearly from") == 1
    assert "a: modality PET interpolated linearly from" in told
    places = [tmp_path / name / "{case}.nii.gz" for name in ("CT", "PET")]
    (tmp_path / "plain").mkdir()
    for number in (0, 1):
        for case in ("a", "b"):
            path = tmp_path / "plain" / f"{case}_000{number}.nii.gz"
            path.symlink_to(places[number].with_name(f"{case}.nii.gz"))
    inputs = ("-i", tmp_path / "plain", "-p", tmp_path / "net")
    told = run_here("infer", *inputs, "-o", tmp_path / "o2", *FAST, "--resample", status=0).stderr
    assert told.count("interpolated linearly from") == 1
