"""Intensities of tensors are normalized by the same rules as those of arrays."""

import numpy as np
import pytest
import torch

from crfrefine.arrays.intensity import normalize_intensity, notes_on_intensity
from crfrefine.layer.intensity import normalize_batch
from crfrefine.parameters.sections import IntensityParameters

SHAPE = (2, 5, 7, 6)
RANDOM = np.random.default_rng(4)
IMAGE = RANDOM.normal(40.0, 12.0, SHAPE).astype(np.float32)
INSIDE = RANDOM.random(SHAPE[1:]) < 0.6
CONSTANT = np.where(INSIDE, np.float32(3.1), IMAGE)  # inside the mask
FEW = np.where(RANDOM.random(SHAPE) < 0.996, np.float32(0.0), IMAGE)  # The percentiles are equal.

KINDS = {
    "percentile": {},
    "percentiles at the ends": {"percentiles": (0.0, 100.0)},
    "percentiles per modality": {"percentiles": ((5.0, 80.0), (0.5, 99.5))},
    "zscore": {"normalization": "zscore"},
    "window": {"normalization": "window", "window": (20.0, 60.0)},
    "none": {"normalization": "none"},
    "several": {"normalization": ("zscore", "window"), "window": ((0.0, 1.0), (30.0, 55.0))},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [None, INSIDE], ids=["everywhere", "mask"])
@pytest.mark.parametrize(
    "image",
    [IMAGE, CONSTANT, FEW, IMAGE.astype(np.int16)],
    ids=["floats", "constant", "few", "int"],
)
def test_tensors_become_what_arrays_do(kind, mask, image):
    """By operations of PyTorch, as float64 always is. float32's rounding is amplified by a window
    of 20 at values up to 100.
    """
    parameters = IntensityParameters(**KINDS[kind])
    expected = normalize_intensity(image, parameters, mask)
    (found,) = normalize_batch(torch.from_numpy(image)[None], parameters, mask, torch.float64)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
@pytest.mark.parametrize("kind", ["percentile", "zscore", "none"])
def test_texture_on_a_large_offset_survives_in_tensors(dtype, kind):
    """Of types with more digits than float32, and where gradients are wanted, too."""
    parameters = IntensityParameters(normalization=kind)
    texture = torch.from_numpy(IMAGE.astype(np.int64))[None]
    expected = normalize_batch(texture.double(), parameters, INSIDE, torch.float64)
    image = (texture + 4_000_000_000).to(dtype)
    for wants_gradient in {False, dtype == torch.float64}:
        given = image.clone().requires_grad_(wants_gradient)
        found = normalize_batch(given, parameters, INSIDE, torch.float32)
        offset = 0.0
        if kind == "none":  # Only differences count.
            offset = (found - expected)[..., :1, :1, :1]
            assert offset.abs().min() > 10.0
        torch.testing.assert_close(found.double(), expected + offset, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("kind", ["percentile", "zscore"])
def test_a_constant_modality_is_zero_and_has_no_gradient(kind):
    image = torch.from_numpy(CONSTANT)[None].requires_grad_()
    found = normalize_batch(image, IntensityParameters(normalization=kind), INSIDE, torch.float32)
    assert not found.any()
    found.sum().backward()
    assert not image.grad.any()


def ct_with(fill, share=0.2):
    """Intensities of CT, of which a share is outside of the field of view."""
    shape = (1, 17, 19, 23)
    tissue = np.where(RANDOM.random(shape) < 0.4, -1000.0, 40.0) + RANDOM.normal(0, 30, shape)
    values = tissue.clip(-1024, 900).round().astype(np.int16)
    return np.where(RANDOM.random(shape) < share, np.int16(fill), values)


@pytest.mark.parametrize("fill", [-3024, -2000, -32768])
def test_the_outside_of_a_field_of_view_is_left_out_of_percentiles(fill):
    image = ct_with(fill)
    parameters = IntensityParameters(percentiles=(0.5, 99.5))
    found = normalize_intensity(image, parameters)
    np.testing.assert_array_equal(
        found, normalize_intensity(image, parameters, image[0] != fill), strict=True
    )
    (note,) = notes_on_intensity(image, parameters)
    assert note.values["fill"] == fill
    assert note.values["next"] == image[image != fill].min()
    tensor = torch.from_numpy(image.astype(np.float64))[None].requires_grad_()
    (by_tensors,) = normalize_batch(tensor, parameters, None, torch.float64)
    np.testing.assert_allclose(by_tensors.detach().numpy(), found, rtol=1e-6, atol=2e-6)


def test_ordinary_images_have_no_fill():
    """MR on 0, CT with air at -1024, few voxels of -3024, and intensities around a mean of 0."""
    magnitude = np.abs(RANDOM.normal(300, 80, (1, 17, 19, 23))).astype(np.float32)
    magnitude[RANDOM.random(magnitude.shape) < 0.6] = 0
    scaled = (magnitude - magnitude.mean()) / magnitude.std()
    few = ct_with(-3024, share=0.004)
    for image in (magnitude, scaled, ct_with(-1024), few, np.full_like(few, -5)):
        assert notes_on_intensity(image, IntensityParameters()) == ()
        values = image.reshape(-1).astype(np.float64)
        low, high = np.percentile(values, (1, 99))
        if high > low:
            found = normalize_intensity(image, IntensityParameters())
            np.testing.assert_allclose(found, (image - low) / (high - low), atol=1e-4)
            tensor = torch.from_numpy(image.astype(np.float64))[None]
            (by_tensors,) = normalize_batch(tensor, IntensityParameters(), None, torch.float64)
            np.testing.assert_allclose(by_tensors, (image - low) / (high - low), atol=1e-6)
