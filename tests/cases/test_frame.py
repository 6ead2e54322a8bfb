"""The voxel axes of arrays without geometry: by nnU-Net's plans, by a label map, or unknown."""

import nibabel as nib
import numpy as np
import pytest
from nnunet_helpers import plans, write_json

from crfrefine import io
from crfrefine.arrays.axes_check import AxesCheck
from crfrefine.cases import case_headers, frame
from crfrefine.cases.case import load_case, read_case
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.reading_options import DEFAULT_READING
from crfrefine.errors import GridMismatchError, InputError

SHAPE = (17, 12, 9)
AFFINES = {
    "LPS": np.array([[-1.5, 0, 0, 20], [0, -2, 0, 9], [0, 0, 3, -4], [0, 0, 0, 1.0]]),
    "PIR": np.array([[0, 0, 3.0, -7], [-1.5, 0, 0, 30], [0, -2.0, 0, 11], [0, 0, 0, 1]]),
    "RAS": np.diag([1.5, 2.0, 3.0, 1.0]),
}
AFFINES["oblique"] = AFFINES["PIR"].copy()
AFFINES["oblique"][:3, :3] = (
    np.array([[0.936, -0.275, 0.218], [0.289, 0.957, -0.036], [-0.199, 0.097, 0.975]])
    @ AFFINES["PIR"][:3, :3]
)
TURNING = ("NibabelIOWithReorient", "SimpleITKIOWithReorient")


def labels_of_network():
    """Two labels without any symmetry, (x, y, z)."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:9, 1:5, 2:4] = 1
    labels[4:12, 6:8, 1:7] = 2
    labels[11:15, 7:10, 5:8] = 2
    return labels


def write_image(folder, affine):
    path = folder / "images" / "a_0000.nii.gz"
    path.parent.mkdir(exist_ok=True)
    values = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def write_scores(folder, affine, *, axes="RAS", name="a.npz"):
    """Write what a network saved, its voxels along other axes than those of the image."""
    labels = labels_of_network()
    channels = np.stack([np.where(labels == label, 0.8, 0.1) for label in range(3)])
    turned = []
    for channel in channels.astype(np.float32):
        image = nib.Nifti1Image(channel, affine)
        if axes != "image":
            ornt = nib.orientations.axcodes2ornt(axes)
            start = nib.orientations.io_orientation(affine)
            image = image.as_reoriented(nib.orientations.ornt_transform(start, ornt))
        turned.append(image.get_fdata(dtype=np.float32).T)
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / name
    if name.endswith(".npy"):
        np.save(path, np.stack(turned))
    else:
        np.savez_compressed(path, probabilities=np.stack(turned))
    return path


def write_map(folder, affine, labels=None):
    labels = labels_of_network() if labels is None else labels
    nib.save(nib.Nifti1Image(labels, affine), folder / "a.nii.gz")


def read(image, scores):
    return load_case(CaseFiles("a", (image,), (scores,)))


def texts(case):
    return " | ".join(map(str, case.notes))


@pytest.mark.parametrize("reader", TURNING)
@pytest.mark.parametrize("axes", AFFINES)
def test_plans_beside_an_array_name_the_reader_and_so_its_axes(axes, reader, tmp_path):
    affine = AFFINES[axes]
    image = write_image(tmp_path, affine)
    scores = write_scores(tmp_path / "p", affine)
    write_json(tmp_path / "p" / "plans.json", plans(image_reader_writer=reader))
    case = read(image, scores)
    np.testing.assert_array_equal(case.network_labels, labels_of_network())
    assert (reader in texts(case)) == (axes != "RAS")
    assert "nothing beside" not in texts(case)


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_other_readers_keep_the_axes_of_the_image(reader, tmp_path):
    affine = AFFINES["PIR"]
    image = write_image(tmp_path, affine)
    scores = write_scores(tmp_path / "p", affine, axes="image")
    write_json(tmp_path / "p" / "plans.json", plans(image_reader_writer=reader))
    case = read(image, scores)
    np.testing.assert_array_equal(case.network_labels, labels_of_network())
    assert "a.npz: " not in texts(case)
    # The image has been turned since: the label map beside the array still has its axes.
    closest = nib.as_closest_canonical(nib.load(image))
    nib.save(closest, image)
    write_map(tmp_path / "p", affine)
    case = read(image, scores)
    turned = nib.as_closest_canonical(nib.Nifti1Image(labels_of_network(), affine))
    np.testing.assert_array_equal(case.network_labels, turned.get_fdata())


def test_the_plans_of_the_network_count_for_its_validations(tmp_path):
    network = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    affine = AFFINES["LPS"]
    image = write_image(tmp_path, affine)
    write_json(network / "plans.json", plans(image_reader_writer=TURNING[0]))
    for place in ("fold_0/validation", "crossval_results_folds_0_1/postprocessed"):
        case = read(image, write_scores(network / place, affine))
        np.testing.assert_array_equal(case.network_labels, labels_of_network())
    # Without plans, the reader may be that of a dataset.json.
    scores = write_scores(tmp_path / "p", affine)
    write_json(tmp_path / "p" / "dataset.json", {"overwrite_image_reader_writer": TURNING[1]})
    np.testing.assert_array_equal(read(image, scores).network_labels, labels_of_network())


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
def test_a_label_map_that_fits_in_other_axes_is_an_error(name, is_streamed, tmp_path):
    affine = AFFINES["LPS"]
    image = write_image(tmp_path, affine)
    files = CaseFiles("a", (image,), (write_scores(tmp_path / "p", affine, name=name),))
    cleaned = labels_of_network()
    cleaned[11:15] = 0  # as post-processing removes a part
    write_map(tmp_path / "p", affine, cleaned)

    def read_all():
        headers = case_headers.read_case_headers(files)
        case = read_case(headers, DEFAULT_READING, is_streamed=is_streamed)
        if is_streamed:
            for _ in range(2):
                for _ in case.network.read():
                    pass
        return case

    with pytest.raises(InputError) as told:
        read_all()
    text = str(told.value)
    assert "seem to run toward RAS; expected LPS" in text
    assert "a.nii.gz at 100% of the voxels that way" in text
    assert f"--like {image} --axes RAS" in text
    assert "plans.json" in text
    write_scores(tmp_path / "p", affine, axes="image", name=name)
    assert "a.np" not in texts(read_all()).replace(f"{name} is taken as", "")


def test_any_axes_of_the_same_sizes_are_found(tmp_path):
    affine = AFFINES["RAS"]
    image = write_image(tmp_path, affine)
    scores = write_scores(tmp_path / "p", affine, axes="LAI")
    write_map(tmp_path / "p", affine)
    with pytest.raises(InputError, match="seem to run toward LAI; expected RAS"):
        read(image, scores)


def test_an_array_with_nothing_beside_it_is_noted_unless_its_image_is_toward_ras(tmp_path):
    for axes, is_noted in (("LPS", True), ("RAS", False)):
        image = write_image(tmp_path, AFFINES[axes])
        scores = write_scores(tmp_path / "p", AFFINES[axes], axes="image")
        case = read(image, scores)
        np.testing.assert_array_equal(case.network_labels, labels_of_network())
        told = f"axes of the image ({axes}); nothing beside it says otherwise"
        assert (told in texts(case)) == is_noted
    # An image is no label map; nor is a file on another grid.
    image = write_image(tmp_path, AFFINES["LPS"])
    (tmp_path / "p" / "a.nii.gz").write_bytes(image.read_bytes())
    assert "nothing beside it" in texts(read(image, scores))
    write_map(tmp_path / "p", AFFINES["RAS"])
    assert "nothing beside it" in texts(read(image, scores))


def test_a_label_map_that_does_not_fit_in_any_axes_is_noted(tmp_path):
    affine = AFFINES["LPS"]
    image = write_image(tmp_path, affine)
    scores = write_scores(tmp_path / "p", affine, axes="image")
    other = np.zeros(SHAPE, np.uint8)
    other[:3, 10:, 4:7] = 1
    write_map(tmp_path / "p", affine, other)
    assert "agree with the label map a.nii.gz at 0% of the voxels" in texts(read(image, scores))


def test_sizes_that_fit_the_axes_of_nnunet_are_named(tmp_path):
    affine = AFFINES["PIR"]
    image = write_image(tmp_path, affine)
    scores = write_scores(tmp_path / "p", affine)
    with pytest.raises(GridMismatchError, match=r"(?s)turned to RAS.*--axes RAS") as told:
        read(image, scores)
    assert "plans.json" in str(told.value)
    assert "transpose" not in str(told.value)


def test_the_nearest_axes_of_double_oblique_planes_are_compared_with_the_label_map(tmp_path):
    """Two voxel axes are nearest to the same one of the world: programs differ in their order."""
    affine = np.eye(4)
    first = np.array([0.66, 0.57, 0.49])
    second = np.array([-0.75, 0.5, 0.43])
    directions = [first, second, np.cross(first, second)]
    for axis, (direction, step) in enumerate(zip(directions, (1.5, 2.0, 3.0), strict=True)):
        affine[:3, axis] = direction / np.linalg.norm(direction) * step
    image = write_image(tmp_path, affine)
    scores = write_scores(tmp_path / "p", affine)
    write_map(tmp_path / "p", affine)
    write_json(tmp_path / "p" / "plans.json", plans(image_reader_writer=TURNING[0]))
    _, compared = frame.read_network_file(scores, io.read_header(image))
    assert compared is not None
    np.testing.assert_array_equal(read(image, scores).network_labels, labels_of_network())
    write_map(tmp_path / "p", affine, labels_of_network()[::-1])
    with pytest.raises(InputError, match="seem to run toward"):
        read(image, scores)


def test_regions_are_compared_by_their_foreground():
    labels = labels_of_network().T
    regions = np.stack([labels > 0, labels > 1]).astype(np.float32)
    for turned, best in ((regions, 0), (regions[:, :, :, ::-1], 4)):
        check = AxesCheck(labels)
        for plane in range(labels.shape[0]):
            check.add(turned[:, plane : plane + 1], 0, plane)
        shares = check.shares(are_regions=True, kind="probabilities")
        assert (shares.argmax(), round(shares.max(), 9)) == (best, 1.0)
        assert len(shares) == 8, "its sizes allow mirrored axes only"
