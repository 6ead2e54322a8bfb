"""Voxels whose logits are equal for all labels, as where the output of a crop was padded: found, and without any part in the model."""

import dataclasses

import numpy as np
import pytest
from oracles import random_case

from crfrefine import ConfigError, CrfParameters, InputError, refine

# Strong enough that undecided voxels would take over from their neighbors, and wide enough to reach far into the padding.
STRONG = CrfParameters().replace(**{"bilateral.weight": 8.0, "bilateral.theta_alpha": 4.0, "bilateral.theta_beta": 0.5})


def padded_case(constant=0.0):
    """A case whose logits are padded on four of six sides, and at one voxel inside."""
    case = random_case(grid_shape=(11, 9, 7))
    padding = np.zeros(case.logits.shape[1:], bool)
    padding[:3] = padding[:, -2:] = padding[:, :, :1] = True
    padding[6, 3, 4] = True
    logits = case.logits.copy()
    logits[1, 8, 4, 5] = logits[0, 8, 4, 5]  # two equal labels of three are no padding
    logits[:, padding] = constant
    return dataclasses.replace(case, logits=logits), padding


@pytest.mark.parametrize(("constant", "filter_name"), [(0.0, "exact"), (-1000.0, "lattice"), (3.5, "truncated")])
def test_padding_neither_sends_nor_receives(backend, constant, filter_name):
    """The same bits as with a mask that leaves it out, and background in the padding, whatever its constant is."""
    case, padding = padded_case(constant)
    parameters = STRONG.replace(**{"mean_field.filter": filter_name, "spatial.weight": 1.0})
    arguments = {"spacing": case.spacing, "parameters": parameters.replace(**{"intensity.normalization": "none"}), "device": backend.name}
    result = refine(case.logits, case.image, **arguments)
    masked = refine(case.logits, case.image, mask=~padding, **arguments)
    np.testing.assert_array_equal(result.logits, masked.logits)
    assert not result.label_map[padding].any()
    assert result.num_padding_voxels == padding.sum()
    assert masked.num_padding_voxels == 0
    assert masked.notes == ()
    (note,) = result.notes
    assert f"{padding.sum()} of {padding.size} voxels" in note
    flooded = np.where(padding & (np.arange(3) == 0)[:, None, None, None], constant + 1e-3, case.logits).astype(np.float32)
    assert refine(flooded, case.image, **arguments).label_map[padding].any(), "what the rule is for: a hair of difference"


def test_padding_may_be_larger_than_any_logit(backend):
    """The lowest number of float32 stands for minus infinity in many programs; it is no logit that a temperature could make too large."""
    constant = np.finfo(np.float32).min
    case, padding = padded_case(constant)
    parameters = STRONG.replace(**{"mean_field.filter": "exact", "mean_field.temperature": 0.5})
    arguments = {"spacing": case.spacing, "parameters": parameters, "device": backend.name}
    result = refine(case.logits, case.image, **arguments)
    expected = refine(np.where(padding, np.float32(0), case.logits), case.image, **arguments)
    np.testing.assert_array_equal(result.logits, expected.logits)
    assert result.num_padding_voxels == padding.sum()
    assert (case.logits[:, padding] == np.float32(constant)).all()  # what the caller gave stays as it is
    inside = case.logits.copy()
    inside[0, ~padding] = constant
    with pytest.raises(ConfigError, match=r"mean_field\.temperature: .* turns logits up to"):
        refine(inside, case.image, **arguments)


def test_a_small_crop_of_a_large_scan_is_no_placeholder():
    """The crop around a gland may be less than a thousandth of a scan of the head."""
    rng = np.random.default_rng(0)
    logits = np.zeros((2, 120, 115, 105), np.float32)
    logits[:, 40:51, 50:60, 30:40] = rng.normal(size=(2, 11, 10, 10))
    result = refine(logits, rng.normal(size=logits.shape[1:]).astype(np.float32), spacing=1.0, parameters=STRONG)
    assert result.num_padding_voxels == logits[0].size - 1100
    logits[:, 40:42] = 0.0
    with pytest.raises(InputError, match="Is this a cropped output with mostly padding, or a placeholder file"):
        refine(logits, np.zeros(logits.shape[1:], np.float32), spacing=1.0)


def test_intensities_are_normalized_as_if_nothing_were_padded():
    """The padding is no property of the image: theta_beta keeps its meaning."""
    case, padding = padded_case()
    image = case.image.copy()
    image[:, padding] *= 50.0
    parameters = STRONG.replace(**{"mean_field.filter": "exact", "intensity.percentiles": (0.0, 100.0)})
    result = refine(case.logits, image, spacing=case.spacing, parameters=parameters)
    channels = [(channel - channel.min()) / (channel.max() - channel.min()) for channel in image.astype(np.float64)]
    by_hand = refine(
        case.logits,
        np.array(channels, np.float32),
        spacing=case.spacing,
        parameters=parameters.replace(**{"intensity.normalization": "none"}),
        mask=~padding,
    )
    # Normalized in float32 here and in float64 there.
    np.testing.assert_allclose(result.logits, by_hand.logits, atol=1e-4)
