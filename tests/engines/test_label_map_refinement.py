"""`refine` on label maps: the same as on one-hot logits of the labels that occur."""

import numpy as np
import pytest

import crfrefine
from crfrefine.arrays.one_hot import CONFIDENCE
from crfrefine.errors import InputError

SHAPE = (9, 7, 6)
SPACING = (1.0, 1.3, 2.2)
PARAMETERS = crfrefine.CrfParameters().replace(**{"bilateral.theta_alpha": 2.0, "bilateral.theta_beta": 0.1})


@pytest.fixture
def image():
    rng = np.random.default_rng(0)
    values = np.zeros(SHAPE)
    values[2:7, 1:6, 1:5] = 100.0
    values[2:5, 1:4, 1:3] = 200.0
    return values + rng.normal(0, 2, SHAPE)


@pytest.fixture
def labels(image):
    """Labels 10 and 52 with some wrong voxels."""
    found = np.where(image > 150, 52, np.where(image > 50, 10, 0))
    found[4, 2, 2] = 0
    found[0, 0, 0] = 52
    return found


def one_hot(labels, numbers):
    return (CONFIDENCE * np.stack([labels == number for number in numbers])).astype(np.float32)


def refined(labels, image, **options):
    return crfrefine.refine(labels, image, spacing=SPACING, **{"parameters": PARAMETERS, "input_type": "labels", **options})


@pytest.mark.parametrize(("dtype", "order"), [(np.uint8, "F"), (np.float64, "C")])
def test_a_label_map_is_one_hot_logits(labels, image, dtype, order):
    found = refined(np.array(labels, dtype, order=order), image)
    plain = refined(one_hot(labels, (0, 10, 52)), image, input_type="logits")
    np.testing.assert_array_equal(found.label_map, np.array([0, 10, 52])[plain.label_map])
    np.testing.assert_array_equal(found.network_label_map, labels)
    np.testing.assert_allclose(found.marginals, plain.marginals, atol=1e-6)  # Rounding differs with the order of voxels in memory.
    assert found.label_map[4, 2, 2] == 52, "the surroundings outvote a wrong voxel"
    assert (found.channel_labels, found.num_labels, len(found.logits)) == ((0, 10, 52), 53, 3)
    assert found.label_map.dtype == np.uint8
    assert found.changes.voxels_before[10] == (labels == 10).sum()
    assert found.num_padding_voxels == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels: labels - 1, r"holds values from -1 to 51; expected labels from 0 to 65535"),
        (lambda labels: labels + 0.5, "values that are not whole numbers; for logits or probabilities, leave input_type"),
        (lambda labels: np.where(labels == 10, np.nan, labels), "not finite"),
        (lambda labels: labels[1:], r"label map has shape \(8, 7, 6\) and the image \(9, 7, 6\)"),
    ],
)
def test_what_is_no_label_map_is_refused(labels, image, change, message):
    with pytest.raises(InputError, match=message):
        refined(change(labels), image)


def test_more_labels_than_the_parameters_have_values_for(labels, image):
    with pytest.raises(InputError, match="labels up to 52, but the parameters have values for 3 labels"):
        refined(labels, image, parameters=PARAMETERS.replace(**{"bilateral.weight": [1.0, 2.0, 3.0]}))


def test_a_label_map_in_place_of_logits_names_the_input_type(labels, image):
    with pytest.raises(InputError, match=r'to refine a label map .*, give input_type="labels"'):
        refined(labels.astype(np.float64), image, input_type="auto")


@pytest.mark.parametrize(("device", "changes"), [("cpu", {}), ("cpu", {"mean_field.label_threshold": 0.0}), ("torch", {})])
def test_a_kernel_may_be_far_wider_than_the_grid(changes, device):
    """From a thousand times the grid on all its weights are 1 to single precision: nothing depends on its width, nor does the memory."""
    rng = np.random.default_rng(0)
    labels, image = rng.integers(0, 20, (3, 17, 2)), rng.normal(size=(3, 17, 2))

    def marginals(theta):
        wide = {"spatial.theta_gamma": theta, "spatial.weight": 1.0, **changes}
        return refined(labels, image, parameters=PARAMETERS.replace(**wide), device=device).marginals

    np.testing.assert_allclose(marginals(1e9), marginals(1e5), atol=1e-6)
