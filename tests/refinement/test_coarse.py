"""Logits on a network's grid: interpolated by tile, exported as nnU-Net does, refined onto the
image's grid.
"""

from contextlib import nullcontext
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, zoom

from crfrefine import CrfParameters, nnunet, refine
from crfrefine.arrays.grid_map import GridMap
from crfrefine.arrays.network import ArrayNetwork, StreamedNetwork
from crfrefine.arrays.resampling import Interpolation
from crfrefine.engines import get_backend
from crfrefine.errors import ConfigError, CrfRefineError, GridMismatchError, InputError
from crfrefine.io.reading import Piece
from crfrefine.parameters.model import as_parameters
from crfrefine.refinement.refining import refine_network

NO_CRF = CrfParameters().replace(**{"bilateral.weight": 0.0})
SPACING = (1.0, 1.4, 0.8)  # x, y, z


def smooth_logits(num_labels, shape, seed, scale=60.0):
    rng = np.random.default_rng(seed)
    return (gaussian_filter(rng.normal(size=(num_labels, *shape)), [0, 2, 2, 2]) * scale).astype(
        np.float32
    )


def resized(channel, shape, order=1):
    """Return a channel on another grid of the same extent, as scikit-image's `resize` and nnU-Net
    make it.
    """
    factors = [new / old for new, old in zip(shape, channel.shape, strict=True)]
    return zoom(channel, factors, order=order, mode="nearest", grid_mode=True)


@pytest.fixture
def export(tmp_path):
    """Export logits onto an image of a stored shape, of which the network saw a box; None means all
    of it.
    """

    def run(
        logits,
        stored,
        box=None,
        transpose=(0, 1, 2),
        change=None,
        output=tmp_path / "out.nii.gz",
        **options,
    ):
        before = tuple(stored[axis] for axis in transpose)
        path = tmp_path / "image.nii.gz"
        values = np.random.default_rng(0).normal(100.0, 20.0, stored).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(values.transpose(), np.diag([*SPACING, 1.0])), path)
        box = [(0, extent) for extent in before] if box is None else box
        properties = {
            "spacing": list(SPACING[::-1]),
            "shape_before_cropping": before,
            "bbox_used_for_cropping": [list(part) for part in box],
            "shape_after_cropping_and_before_resampling": tuple(
                stop - start for start, stop in box
            ),
        } | (change or {})
        properties = {name: value for name, value in properties.items() if value is not None}
        return nnunet.export_prediction(
            logits, properties, path, output, transpose_forward=transpose, **options
        )

    return run


def expected_export(logits, shape_before, box=None, transpose=(0, 1, 2), nearest=None, order=1):
    """Interpolate every label everywhere, take the largest, undo crop and transposition."""
    box = [(0, extent) for extent in shape_before] if box is None else box
    cropped = tuple(stop - start for start, stop in box)
    if nearest is None:
        dense = np.stack([resized(channel, cropped, order) for channel in logits])
    else:
        in_plane = list(cropped)
        in_plane[nearest] = logits.shape[1 + nearest]
        index = (np.arange(cropped[nearest]) + 0.5) * in_plane[nearest] / cropped[nearest]
        dense = np.stack(
            [resized(channel, in_plane).take(index.astype(int), axis=nearest) for channel in logits]
        )
    labels = np.zeros(shape_before, np.uint8)
    labels[tuple(slice(*part) for part in box)] = dense.argmax(axis=0)
    return labels.transpose(np.argsort(transpose))


@pytest.mark.parametrize(
    ("transpose", "network_shape", "nearest", "is_open"),
    [
        ((0, 1, 2), (14, 13, 9), None, False),
        ((2, 0, 1), (11, 24, 22), None, False),
        ((1, 2, 0), (5, 12, 31), 0, False),
        ((0, 1, 2), (28, 12, 6), None, True),  # of 0.8, 4 and 4 mm
        ((0, 1, 2), (28, 20, 28), None, True),  # of 0.8, 2.4 and 0.8 mm
    ],
    ids=["plain", "transposed", "anisotropic", "two coarse axes", "three times as coarse"],
)
def test_export_without_crf_is_linear_export(
    export, tmp_path, transpose, network_shape, nearest, is_open
):
    """A warning asks for the network's spacing where its shape does not tell the axis for sure."""
    stored = (31, 38, 26)
    before = tuple(stored[axis] for axis in transpose)
    box = [(2, before[0] - 1), (0, before[1] - 3), (4, before[2])]
    logits = smooth_logits(7, network_shape, 3)
    asks = pytest.warns(UserWarning, match="pass configuration_spacing=")
    with asks if is_open else nullcontext():
        result = export(logits, stored, box, transpose, parameters=NO_CRF)
    written = np.asarray(nibabel.load(tmp_path / "out.nii.gz").dataobj).transpose()
    assert (written == expected_export(logits, before, box, transpose, nearest)).all()
    assert (result.label_map.transpose() == written).all()


@pytest.mark.parametrize(
    ("network_shape", "spacing", "nearest"),
    [
        ((28, 20, 28), (0.8, 2.4, 0.8), None),
        ((28, 20, 28), (0.8, 2.45, 0.8), 1),
        ((28, 12, 6), (0.8, 4.0, 4.0), None),
        ((28, 12, 6), (0.8, 4.05, 4.0), 1),
        ((28, 20, 28), (2.45, 0.8), 1),
    ],
    ids=["three times", "more than three", "two coarse axes", "one is coarser", "2-D"],
)
def test_the_spacing_of_the_network_decides_where_its_shape_leaves_the_axis_open(
    export, network_shape, spacing, nearest
):
    """nnU-Net takes the nearest slice along the coarsest axis beyond a ratio of three."""
    stored = (31, 38, 26)
    box = [(2, 30), (0, 35), (4, 26)]
    logits = smooth_logits(7, network_shape, 3)
    options = {"parameters": NO_CRF, "configuration_spacing": spacing}
    labels = export(logits, stored, box, **options).label_map.transpose()
    assert (labels == expected_export(logits, stored, box, nearest=nearest)).all()


def test_a_spacing_in_another_order_of_axes_is_refused(export):
    logits = smooth_logits(3, (14, 13, 9), 3)
    words = r"would be on \(10, 33, 16\), they are on \(14, 13, 9\)"
    with pytest.raises(GridMismatchError, match=words):
        export(logits, (31, 38, 26), configuration_spacing=(2.5, 1.6, 1.65))


def test_labels_far_apart_are_kept_where_they_are_near_in_any_pieces(export, monkeypatch):
    """Each label is kept in few tiles, also across the planes that come together; nothing of the
    export is lost.
    """
    stored = (80, 34, 40)
    network = (40, 20, 30)
    centers = np.random.default_rng(5).uniform(2, np.array(network) - 2, (30, 3))
    distances = np.linalg.norm(
        np.moveaxis(np.indices(network), 0, -1)[None] - centers[:, None, None, None], axis=-1
    )
    logits = np.concatenate([np.zeros((1, *network)), 12.0 - 6.0 * distances]).astype(np.float32)
    expected = expected_export(logits, stored)
    refined = []
    for planes in (40, 8):
        monkeypatch.setattr(nnunet, "_PIECE_BYTES", 4 * planes * 20 * 30)
        assert (export(logits, stored, parameters=NO_CRF).label_map.transpose() == expected).all()
        refined.append(export(logits, stored, parameters="default").label_map)
    np.testing.assert_array_equal(*refined)
    assert 0 < np.count_nonzero(refined[0].transpose() != expected) < 0.05 * expected.size


def test_cubic_export_is_close_to_the_spline(export):
    """Labels of nnU-Net's order 3, but for a few voxels on borders: a quarter of those where linear
    ones differ.
    """
    logits = smooth_logits(5, (15, 17, 12), 3)
    stored = (31, 38, 26)
    expected = expected_export(logits, stored, order=3).transpose()
    linear, cubic = (
        np.mean(export(logits, stored, parameters=NO_CRF, resample=how).label_map != expected)
        for how in ("linear", "cubic")
    )
    assert cubic < 0.3 * linear
    with pytest.raises(ConfigError, match="expected one of linear, cubic"):
        export(logits, stored, resample="quintic")


@pytest.mark.parametrize(
    "parameters",
    [
        "default",
        NO_CRF.replace(**{"mean_field.bias": [0.0, 2.0, -2.0, 1.0], "mean_field.temperature": 3.0}),
    ],
)
def test_refined_as_the_dense_interpolation(parameters, export, tmp_path):
    """The CRF, or a recalibration alone, on tiles of interpolated logits is that on the whole
    interpolated array.
    """
    logits = smooth_logits(4, (15, 17, 14), 8, scale=40.0)
    stored = (30, 34, 28)
    result = export(logits, stored, parameters=parameters)
    image = np.asarray(nibabel.load(tmp_path / "image.nii.gz").dataobj)
    dense = np.stack([resized(channel, stored).transpose() for channel in logits])
    expected = refine(dense, image, spacing=SPACING, parameters=parameters, input_type="logits")
    assert np.mean(result.label_map != expected.label_map) < 1e-3
    assert np.abs(result.marginals - expected.marginals).mean() < 1e-4
    assert np.mean(result.label_map != result.network_label_map) > 1e-3


@pytest.mark.parametrize("height", [10.0, 300.0])
def test_the_networks_label_map_does_not_depend_on_the_crf(height, export):
    """Halfway between two labels a third one is the largest, although it is improbable at every
    voxel of the network.
    """
    logits = np.zeros((3, 5, 7, 6), np.float32)
    logits[0, ..., :3] = height
    logits[0, ..., 3:] = -height
    logits[1] = -logits[0]
    logits[2] = 0.6
    expected = expected_export(logits, (9, 13, 15))
    assert (expected == 2).any()
    for parameters in (NO_CRF, "default", "sharp"):
        found = export(logits, (9, 13, 15), parameters=parameters).network_label_map
        np.testing.assert_array_equal(found.transpose(), expected)


def swapping_logits(num_labels, shape, height, seed):
    """Blobs of labels whose logits are `height`, and those of all others its negative, with noise:
    steeper than any margin, and in tiles where most labels are improbable.
    """
    rng = np.random.default_rng(seed)
    fields = gaussian_filter(rng.normal(size=(num_labels, *shape)), [0, 2, 2, 2])
    is_label = np.arange(num_labels)[:, None, None, None] == fields.argmax(axis=0)
    logits = np.where(is_label, height, -height) + rng.normal(size=fields.shape)
    return logits.astype(np.float32)


@pytest.mark.parametrize("num_labels", [3, 40])
@pytest.mark.parametrize("height", [10.0, 12.0, 16.0, 20.0])
def test_labels_without_a_crf_are_the_largest_interpolated_logits(height, num_labels, export):
    logits = swapping_logits(num_labels, (14, 23, 25), height, 2)
    stored = (31, 38, 44)
    dense = np.stack([resized(channel.astype(np.float64), stored) for channel in logits])
    largest = np.partition(dense, -2, axis=0)
    is_clear = largest[-1] - largest[-2] > 1e-4  # above the rounding of float32
    found = export(logits, stored, parameters=NO_CRF)
    for labels in (found.label_map, found.network_label_map):
        np.testing.assert_array_equal(labels.transpose()[is_clear], dense.argmax(axis=0)[is_clear])


@pytest.mark.parametrize("preset", ["default", "sharp"])
@pytest.mark.parametrize(
    ("num_labels", "height", "is_cubic", "is_masked"),
    [(3, 12.0, False, False), (40, 20.0, False, True), (12, 16.0, True, True)],
    ids=["few", "many", "cubic"],
)
def test_streamed_logits_are_refined_as_in_memory(preset, num_labels, height, is_cubic, is_masked):
    """To the bit, wherever labels take part, and in any pieces."""
    coarse = (17, 24, 25)
    stored = (43, 38, 41)
    logits = swapping_logits(num_labels, coarse, height, 7)
    ratio = np.divide(coarse, stored)
    grid_map = GridMap(stored, coarse, np.diag(ratio), 0.5 * ratio - 0.5)
    interpolation = Interpolation(grid_map, is_cubic=is_cubic)
    dense = np.empty((num_labels, *stored), np.float32)
    for channel, target in zip(logits, dense, strict=True):
        interpolation.fill(channel, target)
    network_spacing = grid_map.source_spacing(SPACING)

    def read():
        for label, channel in enumerate(logits):
            for start in range(0, coarse[0], 5):
                planes = slice(start, min(start + 5, coarse[0]))
                yield Piece(slice(label, label + 1), planes, channel[None, planes])

    kind = "logits"
    stream = StreamedNetwork(
        read, num_labels, stored, kind, kind, Path(kind), interpolation, network_spacing
    )
    in_memory = dense.transpose(0, 3, 2, 1)
    rng = np.random.default_rng(0)
    mask = np.ones(stored, np.bool_)
    if is_masked:
        mask = gaussian_filter(rng.normal(size=stored), 4.0) > -0.05
    settings = {
        "spacing": SPACING,
        "parameters": as_parameters(preset),
        "mask": mask.transpose(),
        "backend": get_backend("cpu"),
    }
    image = rng.normal(100.0, 20.0, stored).astype(np.float32).transpose()
    streamed, dense_result = (
        refine_network(network, image, **settings)
        for network in (
            stream,
            ArrayNetwork(in_memory, "logits", None, network_spacing),
        )
    )
    assert (streamed.label_map != streamed.network_label_map).any()
    np.testing.assert_array_equal(streamed.label_map, dense_result.label_map)
    np.testing.assert_array_equal(streamed.network_label_map, dense_result.network_label_map)
    assert streamed.report.num_iterations == dense_result.report.num_iterations
    sets = streamed.channels.sets
    planes = slice(0, stored[0])
    for label in range(num_labels):
        takes_part = sets.grid.to_voxels(sets.domains[label] & sets.active) & mask
        one, other = (
            result.channels.channel(label, planes)[takes_part]
            for result in (streamed, dense_result)
        )
        np.testing.assert_array_equal(one, other)


STORED = (21, 26, 30)
LOGITS = smooth_logits(3, (11, 13, 15), 4)


def test_tensors_and_regions(export):
    torch = pytest.importorskip("torch")
    box = [(1, 21), (0, 26), (2, 30)]
    given = LOGITS.astype(np.float16), torch.from_numpy(LOGITS).half()
    np.testing.assert_array_equal(*(export(scores, STORED, box).label_map for scores in given))
    regions = {"whole": (1, 2, 3), "core": (2, 3), "cyst": (3,)}
    result = export(LOGITS, STORED, box, parameters=NO_CRF, regions=regions)
    dense = np.stack([resized(channel, (20, 26, 28)) for channel in LOGITS]) > 0
    expected = np.zeros(STORED, np.uint8)
    inner = expected[1:21, :, 2:30]
    for label, channel in enumerate(dense, start=1):
        inner[channel] = label
    assert np.mean(result.label_map.transpose() != expected) < 1e-4


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"spacing": None}, InputError, "spacing missing"),
        ({"shape_before_cropping": (21, 26, 31)}, GridMismatchError, "properties of this image"),
        (
            {"bbox_used_for_cropping": [[0, 20], [0, 26], [0, 30]]},
            GridMismatchError,
            "cropped from",
        ),
        (
            {"bbox_used_for_cropping": [[1, 22], [0, 26], [0, 30]]},
            GridMismatchError,
            "properties of this image",
        ),
        (
            {"spacing": [1.0, 1.4, 0.8]},
            GridMismatchError,
            "0.8 x 1.4 x 1 mm; the properties are of voxels of 1 x 1.4 x 0.8 mm",
        ),
        ({"spacing": [np.nan, 1.4, 0.8]}, InputError, "expected 3 positive distances"),
        (
            {"sitk_stuff": {"original_orientation": "LPS"}},
            GridMismatchError,
            "turned the image's axes",
        ),
    ],
)
def test_properties_that_do_not_fit(export, tmp_path, change, error, words):
    with pytest.raises(error, match=words):
        export(LOGITS, STORED, change=change)
    assert not (tmp_path / "out.nii.gz").exists()


def test_bad_arguments(export, tmp_path):
    with pytest.raises(ConfigError, match="transpose_forward"):
        export(LOGITS, STORED, transpose=(0, 1, 1))
    logits = LOGITS.copy()
    logits[1, 3, 4, 5] = np.nan
    with pytest.raises(InputError, match="not finite"):
        export(logits, STORED)
    for number in (0, 1):
        with pytest.raises(InputError, match="two labels at least"):
            export(LOGITS[:number], STORED)
    with pytest.raises(InputError, match="real numbers"):
        export(LOGITS + 1j, STORED)
    assert not (tmp_path / "out.nii.gz").exists()


def test_output_is_checked_before_the_work(export, tmp_path, monkeypatch):
    """The image is not replaced, and a file that cannot be written does not cost the run."""
    monkeypatch.setattr(nnunet, "refine_network", None)
    for name, words in (
        ("image.nii.gz", "would replace an input; choose another name or folder for the output"),
        ("out.png", "unknown file type"),
        ("image.nii.gz/a.nii", "Not a directory"),
    ):
        with pytest.raises(CrfRefineError, match=words):
            export(LOGITS, STORED, output=tmp_path / name)
    assert nibabel.load(tmp_path / "image.nii.gz").get_data_dtype() == np.float32


def test_padding_of_the_network_is_background(export):
    logits = (
        smooth_logits(3, (12, 10, 18), 6) + np.array([-30, 0, 0], np.float32)[:, None, None, None]
    )
    logits[:, :3] = -1e4
    result = export(logits, (24, 20, 36))
    labels = result.label_map.transpose()
    assert not labels[:5].any()
    assert labels[7:].all()
    assert result.num_padding_voxels == 5 * 20 * 36
