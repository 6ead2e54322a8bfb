"""Images that are NaN somewhere: the results are those of a mask without these voxels."""

from pathlib import Path

import numpy as np
import pytest
from cli_helpers import (
    AFFINE,
    FAST,
    GRID_SHAPE,
    SPACING,
    infer,
    load_nifti,
    run_here,
    save_nifti,
    set_streaming,
    summary_of,
    write_folders,
)
from training_helpers import shorten

import crfrefine
from crfrefine.cases.case import load_case
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.demo.phantom import make_phantom
from crfrefine.errors import InputError
from crfrefine.infer.options import InferenceOptions
from crfrefine.parameters.model import CrfParameters
from crfrefine.tune.case import CaseRefiner, open_case

PHANTOM = make_phantom(0, GRID_SHAPE, SPACING)
# NaN outside of a body, and in one modality at a single voxel inside of it.
IS_NAN = np.zeros(GRID_SHAPE, np.bool_)
IS_NAN[:5] = True
IS_NAN[:, -4:] = True
IS_NAN[9, 6, 5] = True
NOTE = f"{IS_NAN.sum()} of {IS_NAN.size} voxels ({IS_NAN.mean():.1%}) of the image are NaN"


def with_nan(image, dtype=np.float32):
    """An image that is NaN: outside the body in all modalities, inside in the second one alone."""
    values = image.astype(dtype)
    values[:, IS_NAN] = np.nan
    values[0, 9, 6, 5] = image[0, 9, 6, 5]
    return values


def filled(image, dtype=np.float32):
    """The same with numbers that no image has, in place of NaN."""
    values = image.astype(dtype)
    values[:, IS_NAN] = -12345.0
    return values


def labels_of(logits):
    return logits.argmax(axis=0).astype(np.uint8)


ARRAYS = {
    "logits": (PHANTOM.logits, {}),
    "label map": (labels_of(PHANTOM.logits), {"input_type": "labels"}),
    "label map of a coarser network": (
        labels_of(PHANTOM.logits),
        {"input_type": "labels", "network_spacing": (2.0, 2.5, 5.0)},
    ),
    "label map of many labels": (
        np.indices(GRID_SHAPE).sum(axis=0).astype(np.uint8),
        {"input_type": "labels"},
    ),
    "regions": (PHANTOM.logits[1:3], {"regions": {"whole": [1, 2], "core": 2}}),
}


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays_with_nan_give_the_bits_of_a_mask_without_these_voxels(kind, dtype):
    """float64 is shifted before it becomes float32: by a voxel of the mask, not by the fill."""
    network, options = ARRAYS[kind]
    options = {"spacing": SPACING, "parameters": "default", **options}
    result = crfrefine.refine(network, with_nan(PHANTOM.image, dtype), **options)
    masked = crfrefine.refine(network, filled(PHANTOM.image, dtype), mask=~IS_NAN, **options)
    np.testing.assert_array_equal(result.logits, masked.logits)
    np.testing.assert_array_equal(result.label_map, masked.label_map)
    np.testing.assert_array_equal(result.label_map[IS_NAN], result.network_label_map[IS_NAN])
    assert [note for note in map(str, result.notes) if "NaN" in note] == [
        f"{NOTE} and take no part, as if outside the mask"
    ]
    assert not any("NaN" in note for note in map(str, masked.notes))


def test_a_given_mask_and_a_plan_lose_the_voxels_that_are_nan():
    mask = np.zeros(GRID_SHAPE, np.bool_)
    mask[2:14, 3:, 2:] = True
    plan = crfrefine.Plan(with_nan(PHANTOM.image), spacing=SPACING, mask=mask)
    masked = crfrefine.refine(
        PHANTOM.logits, filled(PHANTOM.image), spacing=SPACING, mask=mask & ~IS_NAN
    )
    np.testing.assert_array_equal(plan.run(PHANTOM.logits).logits, masked.logits)


def test_too_much_nan_and_infinite_values_are_errors():
    image = PHANTOM.image.astype(np.float32)
    image[1].flat[: int(0.995 * image[1].size)] = np.nan
    with pytest.raises(InputError, match=r"image: 2955 of 2970 voxels are NaN; expected numbers"):
        crfrefine.refine(PHANTOM.logits, image, spacing=SPACING)
    mask = np.zeros(GRID_SHAPE, np.bool_)
    mask[:5, 2:9] = True
    image = with_nan(PHANTOM.image)
    with pytest.raises(InputError, match=r"image: 385 of 385 voxels of the mask are NaN"):
        crfrefine.refine(PHANTOM.logits, image, spacing=SPACING, mask=mask)
    image[1, 9, 6, 7] = -np.inf
    with pytest.raises(InputError, match="image: channel 1 has 1 values that are not finite"):
        crfrefine.refine(PHANTOM.logits, image, spacing=SPACING)


def test_logits_are_finite_also_where_the_image_is_nan():
    """The result outside the mask is the label of the largest logit, which NaN has not."""
    logits = np.array(PHANTOM.logits)
    logits[:, 2, 3, 4] = np.nan
    with pytest.raises(InputError, match="logits: channel 0 has 1 values that are not finite"):
        crfrefine.refine(logits, with_nan(PHANTOM.image), spacing=SPACING)


def write_images(folders, image):
    for modality, values in enumerate(image):
        save_nifti(folders.images / f"a_{modality:04d}.nii.gz", values)


def coarse_logits(folders):
    """Logits on a grid of twice the voxels along each axis."""
    affine = AFFINE.copy()
    affine[:3, :3] *= 2
    save_nifti(
        folders.logits / "a.nii.gz", np.moveaxis(PHANTOM.logits[:, ::2, ::2, ::2], 0, -1), affine
    )


def label_map(folders):
    save_nifti(folders.logits / "a.nii.gz", labels_of(PHANTOM.logits))


def unchanged(folders):
    pass


OF_COARSER = ("--input-type", "labels", "--network-spacing", "3")


@pytest.mark.parametrize(
    ("prepare", "options", "streams"),
    [
        pytest.param(unchanged, (), False, id="in memory"),
        pytest.param(unchanged, (), True, id="streamed"),
        pytest.param(coarse_logits, ("--resample", "linear"), False, id="resampled"),
        pytest.param(coarse_logits, ("--resample", "linear"), True, id="resampled and streamed"),
        pytest.param(label_map, (), False, id="label map"),
        pytest.param(label_map, OF_COARSER, False, id="network spacing"),
    ],
)
def test_infer_gives_the_files_of_a_mask(prepare, options, streams, tmp_path, monkeypatch):
    set_streaming(monkeypatch, streams)
    folders = write_folders(tmp_path, "a")
    prepare(folders)
    options = (*options, "--save-logits")
    mask = save_nifti(tmp_path / "masks" / "a.nii.gz", (~IS_NAN).astype(np.uint8))
    write_images(folders, filled(PHANTOM.image))
    infer(folders, *options, "-m", mask.parent, status=0)
    names = ("a.nii.gz", "a_logits.nii.gz")
    wanted = [load_nifti(folders.output / name) for name in names]

    write_images(folders, with_nan(PHANTOM.image))
    again = folders._replace(output=tmp_path / "again")
    (case,) = summary_of(again, *options)["cases"]
    for name, values in zip(names, wanted, strict=True):
        np.testing.assert_array_equal(load_nifti(again.output / name), values)
    assert any(note["text"].startswith(NOTE) for note in case["notes"])
    assert case["num_voxels_in_mask"] == (~IS_NAN).sum()


def test_nan_is_not_nonzero_and_other_errors_stay(tmp_path):
    """NaN is true in numpy; the voxel that is NaN in one modality has a number in the other."""
    folders = write_folders(tmp_path, "a")
    image = with_nan(PHANTOM.image)
    image[:, :, 0] = 0.0
    write_images(folders, image)
    (case,) = summary_of(folders, "-m", "nonzero")["cases"]
    wanted = (np.nan_to_num(image) != 0).any(axis=0) & ~IS_NAN
    wanted[:, 0] = False
    assert case["num_voxels_in_mask"] == wanted.sum()

    image[1, 9, 6, 5] = np.inf
    write_images(folders, image)
    result = infer(folders, status=1)
    assert "1 of 2970 values are infinite; the first one (infinite) is at voxel (9, 6, 5)" in (
        result.stderr
    )
    write_images(folders, np.full_like(image, np.nan))
    result = infer(folders, status=1)
    assert "a_0000.nii.gz: 2970 of 2970 voxels are NaN" in result.stderr


def case_files(folders):
    return CaseFiles("a", tuple(sorted(folders.images.iterdir())), (folders.logits / "a.nii.gz",))


def test_training_and_the_page_get_a_mask_and_numbers(tmp_path):
    folders = write_folders(tmp_path, "a")
    write_images(folders, with_nan(PHANTOM.image))
    files = case_files(folders)
    case = load_case(files)
    np.testing.assert_array_equal(case.mask, ~IS_NAN)
    assert np.isfinite(case.image).all()
    np.testing.assert_array_equal(
        case.image[:, ~IS_NAN], PHANTOM.image.astype(np.float32)[:, ~IS_NAN]
    )
    # Background stays as dark as the darkest voxel.
    assert case.image[1, 0, 0, 0] == np.nanmin(with_nan(PHANTOM.image)[1])

    inputs = InferenceOptions((), (), Path(), threads=1)
    page = CaseRefiner(open_case(files, ReadingOptions(), 1), inputs)
    for mode in ("none", "nonzero"):
        parameters = CrfParameters().replace(**{"intensity.mask": mode})
        mask = ~IS_NAN if mode == "none" else ~IS_NAN & (PHANTOM.image != 0).any(axis=0)
        wanted = crfrefine.refine(
            PHANTOM.logits,
            filled(PHANTOM.image),
            spacing=SPACING,
            parameters=parameters,
            mask=mask,
        )
        np.testing.assert_array_equal(page.refine(parameters).label_map, wanted.label_map)


def test_turned_axes_and_integers(tmp_path):
    """A modality with mirrored axes is decoded twice; files of integers are never looked at."""
    folders = write_folders(tmp_path, "a")
    image = with_nan(PHANTOM.image)
    write_images(folders, image)
    flip = np.diag([-1.0, 1.0, 1.0, 1.0])
    flip[0, 3] = GRID_SHAPE[0] - 1
    save_nifti(folders.images / "a_0001.nii.gz", image[1, ::-1], AFFINE @ flip)
    np.testing.assert_array_equal(load_case(case_files(folders)).mask, ~IS_NAN)

    for path in folders.images.iterdir():
        save_nifti(path, PHANTOM.image[0].astype(np.int16))
    assert load_case(case_files(folders)).mask is None


def test_info_counts_them(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    values[1, 1:] = np.nan
    path = save_nifti(tmp_path / "a.nii.gz", values)
    text = run_here("info", "-v", path, status=0).stdout
    assert "  values        0 to 15, mean 7.5\n" in text
    assert "  NaN           8 of 24 voxels\n" in text
    path = save_nifti(tmp_path / "b.nii.gz", np.full((2, 3, 4), np.nan, np.float32))
    assert "  NaN           24 of 24 voxels\n" in run_here("info", "-v", path, status=0).stdout


def test_the_export_of_nnunet_leaves_them_out(tmp_path):
    stored = GRID_SHAPE[::-1]
    logits = np.ascontiguousarray(PHANTOM.logits.transpose(0, 3, 2, 1)[:, ::2, ::2, ::2])
    properties = {
        "spacing": list(SPACING[::-1]),
        "shape_before_cropping": stored,
        "bbox_used_for_cropping": [[0, extent] for extent in stored],
        "shape_after_cropping_and_before_resampling": stored,
    }
    affine = np.diag([*SPACING, 1.0])
    results = []
    for name, values in (("nan", with_nan(PHANTOM.image)), ("number", filled(PHANTOM.image))):
        path = save_nifti(tmp_path / f"{name}.nii.gz", values[0], affine)
        output = tmp_path / f"{name}_out.nii.gz"
        results.append(crfrefine.nnunet.export_prediction(logits, properties, path, output))
    is_nan = np.isnan(with_nan(PHANTOM.image)[0])
    np.testing.assert_array_equal(
        results[0].label_map[is_nan], results[0].network_label_map[is_nan]
    )
    assert any("are NaN" in str(note) for note in results[0].notes)
    assert not any("are NaN" in str(note) for note in results[1].notes)


def test_train_crf_and_evaluate_take_them(tmp_path, monkeypatch):
    shorten(monkeypatch)
    folders = write_folders(tmp_path, "a", "b")
    for number, case_id in enumerate(("a", "b")):
        labels = make_phantom(number, GRID_SHAPE, SPACING).labels
        save_nifti(tmp_path / "labels" / f"{case_id}.nii.gz", labels)
    write_images(folders, with_nan(PHANTOM.image))
    labels = ("-l", tmp_path / "labels")
    cases = ("-i", folders.images, "-p", folders.logits)
    model = tmp_path / "model.toml"
    run_here("train-crf", *cases, *labels, "-o", model, "--num-iterations", 2, *FAST, status=0)
    infer(folders, status=0)
    measured = (folders.output, tmp_path / "labels", "-i", folders.images)
    done = run_here("evaluate", *measured, "--processes", 1, "-o", tmp_path / "measured", status=0)
    assert "shown without" not in done.stderr
