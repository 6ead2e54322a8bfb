"""Logits on a network's grid: interpolated by tile, exported as nnU-Net does, refined onto the image's grid."""

import nibabel
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, zoom

from crfrefine import CrfParameters, nnunet
from crfrefine.errors import ConfigError, GridMismatchError, InputError

NO_CRF = CrfParameters().replace(**{"bilateral.weight": 0.0})
SPACING = (1.0, 1.4, 0.8)  # x, y, z


def smooth_logits(num_labels, shape, seed, scale=60.0):
    rng = np.random.default_rng(seed)
    return (gaussian_filter(rng.normal(size=(num_labels, *shape)), [0, 2, 2, 2]) * scale).astype(np.float32)


def resized(channel, shape, order=1):
    """Return a channel on another grid of the same extent, as scikit-image's `resize` and nnU-Net make it."""
    factors = [new / old for new, old in zip(shape, channel.shape, strict=True)]
    return zoom(channel, factors, order=order, mode="nearest", grid_mode=True)


def save_image(folder, stored_shape, spacing=SPACING, seed=0):
    values = np.random.default_rng(seed).normal(100.0, 20.0, stored_shape).astype(np.float32)
    path = folder / "image.nii.gz"
    nibabel.save(nibabel.Nifti1Image(values.transpose(), np.diag([*spacing, 1.0])), path)
    return path


def properties_of(stored_shape, box, transpose, spacing=SPACING):
    return {
        "spacing": list(spacing[::-1]),
        "shape_before_cropping": tuple(stored_shape[axis] for axis in transpose),
        "bbox_used_for_cropping": [list(part) for part in box],
        "shape_after_cropping_and_before_resampling": tuple(stop - start for start, stop in box),
    }


def expected_export(logits, box, shape_before, transpose, nearest=None, order=1):
    """Interpolate every label everywhere, take the largest, undo crop and transposition."""
    cropped = tuple(stop - start for start, stop in box)
    if nearest is None:
        dense = np.stack([resized(channel, cropped, order) for channel in logits])
    else:
        in_plane = list(cropped)
        in_plane[nearest] = logits.shape[1 + nearest]
        index = (np.arange(cropped[nearest]) + 0.5) * in_plane[nearest] / cropped[nearest]
        dense = np.stack([resized(channel, in_plane).take(index.astype(int), axis=nearest) for channel in logits])
    labels = np.zeros(shape_before, np.uint8)
    labels[tuple(slice(*part) for part in box)] = dense.argmax(axis=0)
    return labels.transpose(np.argsort(transpose))


@pytest.mark.parametrize(
    ("transpose", "network_shape", "nearest"),
    [((0, 1, 2), (14, 13, 9), None), ((2, 0, 1), (11, 24, 22), None), ((1, 2, 0), (5, 12, 31), 0)],
    ids=["plain", "transposed", "anisotropic"],
)
def test_export_without_crf_is_linear_export(tmp_path, transpose, network_shape, nearest):
    stored = (31, 38, 26)
    before = tuple(stored[axis] for axis in transpose)
    box = [(2, before[0] - 1), (0, before[1] - 3), (4, before[2])]
    logits = smooth_logits(7, network_shape, 3)
    result = nnunet.export_prediction(
        logits,
        properties_of(stored, box, transpose),
        save_image(tmp_path, stored),
        tmp_path / "out.nii.gz",
        parameters=NO_CRF,
        transpose_forward=transpose,
    )
    written = np.asarray(nibabel.load(tmp_path / "out.nii.gz").dataobj).transpose()
    assert (written == expected_export(logits, box, before, transpose, nearest)).all()
    assert (result.label_map.transpose() == written).all()


def test_labels_far_apart_are_kept_where_they_are_near_in_any_pieces(tmp_path, monkeypatch):
    """Each label is kept in few tiles, also across the planes that come together; nothing of the export is lost."""
    stored, network = (80, 34, 40), (40, 20, 30)
    centers = np.random.default_rng(5).uniform(2, np.array(network) - 2, (30, 3))
    distances = np.linalg.norm(np.moveaxis(np.indices(network), 0, -1)[None] - centers[:, None, None, None], axis=-1)
    logits = np.concatenate([np.zeros((1, *network)), 12.0 - 6.0 * distances]).astype(np.float32)
    box = [(0, extent) for extent in stored]
    arguments = logits, properties_of(stored, box, (0, 1, 2)), save_image(tmp_path, stored), tmp_path / "out.nii"
    expected, refined = expected_export(logits, box, stored, (0, 1, 2)), []
    for planes in (40, 8):
        monkeypatch.setattr(nnunet, "_PIECE_VOXELS", planes * 20 * 30)
        assert (nnunet.export_prediction(*arguments, parameters=NO_CRF).label_map.transpose() == expected).all()
        refined.append(nnunet.export_prediction(*arguments, parameters="default").label_map)
    np.testing.assert_array_equal(*refined)
    assert 0 < np.count_nonzero(refined[0].transpose() != expected) < 0.05 * expected.size


def test_cubic_export_is_close_to_the_spline(tmp_path):
    """Labels of nnU-Net's order 3, but for a few voxels on borders: a quarter of those where linear ones differ."""
    stored, network = (31, 38, 26), (15, 17, 12)
    logits, box = smooth_logits(5, network, 3), [(0, extent) for extent in stored]
    arguments = logits, properties_of(stored, box, (0, 1, 2)), save_image(tmp_path, stored), tmp_path / "out.nii.gz"
    expected = expected_export(logits, box, stored, (0, 1, 2), order=3)
    differ = {}
    for how in ("linear", "cubic"):
        labels = nnunet.export_prediction(*arguments, parameters=NO_CRF, resample=how).label_map.transpose()
        differ[how] = np.mean(labels != expected)
    assert differ["cubic"] < 0.3 * differ["linear"]
    with pytest.raises(ConfigError, match="expected one of linear, cubic"):
        nnunet.export_prediction(*arguments, resample="quintic")


def test_refined_as_the_dense_interpolation(tmp_path):
    """The CRF on tiles of interpolated logits is that on the whole interpolated array."""
    from crfrefine import refine

    stored, network = (30, 34, 28), (15, 17, 14)
    logits = smooth_logits(4, network, 8, scale=40.0)
    path = save_image(tmp_path, stored)
    image = np.asarray(nibabel.load(path).dataobj)
    box = [(0, extent) for extent in stored]
    result = nnunet.export_prediction(logits, properties_of(stored, box, (0, 1, 2)), path, tmp_path / "o.nii.gz", parameters="default")
    dense = np.stack([resized(channel, stored).transpose() for channel in logits])
    expected = refine(dense, image, spacing=SPACING, parameters="default", input_type="logits")
    assert np.mean(result.label_map != expected.label_map) < 1e-3
    assert np.mean(result.label_map != result.network_label_map) > 1e-3


def test_the_networks_label_map_does_not_depend_on_the_crf(tmp_path):
    """Halfway between two labels a third one is the largest, although it is improbable at every voxel of the network."""
    logits = np.zeros((3, 5, 7, 6), np.float32)
    logits[0, ..., :3], logits[0, ..., 3:] = 10.0, -10.0
    logits[1], logits[2] = -logits[0], 0.6
    stored = (9, 13, 15)
    arguments = logits, properties_of(stored, [(0, extent) for extent in stored], (0, 1, 2)), save_image(tmp_path, stored)
    maps = [nnunet.export_prediction(*arguments, tmp_path / "o.nii.gz", parameters=p).network_label_map for p in (NO_CRF, "default")]
    np.testing.assert_array_equal(*maps)


def test_tensors_and_regions(tmp_path):
    torch = pytest.importorskip("torch")
    stored, network = (21, 26, 30), (11, 13, 15)
    logits = smooth_logits(3, network, 4)
    box = [(1, 21), (0, 26), (2, 30)]
    arguments = properties_of(stored, box, (0, 1, 2)), save_image(tmp_path, stored), tmp_path / "o.nii.gz"
    from_array = nnunet.export_prediction(logits.astype(np.float16), *arguments)
    from_tensor = nnunet.export_prediction(torch.from_numpy(logits).half(), *arguments)
    assert (from_array.label_map == from_tensor.label_map).all()
    regions = {"whole": (1, 2, 3), "core": (2, 3), "cyst": (3,)}
    result = nnunet.export_prediction(logits, *arguments, parameters=NO_CRF, regions=regions)
    dense = np.stack([resized(channel, (20, 26, 28)) for channel in logits]) > 0
    expected = np.zeros(stored, np.uint8)
    inner = expected[1:21, :, 2:30]
    for label, channel in enumerate(dense, start=1):
        inner[channel] = label
    assert np.mean(result.label_map.transpose() != expected) < 1e-4


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"spacing": None}, InputError, "spacing missing"),
        ({"shape_before_cropping": (21, 26, 31)}, GridMismatchError, "properties of this image"),
        ({"bbox_used_for_cropping": [[0, 20], [0, 26], [0, 30]]}, GridMismatchError, "cropped from"),
        ({"sitk_stuff": {"original_orientation": "LPS"}}, GridMismatchError, "turned the image's axes"),
    ],
)
def test_properties_that_do_not_fit(tmp_path, change, error, words):
    stored = (21, 26, 30)
    properties = properties_of(stored, [(0, extent) for extent in stored], (0, 1, 2)) | change
    properties = {name: value for name, value in properties.items() if value is not None}
    with pytest.raises(error, match=words):
        nnunet.export_prediction(smooth_logits(3, (11, 13, 15), 4), properties, save_image(tmp_path, stored), tmp_path / "o.nii.gz")
    assert not (tmp_path / "o.nii.gz").exists()


def test_bad_arguments(tmp_path):
    stored = (21, 26, 30)
    arguments = properties_of(stored, [(0, extent) for extent in stored], (0, 1, 2)), save_image(tmp_path, stored), tmp_path / "o.nii.gz"
    logits = smooth_logits(3, (11, 13, 15), 4)
    with pytest.raises(ConfigError, match="transpose_forward"):
        nnunet.export_prediction(logits, *arguments, transpose_forward=(0, 1, 1))
    logits[1, 3, 4, 5] = np.nan
    with pytest.raises(InputError, match="not finite"):
        nnunet.export_prediction(logits, *arguments)


def test_padding_of_the_network_is_background(tmp_path):
    stored, network = (24, 20, 36), (12, 10, 18)
    logits = smooth_logits(3, network, 6) + np.array([-30, 0, 0], np.float32)[:, None, None, None]
    logits[:, :3] = -1e4
    box = [(0, extent) for extent in stored]
    result = nnunet.export_prediction(logits, properties_of(stored, box, (0, 1, 2)), save_image(tmp_path, stored), tmp_path / "o.nii")
    labels = result.label_map.transpose()
    assert not labels[:5].any()
    assert labels[7:].all()
    assert result.num_padding_voxels == 5 * 20 * 36
