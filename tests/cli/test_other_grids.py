"""Files whose headers place them elsewhere: `evaluate` compares on the union of the grids, and
`convert` gives a file the place that it lacks.
"""

import shlex

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from cli_helpers import load_nifti, run_here
from evaluation_helpers import (
    SHAPE,
    SPACING,
    affine,
    assert_equal,
    disturbed,
    expected_calibration,
    expected_overlap,
    label_map,
    logits_of,
    read_metrics,
)
from io_helpers import affine_of, itk_resampled, numbers, save_nifti, save_seg
from oracles import softmax

TRUTH = label_map(3)
FOUND = disturbed(TRUTH, 3, 0.3)
FOUND[0, 0, 0] = 1
FOUND[-1, 2, -1] = 2


def evaluate(folder, prediction, reference, *options, status=0):
    arguments = (prediction, reference, "-o", folder, "--no-report", "--processes", 1, "-v")
    result = run_here("evaluate", *arguments, *options, status=status)
    return result.stderr, read_metrics(folder) if status == 0 else None


@pytest.mark.parametrize("options", [(), ("--resample",)], ids=["plain", "resample"])
@pytest.mark.parametrize("turn", [(), ((2, 0, 1), (0, 2))], ids=["as it is", "turned"])
def test_a_reference_stored_as_a_box_is_compared_with_all_of_the_prediction(
    turn, options, tmp_path
):
    """And the other way around: Dice and distances are those of whole maps."""
    found = save_nifti(tmp_path / "found.nii.gz", FOUND, affine())
    truth = save_seg(tmp_path / "truth.seg.nrrd", np.where(TRUTH == 1, TRUTH, 0), affine(), *turn)
    told, metrics = evaluate(tmp_path / "one", found, truth, *options)
    assert "the reference is stored for a part of the grid of the comparison" in told
    assert_equal(metrics, "truth", "1", "prediction", expected_overlap(FOUND == 1, TRUTH == 1))
    _, metrics = evaluate(tmp_path / "other", truth, found, *options)
    assert_equal(metrics, "found", "1", "prediction", expected_overlap(TRUTH == 1, FOUND == 1))


def test_two_boxes_that_overlap_in_part(tmp_path):
    found = FOUND.copy()
    found[:4] = 0
    truth = TRUTH.copy()
    truth[8:] = 0
    boxes = [
        save_seg(tmp_path / f"{name}.seg.nrrd", values, affine())
        for name, values in (("found", found), ("truth", truth))
    ]
    baseline = save_nifti(tmp_path / "baseline.nii.gz", FOUND, affine())
    _, metrics = evaluate(tmp_path / "out", *boxes, "-b", f"before={baseline}")
    for label in (1, 2):
        for method, values in (("prediction", found), ("before", FOUND)):
            expected = expected_overlap(values == label, truth == label)
            assert_equal(metrics, "truth", str(label), method, expected)


def test_boxes_that_lie_apart(tmp_path):
    """The prediction misses the structure, and each is stored as the box around it; as label maps,
    and as structures beside another one that is right.
    """
    truth = np.zeros(SHAPE, np.uint8)
    truth[2:4, 1:4, 1:3] = 1
    found = np.zeros(SHAPE, np.uint8)
    found[8:11, 6:9, 4:6] = 1
    spleen = np.zeros(SHAPE, np.uint8)
    spleen[5:7, 4:6, 0:2] = 1
    for name, liver in (("truth", truth), ("found", found)):
        folder = tmp_path / name / "a"
        folder.mkdir(parents=True)
        save_seg(tmp_path / f"{name}.seg.nrrd", liver, affine())
        save_seg(folder / "liver.seg.nrrd", liver, affine())
        save_seg(folder / "spleen.seg.nrrd", spleen, affine())
    expected = expected_overlap(found == 1, truth == 1)
    assert expected["dice"] == 0
    pair = (tmp_path / "found.seg.nrrd", tmp_path / "truth.seg.nrrd")
    _, metrics = evaluate(tmp_path / "maps", *pair)
    assert_equal(metrics, "truth", "1", "prediction", expected)
    _, metrics = evaluate(tmp_path / "structures", tmp_path / "found", tmp_path / "truth")
    assert_equal(metrics, "a", "1", "prediction", expected)
    assert_equal(metrics, "a", "2", "prediction", expected_overlap(spleen == 1, spleen == 1))


def test_boxes_of_one_size(tmp_path):
    """As of a structure that was found a few voxels beside its place."""
    found = np.roll(TRUTH == 1, (1, -1), axis=(0, 1)).astype(np.uint8)
    truth = (TRUTH == 1).astype(np.uint8)
    pair = [save_seg(tmp_path / "found.seg.nrrd", found, affine())]
    pair.append(save_seg(tmp_path / "truth.seg.nrrd", truth, affine()))
    _, metrics = evaluate(tmp_path / "out", *pair)
    expected = expected_overlap(found == 1, truth == 1)
    assert_equal(metrics, "truth", "1", "prediction", expected)
    # Files of other programs may have a wrong origin.
    moved = affine()
    moved[:3, 3] += moved[:3, 0]
    for name, place in (("found", affine()), ("truth", moved)):
        pair.append(save_nifti(tmp_path / f"{name}.nii.gz", TRUTH, place))
    told, _ = evaluate(tmp_path / "other", *pair[2:], status=1)
    assert "It has the sizes of the reference, at another place.\n  If it lies there" in told


def test_boxes_too_far_apart_for_the_memory(tmp_path):
    """As by a damaged header; the other case is measured."""
    away = affine()
    away[:3, 3] += away[:3, :3] @ (90_000, 90_000, 90_000)
    for folder in ("truth", "found"):
        (tmp_path / folder).mkdir()
        save_seg(tmp_path / folder / "a.seg.nrrd", TRUTH, affine())
    save_seg(tmp_path / "truth" / "b.seg.nrrd", TRUTH, affine())
    save_seg(tmp_path / "found" / "b.seg.nrrd", TRUTH, away)
    told = run_here(
        *("evaluate", tmp_path / "found", tmp_path / "truth", "-o", tmp_path / "out"),
        *("--no-report", "--processes", 1),
        status=1,
    ).stderr
    assert "truth/b.seg.nrrd: on the grid of the comparison, the reference takes" in told
    assert "the header is damaged" in told
    assert read_metrics(tmp_path / "out")["a", "1", "dice", "prediction"] == 1


def test_voxels_to_ignore_and_probabilities_on_the_union(tmp_path):
    """The reference is a box; what the network says around it counts as errors."""
    truth = TRUTH.copy()
    truth[6, 5, 3] = 7
    scores = logits_of(FOUND, 4)
    reference = save_seg(tmp_path / "truth.seg.nrrd", truth, affine())
    found = save_nifti(tmp_path / "found.nii.gz", np.moveaxis(scores, 0, -1), affine())
    _, metrics = evaluate(tmp_path / "out", found, reference, "--ignore-label", 7)
    counts = truth != 7
    labels = np.where(counts, scores.argmax(axis=0), 0)
    expected = expected_overlap(labels == 2, truth == 2)
    assert_equal(metrics, "truth", "2", "prediction", expected)
    expected = expected_calibration(softmax(scores)[2][counts], truth[counts] == 2)
    assert_equal(metrics, "truth", "2", "prediction", expected)


def test_structures_in_boxes(tmp_path):
    """Folders of 3D Slicer's segments, one box each, against whole files."""
    for name, label in (("liver", 1), ("spleen", 2)):
        for folder in ("truth", "found"):
            (tmp_path / folder / "a").mkdir(parents=True, exist_ok=True)
        inside = (label == TRUTH).astype(np.uint8)
        save_seg(tmp_path / "truth" / "a" / f"{name}.seg.nrrd", inside, affine())
        inside = (label == FOUND).astype(np.uint8)
        save_nifti(tmp_path / "found" / "a" / f"{name}.nii.gz", inside, affine())
    _, metrics = evaluate(tmp_path / "out", tmp_path / "found", tmp_path / "truth")
    for label in (1, 2):
        expected = expected_overlap(label == FOUND, label == TRUTH)
        assert_equal(metrics, "a", str(label), "prediction", expected)


@pytest.mark.parametrize("planes", [slice(4, 11), slice(5, 8)], ids=["half", "a quarter"])
def test_a_reference_on_another_grid_that_covers_less(planes, tmp_path):
    """The prediction has voxels of two by two; the grid that is compared has those of the
    reference, also around it.
    """
    shape = (14, 12, 7)
    truth = np.zeros(shape, np.uint8)
    truth[:13, :11] = TRUTH
    coarse_affine = affine() @ np.diag([2.0, 2.0, 1.0, 1.0])
    coarse_affine[:3, 3] += affine()[:3, :3] @ (0.5, 0.5, 0.0)
    coarse = np.ascontiguousarray(truth[::2, ::2])
    found = save_nifti(tmp_path / "found.nii.gz", coarse, coarse_affine)
    place = affine()
    place[:3, 3] += affine()[:3, 0] * planes.start
    reference = save_nifti(tmp_path / "truth.nii.gz", truth[planes], place)
    refused, _ = evaluate(tmp_path / "out", found, reference, status=1)
    assert "give --resample" in refused
    _, metrics = evaluate(tmp_path / "out", found, reference, "--resample")
    whole = itk_resampled(coarse, coarse_affine, shape, affine(), sitk.sitkNearestNeighbor)
    cut = np.zeros(shape, np.uint8)
    cut[planes] = truth[planes]
    expected = expected_overlap(whole == 1, cut == 1)
    assert 0.1 < expected["dice"] < 0.9
    assert_equal(metrics, "truth", "1", "prediction", expected)


IMAGE_AFFINE = affine_of(SPACING, (-11.0, -17.0, 9.0), np.diag([-1.0, -1.0, 1.0]))
LOST = {
    "identity": np.eye(4),
    "ITK's default": np.diag([-1.0, -1.0, 1.0, 1.0]),
    "spacing alone": affine_of(SPACING),
    "origin alone": affine_of(SPACING, (0.0, 0.0, 0.0), np.diag([-1.0, -1.0, 1.0])),
    "centered": affine_of(
        SPACING, -np.array(SPACING) * (np.array(SHAPE) - 1) / 2 * [-1, 1, 1], np.diag([-1, 1, 1])
    ),
    "LPS as if RAS": np.diag([-1.0, -1.0, 1.0, 1.0]) @ IMAGE_AFFINE,
}


@pytest.mark.parametrize("lost", LOST)
def test_a_lost_header_is_refused_and_the_repair_is_right(lost, tmp_path):
    """Interpolated, the labels would be in another place, exit status 0."""
    image = save_nifti(tmp_path / "a.nii.gz", numbers(SHAPE), IMAGE_AFFINE)
    labels = save_nifti(tmp_path / "map.nii.gz", TRUTH, LOST[lost])
    arguments = ("-i", image, "-p", labels, "-o", tmp_path / "out.nii.gz")
    for options in ((), ("--resample",)):
        told = run_here("infer", *arguments, "--input-type", "labels", *options, status=1).stderr
        assert "the geometry that programs write without a header: it seems to be lost" in told
        assert "Or give --resample" not in told
    (line,) = (line for line in told.splitlines() if "crfrefine convert" in line)
    command = [word.replace("NEW", str(tmp_path / "new")) for word in shlex.split(line)[1:]]
    told = run_here(*command, status=0).stderr
    assert "its voxels are taken for those of a.nii.gz, whatever its header says" in told
    mended = nib.load(tmp_path / "new.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(mended.dataobj), TRUTH)
    np.testing.assert_allclose(mended.affine, IMAGE_AFFINE, atol=1e-5)


def test_an_image_that_lost_its_header_and_one_that_did_not(tmp_path):
    image = save_nifti(tmp_path / "a.nii.gz", numbers(SHAPE), np.eye(4))
    labels = save_nifti(tmp_path / "map.nii.gz", TRUTH, IMAGE_AFFINE)
    arguments = ("--input-type", "labels", "--resample", "-o", tmp_path / "out.nii.gz")
    told = run_here("infer", "-i", image, "-p", labels, *arguments, status=1).stderr
    assert f"convert {image} NEW.nii.gz --like {labels} --same-voxels" in told
    # A scan of its own with the same number of voxels.
    moved = IMAGE_AFFINE.copy()
    moved[:3, 3] += 0.7
    save_nifti(image, numbers(SHAPE), moved)
    run_here("infer", "-i", image, "-p", labels, *arguments, status=0)


def test_same_voxels_needs_as_many_and_an_image(tmp_path):
    image = save_nifti(tmp_path / "a.nii.gz", numbers(SHAPE), IMAGE_AFFINE)
    labels = save_nifti(tmp_path / "map.nii.gz", TRUTH[1:], np.eye(4))
    arguments = ("convert", labels, tmp_path / "new.nii.gz", "--same-voxels")
    told = run_here(*arguments, "--like", image, status=1).stderr
    assert "expected as many voxels as" in told
    assert "name it with --like IMAGE" in run_here(*arguments, status=1).stderr
    assert not (tmp_path / "new.nii.gz").exists()


def test_convert_fills_a_label_map_and_nothing_else(tmp_path):
    image = save_nifti(tmp_path / "a.nii.gz", numbers(SHAPE), affine())
    stored = save_seg(tmp_path / "map.seg.nrrd", TRUTH, affine(), (1, 0, 2), (1,))
    arguments = ("convert", stored, tmp_path / "new.nii.gz", "--like", image)
    assert "is stored for a part of the grid of the image" in run_here(*arguments, status=0).stderr
    np.testing.assert_array_equal(load_nifti(tmp_path / "new.nii.gz"), TRUTH)
    refused = run_here(*arguments, "--as", "image", status=1).stderr
    assert "convert does not interpolate" in refused


CT_AFFINE = affine()  # Its axes run to the right, to the back and up, obliquely.


def save_array(path, scores):
    """Write (x, y, z, label) as nnU-Net does."""
    np.savez_compressed(path, probabilities=scores.transpose(3, 2, 1, 0))
    return path


def test_an_array_without_geometry_is_placed_as_the_error_says(tmp_path):
    """As TotalSegmentator writes it: resampled, its axes turned to RAS, the ends where they were.
    The voxels are those that its page once computed with nibabel.
    """
    ct = save_nifti(tmp_path / "ct.nii.gz", numbers(SHAPE), CT_AFFINE)
    right = nib.as_closest_canonical(nib.load(ct))
    shape = np.array((7, 8, 4))
    coarse = right.affine.copy()
    coarse[:3, :3] *= (np.array(right.shape) - 1) / (shape - 1)
    logits = np.random.default_rng(5).normal(0, 2, (3, *shape)).astype(np.float32)
    scores = np.moveaxis(softmax(logits), 0, -1).astype(np.float32)
    array = save_array(tmp_path / "fast.npz", scores)
    arguments = ("-i", ct, "-p", array, "-o", tmp_path / "out.nii.gz")
    for options in ((), ("--resample",)):
        told = run_here("infer", *arguments, *options, status=1).stderr
        assert "fast.npz has no geometry, and nothing is resampled by a guess" in told
        assert "Or give --resample" not in told
    (line,) = (line for line in told.splitlines() if "crfrefine convert" in line)
    assert line.endswith(f"fast.npz fast_placed.nii.gz --like {ct} --axes RAS")
    placed = tmp_path / "fast_placed.nii.gz"
    command = [placed if "placed" in word else word for word in shlex.split(line)[1:]]
    assert "with first and last voxels at those of ct.nii.gz" in run_here(*command, status=0).stderr
    np.testing.assert_allclose(nib.load(placed).affine, coarse, atol=1e-4)
    np.testing.assert_array_equal(load_nifti(placed), scores)
    arguments = ("-i", ct, "-p", placed, "-o", tmp_path / "out.nii.gz", "--resample")
    no_crf = ("--set", "bilateral.weight=0", "--set", "spatial.weight=0")
    run_here("infer", *arguments, *no_crf, status=0)
    expected = [itk_resampled(channel, coarse, SHAPE, CT_AFFINE) for channel in logits]
    expected = np.argmax(expected, axis=0)
    assert np.unique(expected).tolist() == [0, 1, 2]
    # Where two labels tie to a rounding, either may win.
    assert np.count_nonzero(load_nifti(tmp_path / "out.nii.gz") != expected) <= 2


@pytest.mark.parametrize("axes", ["LPS", "RAS", "slp", "ARI", "IPR"])
def test_axes_of_an_array_run_as_the_user_says(axes, tmp_path):
    ct = save_nifti(tmp_path / "ct.nii.gz", numbers(SHAPE), CT_AFFINE)
    scores = np.moveaxis(softmax(logits_of(TRUTH, 1)), 0, -1).astype(np.float32)
    stored = nib.Nifti1Image(scores, CT_AFFINE)
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(CT_AFFINE), nib.orientations.axcodes2ornt(tuple(axes.upper()))
    )
    turned = stored.as_reoriented(turn)
    array = save_array(tmp_path / "a.npz", np.asanyarray(turned.dataobj))
    out = tmp_path / "out.nii.gz"
    told = run_here("convert", array, out, "--like", ct, "--axes", axes, status=0).stderr
    assert "None" not in told
    np.testing.assert_allclose(nib.load(out).affine, turned.affine, atol=1e-4)
    np.testing.assert_array_equal(load_nifti(out), np.asanyarray(turned.dataobj))


def test_an_array_over_the_field_of_view(tmp_path):
    """Outer faces of both grids are at the same places."""
    ct = save_nifti(tmp_path / "ct.nii.gz", numbers(SHAPE), CT_AFFINE)
    array = save_array(tmp_path / "a.npz", np.full((4, 22, 1, 2), 0.5, np.float32))
    out = tmp_path / "out.nii.gz"
    arguments = ("convert", array, out, "--like", ct, "--axes", "LPS", "--align")
    assert "with the field of view of ct.nii.gz" in run_here(*arguments, "edges", status=0).stderr
    placed = nib.load(out).affine
    first = np.array([-0.5, -0.5, -0.5, 1.0])
    mirrored = [SHAPE[0] - 0.5, -0.5, -0.5, 1.0]
    np.testing.assert_allclose(placed @ first, CT_AFFINE @ mirrored, atol=1e-4)
    last = np.array([3.5, 21.5, 0.5, 1.0])
    opposite = [-0.5, SHAPE[1] - 0.5, SHAPE[2] - 0.5, 1.0]
    np.testing.assert_allclose(placed @ last, CT_AFFINE @ opposite, atol=1e-4)


def test_an_array_whose_axes_are_stored_in_another_order_is_not_stretched(tmp_path):
    """(label, x, y, z), where an array is (label, z, y, x)."""
    ct = save_nifti(tmp_path / "ct.nii.gz", numbers(SHAPE), CT_AFFINE)
    array = save_array(tmp_path / "a.npz", np.full((*SHAPE[::-1], 2), 0.5, np.float32))
    out = tmp_path / "out.nii.gz"
    told = run_here("convert", array, out, "--like", ct, "--axes", "RAS", status=1).stderr
    sizes, reversed_sizes = ("×".join(map(str, shape)) for shape in (SHAPE, SHAPE[::-1]))
    assert "a.npz: --axes RAS: its axes are in another order: " in told
    assert f"ct.nii.gz has {sizes} voxels, the array has {reversed_sizes}\n" in told
    assert not out.exists()


def test_axes_that_say_nothing(tmp_path):
    ct = save_nifti(tmp_path / "ct.nii.gz", numbers(SHAPE), CT_AFFINE)
    array = save_array(tmp_path / "a.npz", np.full((4, 3, 2, 2), 0.5, np.float32))
    out = tmp_path / "out.nii.gz"
    for axes in ("RAR", "RA", "XYZ", "RASL"):
        told = run_here("convert", array, out, "--like", ct, "--axes", axes, status=1).stderr
        assert f"--axes {axes}: expected a letter for each of the 3 axes" in told
    for arguments, text in (
        ((array, out, "--axes", "RAS"), "name it with --like IMAGE"),
        ((array, tmp_path / "b.npz", "--axes", "RAS", "--like", ct), "hold no place"),
        ((ct, out, "--axes", "RAS", "--like", ct), "this file says where its voxels lie"),
        ((array, out, "--align", "edges", "--like", ct), "--align says how --axes places"),
    ):
        assert text in run_here("convert", *arguments, status=1).stderr
    assert not out.exists()
