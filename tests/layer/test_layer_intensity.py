"""Percentiles of tensors: which voxels they are, bit by bit, and where their gradients go."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the layer needs PyTorch: pip install 'crfrefine[train]'")

from crfrefine.layer.intensity import normalize  # noqa: E402
from crfrefine.parameters.sections import IntensityParameters  # noqa: E402

NEEDS_GPU = pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a PyTorch for GPUs")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


def _selected(values: torch.Tensor, fraction: float) -> torch.Tensor:
    """The percentile from two selections, one after the other."""
    position = (values.numel() - 1) * fraction
    first = math.floor(position)
    start, end = (torch.kthvalue(values, rank + 1).values for rank in (first, min(first + 1, values.numel() - 1)))
    return start + (end - start) * (position - first)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("masked", "percentiles", "dtype"),
    [(False, (1.0, 99.0), torch.float32), (True, (7.3, 7.4), torch.float64), (True, (0.0, 100.0), torch.float32)],
)
def test_percentiles_are_those_of_single_selections(
    masked: bool, percentiles: tuple[float, float], dtype: torch.dtype, device: str
) -> None:
    """The same bits, and the same gradients: every value is there once, so each percentile has voxels of its own."""
    rng = np.random.default_rng(3)
    shape = (11, 8, 14)
    raw = np.stack([rng.permutation(math.prod(shape)).reshape(shape) * 0.37 + m for m in range(2)])
    mask = torch.tensor(rng.random(shape) < 0.7, device=device) if masked else None
    factor = torch.tensor(rng.normal(size=raw.shape), dtype=dtype, device=device)
    image = torch.tensor(raw, dtype=dtype, device=device, requires_grad=True)
    found = normalize(image, IntensityParameters(normalization="percentile", percentiles=percentiles), mask, dtype)
    (gradient,) = torch.autograd.grad((found * factor).sum(), image)
    channels = []
    for channel in image:
        low, high = (_selected(channel.flatten() if mask is None else channel[mask], percent / 100.0) for percent in percentiles)
        channels.append((channel - low) / (high - low))
    expected = torch.stack(channels)
    (wanted,) = torch.autograd.grad((expected * factor).sum(), image)
    np.testing.assert_array_equal(found.detach().cpu(), expected.detach().cpu())
    # Sums over all voxels, perhaps in another order.
    np.testing.assert_allclose(gradient.cpu(), wanted.cpu(), rtol=0, atol=1e-4 * float(wanted.abs().max()))
