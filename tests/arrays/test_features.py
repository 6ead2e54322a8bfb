"""Intensity normalization: against numpy's own statistics, on odd layouts, and on images that have
no spread.
"""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from crfrefine.arrays.intensity import (
    count_fill,
    normalize_intensity,
    notes_on_intensity,
    percentile_ranks,
)
from crfrefine.errors import ConfigError
from crfrefine.parameters.sections import IntensityParameters

SHAPE = (7, 5, 9)


def _image(num_modalities=2):
    rng = np.random.default_rng(0)
    scale = np.array([300.0, 5.0, 1e-3])[:num_modalities, None, None, None]
    return (scale * rng.gamma(2.0, size=(num_modalities, *SHAPE))).astype(np.float32)


def _mask():
    return np.random.default_rng(1).random(SHAPE) < 0.4


@pytest.mark.parametrize("kind", ["percentile", "zscore"])
def test_statistics_are_taken_inside_the_mask(kind):
    """What stands outside changes nothing inside, and is mapped like the rest."""
    image = _image()
    mask = _mask()
    soiled = np.where(mask, image, np.float32(1e7))
    parameters = IntensityParameters(normalization=kind)
    clean = normalize_intensity(image, parameters, mask)
    dirty = normalize_intensity(soiled, parameters, mask)
    np.testing.assert_array_equal(dirty[:, mask], clean[:, mask])
    inside = clean[:, mask].astype(np.float64)
    if kind == "zscore":  # by the population's standard deviation
        np.testing.assert_allclose(inside.mean(axis=1), 0.0, atol=1e-5)
        np.testing.assert_allclose(inside.std(axis=1), 1.0, rtol=1e-5)
    else:
        np.testing.assert_allclose(
            np.percentile(inside, [1.0, 99.0], axis=1), [[0.0, 0.0], [1.0, 1.0]], atol=1e-5
        )


def test_each_modality_may_have_its_own_normalization():
    """A window in Hounsfield units, which are clipped, beside MRI."""
    image = _image()
    parameters = IntensityParameters(normalization=("window", "zscore"), window=(160.0, 640.0))
    result = normalize_intensity(image, parameters)
    np.testing.assert_allclose(
        result[0], np.clip((image[0] - 160.0) / 480.0, 0.0, 1.0), rtol=1e-5, atol=1e-6
    )
    assert abs(float(result[1].mean())) < 1e-5
    with pytest.raises(
        ConfigError,
        match=r"intensity\.normalization: it has 2 values, but the case has 3 modalities",
    ):
        normalize_intensity(_image(3), parameters)


def test_a_window_that_does_not_fit_is_noted():
    """It clips nearly all voxels inside the mask, or it begins below 0 and the image does not: but
    for ripples, as in MRI.
    """
    ct = np.linspace(-1000.0, 1000.0, 7 * 5 * 9, dtype=np.float32).reshape(1, *SHAPE)
    inside = ct[0] > 900.0
    soft, wide, positive = (
        IntensityParameters(normalization="window", window=window)
        for window in ((-160.0, 240.0), (-1000.0, 1000.0), (100.0, 900.0))
    )
    for fitting, mask in ((soft, None), (wide, None), (wide, inside)):
        assert notes_on_intensity(ct, fitting, mask) == ()
    (note,) = notes_on_intensity(ct, soft, inside)
    found = (
        "modality 0: it is [-160, 240], and the image has values from -1000 to 1000: "
        "100% of the voxels are outside"
    )
    assert found in str(note)
    for mri in (np.abs(ct), np.where(ct < 0, ct / 20, ct)):
        (note,) = notes_on_intensity(np.concatenate([ct, mri]), wide)
        assert "modality 1: it is [-1000, 1000]" in str(note)
        assert "hardly any value is below 0" in str(note)
        assert notes_on_intensity(mri, positive) == ()
        assert notes_on_intensity(mri, IntensityParameters()) == ()


@pytest.mark.parametrize("kind", ["percentile", "zscore"])
@pytest.mark.parametrize("value", [0.0, 0.1, 3e38])
def test_a_constant_image_becomes_zero(kind, value):
    """A constant image is valid: no edges anywhere. No warning either. The spread outside of a mask
    is not the spread inside.
    """
    image = np.full((2, *SHAPE), value, dtype=np.float32)
    image[1] = _image(1)
    for mask in (None, _mask()):
        result = normalize_intensity(image, IntensityParameters(normalization=kind), mask)
        assert not result[0].any()
        assert result[1].any()
    inside = np.where(_mask(), np.float32(value), _image(1))
    assert not normalize_intensity(inside, IntensityParameters(normalization=kind), _mask())[
        :, _mask()
    ].any()
    tiny = np.linspace(0.0, 1e-40, 60, dtype=np.float32).reshape(
        1, 3, 4, 5
    )  # Its inverse is infinite in float32.
    assert not normalize_intensity(tiny, IntensityParameters(normalization=kind)).any()


def test_an_image_with_few_values_that_differ_keeps_them():
    """Both percentiles are 0, but there is something to see: the range takes their place."""
    image = np.zeros((1, 20, 30), dtype=np.float32)
    image[0, 3, 4] = 7.0
    result = normalize_intensity(image, IntensityParameters())
    assert result[0, 3, 4] == 1.0
    assert np.count_nonzero(result) == 1


@given(
    arrays(
        np.float32,
        st.integers(1, 400),
        elements=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-1e4, 1e4, width=32)),
    ),
    st.floats(0.0, 49.0),
    st.floats(51.0, 100.0),
)
@settings(deadline=None)
def test_percentiles_are_numpys_for_any_values(values, low, high):
    """Ties, few values, extreme percentiles: the same order statistics, the same interpolation."""
    assume(not count_fill(np.sort(values), (low, high)))  # It is no part of the image.
    start, end = np.percentile(values.astype(np.float64), [low, high])
    result = normalize_intensity(values[None], IntensityParameters(percentiles=(low, high)))
    if end - start > 1e-3:
        # float32 values of 1e4 over a spread of at least 1e-3.
        np.testing.assert_allclose(result[0] * (end - start) + start, values, atol=2e-2)


def test_the_lower_of_two_values_is_no_fill():
    """Nothing tells the outside of a field of view from half of a binary image."""
    values = np.repeat(np.array([-1.0, 0.0], np.float32), (30, 45))
    assert count_fill(values, (1.0, 99.0)) == 0
    outside = np.full(30, -3024.0)
    assert count_fill(np.append(outside, np.arange(60.0)), (1.0, 99.0)) == 30


def test_percentiles_beside_a_fill_are_those_of_the_other_values():
    """To the bit: ranks beyond the fill must not cost their shares digits."""
    others = np.sort(np.random.default_rng(3).normal(40.0, 12.0, 777))
    ranks = percentile_ranks(np.append(np.full(5000, -3024.0), others), (1.0, 99.0))
    alone = percentile_ranks(others, (1.0, 99.0))
    assert ranks == [(below + 5000, above + 5000, share) for below, above, share in alone]


@pytest.mark.parametrize("dtype", [np.float64, np.uint32])
def test_texture_on_a_large_offset_survives(dtype):
    """Types with more digits than float32 are not cut before the offset is off; float32's rounding
    of a range of 1, hence 1e-6.
    """
    rng = np.random.default_rng(2)
    texture = rng.integers(0, 3000, (1, 6, 9, 7))
    offset = 4_000_000_000
    parameters = IntensityParameters(normalization="percentile")
    shifted = normalize_intensity((texture + offset).astype(dtype), parameters)
    np.testing.assert_allclose(
        shifted, normalize_intensity(texture.astype(np.float32), parameters), atol=1e-6
    )


def test_without_normalization_only_a_large_offset_is_taken_off():
    """Bits of other images stay, also where their values outside the mask are far away."""
    rng = np.random.default_rng(3)
    image = rng.normal(40.0, 12.0, (2, *SHAPE))
    air = image.copy()
    air[:, :4] = 0.0
    parameters = IntensityParameters("none")
    for plain in (image, air, image.astype(np.int32), image + 100.0, np.zeros_like(image)):
        found = normalize_intensity(plain, parameters)
        np.testing.assert_array_equal(found, plain.astype(np.float32))

    mask = _mask()
    offsets = np.array([5e7, -3e9])[:, None, None, None]
    shifted = np.where(mask, image + offsets, -1e5)
    for dtype, scale in ((np.float64, 1.0), (np.int64, 1e3)):
        found = normalize_intensity((shifted * scale).astype(dtype), parameters, mask)
        found = (found / scale)[:, mask]
        expected = image[:, mask]
        found -= (found - expected)[:, :1]
        # Of differences up to 100 float32 keeps 4e-6, and whole thousandths 1e-3.
        np.testing.assert_allclose(found, expected, atol=1e-5 if scale == 1.0 else 2e-3)
    # A few voxels of another kind, such as air, do not hide the offset.
    shifted[:, 0, 0] = 0.0
    found = normalize_intensity(shifted, parameters, mask)[:, mask][:, -1:]
    assert (np.abs(found) < 200.0).all()
