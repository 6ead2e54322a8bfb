"""Cases for the tests of tiles: labels in blobs, logits whose sharpness is chosen, and runs with
and without labels left out.
"""

from dataclasses import dataclass

import numpy as np
import pytest
from oracles import softmax
from scipy import ndimage

import crfrefine


@dataclass(frozen=True)
class TileCase:
    """Arrays of a case."""

    logits: np.ndarray
    image: np.ndarray
    spacing: tuple[float, ...]
    mask: np.ndarray | None = None
    input_type: str = "auto"


def make_case(
    seed,
    shape,
    num_labels,
    *,
    softness=1.5,
    margin=12.0,
    noise=0.5,
    num_modalities=1,
    with_mask=False,
    padding=0,
    half=False,
    probabilities=False,
):
    """A case with labels in blobs.

    The logits fall over `softness` voxels from one label to the next, from `margin` far inside;
    `padding` planes at the end of the last axis have equal logits; `half` rounds to float16; with
    `probabilities` the network's output is a softmax.
    """
    rng = np.random.default_rng(seed)
    labels = np.stack(
        [
            ndimage.gaussian_filter(rng.standard_normal(shape), 6.0, mode="nearest")
            for _ in range(num_labels)
        ]
    ).argmax(axis=0)
    image = np.stack(
        [100.0 * labels * (m + 1) % 290 + rng.normal(0, 15, shape) for m in range(num_modalities)]
    ).astype(np.float32)
    hot = (np.arange(num_labels).reshape(-1, *(1,) * len(shape)) == labels).astype(np.float64)
    if softness:
        hot = np.stack([ndimage.gaussian_filter(channel, softness) for channel in hot])
    logits = (margin * hot + rng.normal(0, noise, hot.shape)).astype(np.float32)
    if half:
        logits = logits.astype(np.float16).astype(np.float32)
    if probabilities:
        logits = softmax(logits).astype(np.float32)
    if padding:
        logits[..., -padding:] = 1.0 / num_labels if probabilities else 0.0
    mask = ndimage.gaussian_filter(rng.standard_normal(shape), 5.0) > -0.02 if with_mask else None
    if mask is not None:
        # Not in the padding: something must be left to refine.
        mask[(*(extent // 2 for extent in shape[:-1]), (shape[-1] - padding) // 2)] = True
    spacing = (1.0, 1.25, 0.8)[-len(shape) :]
    return TileCase(logits, image, spacing, mask, "probabilities" if probabilities else "logits")


def refine(case, parameters, threshold, **options):
    """Refine a case on tiles wherever labels may be left out, also where that saves nothing."""
    with pytest.MonkeyPatch.context() as patch:
        # As if tiles were always less work: direct sums where they may be, filters of the whole
        # volume else.
        def choose(problem, *_):
            return problem.spec.kernels.filter == "truncated"

        patch.setattr("crfrefine.refinement.tiles.planning.choose_tiles", choose)
        if threshold <= 0:
            patch.setattr("crfrefine.refinement.preparing.plan_array", lambda *_, **__: None)
        parameters = parameters.replace(**{"mean_field.label_threshold": threshold})
        settings = {
            "spacing": case.spacing,
            "mask": case.mask,
            "input_type": case.input_type,
            "parameters": parameters,
        }
        result = crfrefine.refine(case.logits, case.image, **settings, **options)
    if options.get("device", "cpu") == "cpu":
        assert (result.channels.sets is not None) == (threshold > 0)
    return result


def num_active(result):
    """Number of tiles that took part."""
    return 0 if result.channels.sets is None else len(result.channels.sets.tiles)


def domain(result, label):
    """(*tiles), where a label took part."""
    assert result.channels.sets is not None
    return result.channels.sets.domains[label]
