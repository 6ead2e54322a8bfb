"""Are they logits or probabilities: what is taken, what is refused, and the way from one to the
other.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from oracles import random_case

import crfrefine
from crfrefine import CrfParameters, refine
from crfrefine.arrays import probabilities
from crfrefine.arrays.probabilities import identify_array, look_at
from crfrefine.arrays.softmax import clip_overshoot, take_logarithms
from crfrefine.errors import ConfigError, InputError

PATH = Path("logits/case.npz")


def identify(values, *how):
    """What the channels of a file are."""
    return probabilities.identify(look_at(values), *how)


def softmax(shape=(3, 6, 5, 4), dtype=np.float32):
    """(L, z, y, x), confident here and there."""
    logits = 4 * np.random.default_rng(1).standard_normal(shape)
    exponentials = np.exp(logits - logits.max(axis=0))
    return (exponentials / exponentials.sum(axis=0)).astype(dtype).astype(np.float32)


@pytest.mark.parametrize(("kind", "dtype"), [(None, np.float16), ("probabilities", np.float32)])
def test_a_distribution_at_each_voxel_becomes_its_logarithm(kind, dtype):
    """float16 sums to 1 within a few times its 2^-11."""
    values = softmax(dtype=dtype)
    expected = np.log(np.clip(values, np.float32(1e-7), 1))
    found, note = identify(values, "auto", kind, PATH)
    take_logarithms(values)
    assert found == "probabilities"
    assert (
        str(note)
        == "case.npz is taken as probabilities: all values lie in [0, 1] and sum to 1 at each voxel"
    )
    np.testing.assert_array_equal(values, expected)


def test_exact_zeros_do_not_become_hard_constraints():
    """Outside of its crop nnU-Net writes background 1 and the rest 0: finite logits."""
    values = np.zeros((3, 6, 5, 4), np.float32)
    values[0] = 1
    assert identify(values, "auto", None, PATH)[0] == "probabilities"
    take_logarithms(values)
    np.testing.assert_array_equal(values[0], 0)
    np.testing.assert_allclose(values[1:], np.log(1e-7), rtol=1e-6)
    values = softmax((2, 41, 59, 67))  # more than a block
    expected = np.log(np.clip(values, np.float32(1e-7), 1))
    take_logarithms(values)
    np.testing.assert_array_equal(values, expected)


def test_eight_bit_probabilities_are_taken_on_the_users_word():
    values = np.rint(softmax() * 255).astype(np.float32) / 255
    values[:, 0, 0, 0] = (0.5, 0.3, 0.196)
    message = (
        r"do not sum to 1 over the labels at \d+ of 120 voxels; the first .* a sum of "
        r"(0\.99|1).*\n.* need --input-type probabilities"
    )
    with pytest.raises(InputError, match=message):
        identify(values, "auto", None, PATH)
    found, note = identify(values, "probabilities", None, PATH)
    assert found == "probabilities"
    assert str(note) == "case.npz is taken as probabilities: requested"


@pytest.mark.parametrize(
    ("input_type", "kind"),
    [("auto", None), ("auto", "logits"), ("auto", "probabilities"), ("probabilities", None)],
)
@pytest.mark.parametrize("total", [100.0, 255.0, 1.01])
def test_probabilities_with_another_sum_are_refused(total, input_type, kind):
    """Padding does not count; one voxel with another sum, or one negative value, makes logits of
    them.
    """
    values = (total * softmax()).astype(np.float32)
    values[:, 1, 1, 1] = 0.0
    values[:, 2, 2, 2] = (total, 0.0, 0.0)
    values[:, 3, 3, 3] = -7.0
    with pytest.raises(
        InputError,
        match=rf"the labels sum to {total:g} at each voxel.*\n.*give --input-type logits",
    ):
        identify(values, input_type, kind, PATH)
    with pytest.raises(InputError, match=rf"the labels sum to {total:g} at each voxel"):
        identify_array(values, input_type)
    assert identify(values, "logits", None, PATH)[0] == "logits"
    for odd in (1.2 * total, -0.5):
        values[1, 0, 0, 0] = odd
        if input_type == "auto" and kind != "probabilities":
            assert (
                identify(values, input_type, kind, PATH)[0]
                == identify_array(values, input_type)[0]
                == "logits"
            )


def test_voxels_with_next_to_no_probability_are_counted_and_located():
    """One of them turned a whole volume into NaN in a known library."""
    values = softmax()
    values[:, 2, 1, 3] = (0, 1e-5, 0)
    values[:, 4, 0, 0] = (0, 0, 1e-6)
    with pytest.raises(
        InputError,
        match=r"at 2 of 120 voxels; the first one is voxel \(3, 1, 2\) with a sum of 1e-05",
    ):
        identify(values, "auto", None, PATH)
    with pytest.raises(
        ConfigError,
        match="input type 'softmax': expected one of auto, logits, probabilities, labels",
    ):
        crfrefine.refine(softmax(), softmax()[0], input_type="softmax")


@pytest.mark.parametrize(
    ("input_type", "kind"), [("probabilities", None), ("auto", "probabilities")]
)
def test_negative_probabilities_are_refused(input_type, kind):
    values = softmax()
    values[1, 2, 3, 1] = -0.25
    message = r"between 0 and 1, found -0\.25 for label 1 at voxel \(1, 3, 2\)"
    with pytest.raises(InputError, match=f"expected probabilities {message}"):
        identify(values, input_type, kind, PATH)


def overshooting():
    """(3, z, y, x) as cubic interpolation leaves it: here and there outside [0, 1], sums of 1."""
    values = softmax()
    values[0] += np.float32(0.06) * np.sign(values[0] - np.float32(0.5))
    values[2] = 1 - values[0] - values[1]
    values[:, 1, 1, 1] = (1.09, -0.05, -0.04)
    return values


@pytest.mark.parametrize(
    ("input_type", "kind"),
    [("auto", None), ("auto", "probabilities"), ("probabilities", None)],
)
def test_probabilities_with_overshoot_are_clipped(input_type, kind):
    values = overshooting()
    values[:, 2, 2, 2] = 0.0  # padding does not count
    found, note = identify(values, input_type, kind, PATH)
    assert found == "probabilities"
    assert "sum to 1 at each voxel; values outside [0, 1], as after cubic interpolation" in str(
        note
    )
    expected = np.clip(values.astype(np.float64), 0, 1)
    expected /= np.where(values.any(axis=0), expected.sum(axis=0), 1)
    clip_overshoot(values)
    # Divided in float32 here and in float64 there.
    np.testing.assert_allclose(values, expected, atol=1e-6)


def test_the_sum_of_every_voxel_tells_overshoot_from_logits():
    """Logits of any range do not sum to 1 everywhere; those far below 0 are logits all the same."""
    odd = overshooting()
    odd[1, 4, 3, 2] += 0.02
    far = np.stack([softmax()[0] - 5, 6 - softmax()[0]])
    for values in (odd, far):
        assert identify(values, "auto", None, PATH)[0] == "logits"
        assert identify_array(values, "auto")[0] == "logits"
    assert identify(overshooting(), "logits", None, PATH)[0] == "logits"
    assert identify(overshooting(), "auto", "logits", PATH)[0] == "logits"
    with pytest.raises(InputError, match="expected probabilities between 0 and 1"):
        identify(odd, "probabilities", None, PATH)


def test_overshoot_is_refined_as_the_distribution_that_it_was(backend):
    values = overshooting()
    image = np.random.default_rng(2).normal(100, 20, values.shape[1:]).astype(np.float32)
    options = {"spacing": (1.0, 1.5, 2.25), "device": backend.name, "input_type": "probabilities"}
    parameters = CrfParameters().replace(**{"mean_field.filter": "exact"})
    found = refine(values, image, parameters=parameters, **options)
    assert any("outside [0, 1]" in note for note in map(str, found.notes))
    clipped = values.copy()
    clip_overshoot(clipped)
    expected = refine(clipped, image, parameters=parameters, **options)
    assert expected.notes == ()
    # The logarithm of a sum is added to all labels: rounding of logits up to 16.
    np.testing.assert_allclose(found.marginals, expected.marginals, atol=1e-5)
    with pytest.raises(InputError, match=r'lie outside \[0, 1\](?s:.*)input_type="probabilities"'):
        refine(values, image, spacing=options["spacing"])


@pytest.mark.parametrize("pair", [(6.0, 0.0), (0.0, 2.5), (1.5, 3.0)])
def test_the_same_logits_at_every_voxel_are_logits(pair):
    """Equal values have equal sums whatever they are; percent is a sum of 100."""
    values = np.empty((2, 6, 5, 4), np.float32)
    values[0], values[1] = pair
    values[:, 0, 0, 0] = 0.0  # padding
    assert identify(values, "auto", None, PATH)[0] == identify_array(values, "auto")[0] == "logits"
    swapped = values.copy()
    swapped[:, 2:4] = values[::-1, 2:4]  # as of a label map
    assert (
        identify(swapped, "auto", None, PATH)[0] == identify_array(swapped, "auto")[0] == "logits"
    )
    for total in (100, 255, 65535):
        scaled = values * (total / sum(pair))
        with pytest.raises(InputError, match=f"the labels sum to {total:g} at each voxel"):
            identify(scaled.astype(np.float32), "auto", None, PATH)


def test_scaled_probabilities_that_vary_are_refused_whatever_their_sum():
    with pytest.raises(InputError, match="the labels sum to 6 at each voxel"):
        identify((6 * softmax()).astype(np.float32), "auto", None, PATH)


def test_a_missing_background_is_said_first():
    """Sums of at most 1, clearly less at many voxels: not those of rounding, of a few odd voxels or
    of sigmoids.
    """
    values = softmax()
    for foreground in (values[1:], 0.2 * values):
        with pytest.raises(InputError) as caught:
            identify(foreground.astype(np.float32), "auto", None, PATH)
        first, *lines = str(caught.value).split("\n")
        assert first.startswith("logits/case.npz: the background seems to be missing")
        assert "-p BACKGROUND" in lines[0]
        assert "--add-background" in "".join(lines)
    floored = np.floor(values * 255).astype(np.float32) / 255
    few = values.copy()
    few[:, 0, 0, :3] *= 0.5
    sigmoids = np.random.default_rng(3).random((3, 6, 5, 4), np.float32)
    for others in (floored, few, sigmoids):
        assert not look_at(others).lacks_background
        with pytest.raises(InputError, match=r"case\.npz: all values lie in \[0, 1\] but do not"):
            identify(others, "auto", None, PATH)


def test_a_sum_that_is_nearly_one_is_shown_with_enough_digits():
    values = softmax()
    values[:, 3, 2, 1] = (0.5, 0.3, 0.2012)
    with pytest.raises(InputError, match=r"voxel \(1, 2, 3\) with a sum of 1\.0012"):
        identify(values, "auto", None, PATH)


# Strong enough that undecided voxels would take over from their neighbors, and wide enough to reach
# far into the padding.
STRONG = CrfParameters().replace(
    **{"bilateral.weight": 8.0, "bilateral.theta_alpha": 4.0, "bilateral.theta_beta": 0.5}
)


def padded_case(constant=0.0):
    """A case whose logits are padded on four of six sides, with a tie at one voxel inside."""
    case = random_case(grid_shape=(11, 9, 7))
    padding = np.zeros(case.logits.shape[1:], bool)
    padding[:3] = padding[:, -2:] = padding[:, :, :1] = True
    logits = case.logits.copy()
    logits[1, 8, 4, 5] = logits[0, 8, 4, 5]  # two equal labels of three are no padding
    logits[:, 6, 3, 4] = 0.25  # a single tie is no padding
    logits[:, padding] = constant
    return dataclasses.replace(case, logits=logits), padding


@pytest.mark.parametrize(
    ("constant", "filter_name"), [(0.0, "exact"), (-1000.0, "lattice"), (3.5, "truncated")]
)
def test_padding_neither_sends_nor_receives(backend, constant, filter_name):
    """The same bits as with a mask that leaves it out, and background in the padding, whatever its
    constant is.
    """
    case, padding = padded_case(constant)
    parameters = STRONG.replace(**{"mean_field.filter": filter_name, "spatial.weight": 1.0})
    arguments = {
        "spacing": case.spacing,
        "parameters": parameters.replace(**{"intensity.normalization": "none"}),
        "device": backend.name,
    }
    result = refine(case.logits, case.image, **arguments)
    masked = refine(case.logits, case.image, mask=~padding, **arguments)
    np.testing.assert_array_equal(result.logits, masked.logits)
    assert not result.label_map[padding].any()
    assert result.num_padding_voxels == padding.sum()
    assert masked.num_padding_voxels == 0
    assert masked.notes == ()
    (note,) = map(str, result.notes)
    assert f"{padding.sum()} of {padding.size} voxels" in note
    flooded = np.where(
        padding & (np.arange(3) == 0)[:, None, None, None], constant + 1e-3, case.logits
    ).astype(np.float32)
    assert refine(flooded, case.image, **arguments).label_map[padding].any(), (
        "what the rule is for: a hair of difference"
    )


def test_padding_may_be_larger_than_any_logit(backend):
    """The lowest number of float32 stands for minus infinity in many programs; it is no logit that
    a temperature could make too large.
    """
    constant = np.finfo(np.float32).min
    case, padding = padded_case(constant)
    parameters = STRONG.replace(**{"mean_field.filter": "exact", "mean_field.temperature": 0.5})
    arguments = {"spacing": case.spacing, "parameters": parameters, "device": backend.name}
    result = refine(case.logits, case.image, **arguments)
    expected = refine(np.where(padding, np.float32(0), case.logits), case.image, **arguments)
    np.testing.assert_array_equal(result.logits, expected.logits)
    assert result.num_padding_voxels == padding.sum()
    assert (
        case.logits[:, padding] == np.float32(constant)
    ).all()  # what the caller gave stays as it is
    inside = case.logits.copy()
    inside[0, ~padding] = constant
    with pytest.raises(ConfigError, match=r"mean_field\.temperature: .* turns logits up to"):
        refine(inside, case.image, **arguments)


def test_a_small_crop_of_a_large_scan_is_no_placeholder():
    """The crop around a gland may be less than a thousandth of a scan of the head."""
    rng = np.random.default_rng(0)
    logits = np.zeros((2, 120, 115, 105), np.float32)
    logits[:, 40:51, 50:60, 30:40] = rng.normal(size=(2, 11, 10, 10))
    result = refine(
        logits, rng.normal(size=logits.shape[1:]).astype(np.float32), spacing=1.0, parameters=STRONG
    )
    assert result.num_padding_voxels == logits[0].size - 1100
    logits[:, 40:42] = 0.0
    with pytest.raises(
        InputError, match="Is this a cropped output with mostly padding, or a placeholder file"
    ):
        refine(logits, np.zeros(logits.shape[1:], np.float32), spacing=1.0)


def test_intensities_are_normalized_as_if_nothing_were_padded():
    """The padding is no property of the image: theta_beta keeps its meaning."""
    case, padding = padded_case()
    image = case.image.copy()
    image[:, padding] *= 50.0
    parameters = STRONG.replace(
        **{"mean_field.filter": "exact", "intensity.percentiles": (0.0, 100.0)}
    )
    result = refine(case.logits, image, spacing=case.spacing, parameters=parameters)
    channels = [
        (channel - channel.min()) / (channel.max() - channel.min())
        for channel in image.astype(np.float64)
    ]
    by_hand = refine(
        case.logits,
        np.array(channels, np.float32),
        spacing=case.spacing,
        parameters=parameters.replace(**{"intensity.normalization": "none"}),
        mask=~padding,
    )
    # Normalized in float32 here and in float64 there.
    np.testing.assert_allclose(result.logits, by_hand.logits, atol=1e-4)


def test_channels_whose_sum_is_no_number_give_no_warning():
    """Warnings are errors of tests."""
    values = np.full((3, 4, 3, 2), 3e38, np.float32)
    values[0, 0, 0, 0] = 2e38
    assert np.isinf(look_at(values).sums).all()
