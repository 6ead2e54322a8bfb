"""An offset of all intensities changes nothing, however large it is: only differences count."""

import numpy as np
import pytest

import crfrefine
from crfrefine import CrfParameters

SHAPE = (7, 10, 9)
SPACING = (1.0, 1.4, 0.8)
RANDOM = np.random.default_rng(5)
LOGITS = RANDOM.normal(0.0, 2.0, (3, *SHAPE)).astype(np.float32)
# Two channels with an edge each, in whole thousandths, which integers and floats hold.
EDGES = RANDOM.integers(-300, 300, (2, *SHAPE)) / 1000.0
EDGES[0, :, 5:] += 3.0
EDGES[1, :, :, 4:] += 3.0
MASK = RANDOM.random(SHAPE) < 0.8
OFFSETS = np.array([1e6, -3e9])[:, None, None, None]
UNKNOWN = -7e5  # outside the mask


@pytest.mark.parametrize("mask", [None, MASK], ids=["everywhere", "mask"])
@pytest.mark.parametrize("dtype", [np.float64, np.int64])
@pytest.mark.parametrize("filter_name", ["exact", "lattice"])
def test_refine_without_normalization(mask, dtype, filter_name):
    scale = 1000.0 if dtype == np.int64 else 1.0
    image = (EDGES + OFFSETS) * scale
    if mask is not None:
        image = np.where(mask, image, UNKNOWN)
    parameters = CrfParameters().replace(
        **{
            "intensity.normalization": "none",
            "bilateral.theta_beta": 0.5 * scale,
            "mean_field.filter": filter_name,
        }
    )
    options = {"spacing": SPACING, "parameters": parameters, "mask": mask}
    found = crfrefine.refine(
        LOGITS, np.rint(image).astype(dtype) if scale > 1 else image, **options
    )
    expected = crfrefine.refine(LOGITS, EDGES * scale, **options)
    # Rounding of features in units of the bandwidth is 1e-6, and of doubles on 3e9 as large.
    np.testing.assert_allclose(found.marginals, expected.marginals, atol=2e-5)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("mask", [None, MASK], ids=["everywhere", "mask"])
def test_bilateral_filter(mask, dtype):
    """The result is a float32, which on 1e6 and 3e9 is rounded to 0.06 and 256."""
    image = EDGES + OFFSETS
    smooth = crfrefine.bilateral_filter
    options = {"spacing": SPACING, "theta_alpha": 2.0, "theta_beta": 1.0, "mask": mask}
    expected = smooth(EDGES, **options)
    guided = smooth(EDGES, guide=image, **options)
    np.testing.assert_allclose(guided, expected, atol=1e-5)

    # The first offset leaves float32 some digits of the image.
    given = image[:1].astype(dtype)
    kept = given.copy()
    found = smooth(given, guide=EDGES, **options)
    np.testing.assert_array_equal(given, kept)
    expected = smooth(given - OFFSETS[0], guide=EDGES, **options)
    where = np.ones(SHAPE, bool) if mask is None else mask
    rounded = (expected[:, where] + OFFSETS[0].ravel()).astype(np.float32)
    np.testing.assert_allclose(found[:, where], rounded, atol=0.07)
    assert not found[:, ~where].any()
