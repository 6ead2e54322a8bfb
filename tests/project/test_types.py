"""What works is accepted by type checkers: mypy reads this file with the package (`make lint`), and
here it runs.

An expected complaint is an ignored one: mypy complains, too, if there is nothing to ignore.
"""

from typing import assert_type

import numpy as np
import pytest
from numpy.typing import NDArray

import crfrefine

pytest.importorskip("torch", reason="the layer needs PyTorch: pip install 'crfrefine[train]'")

import torch

GRID = (6, 5, 7)
LOGITS = np.random.default_rng(0).normal(size=(3, *GRID)).astype(np.float32)
IMAGE = np.random.default_rng(1).normal(size=(2, *GRID))


def test_arrays_tensors_lists_and_numbers_are_accepted_by_refine() -> None:
    spacing = np.array([1.0, 1.5, 2.0])
    result = crfrefine.refine(LOGITS, IMAGE, spacing=spacing, mask=np.ones(GRID, np.uint8))
    assert_type(result, crfrefine.RefinementResult)
    assert_type(result.marginals, NDArray[np.float32])
    assert result.marginals_at(IMAGE[0] > 0).shape[0] == 3
    assert result == crfrefine.refine(
        torch.from_numpy(LOGITS), torch.from_numpy(IMAGE), spacing=(1, 1.5, 2), input_type="logits"
    )
    for same in (
        crfrefine.refine(LOGITS.tolist(), IMAGE, spacing=np.float32(2.0)),
        crfrefine.refine(LOGITS, IMAGE, spacing=2),
    ):
        assert same == crfrefine.refine(LOGITS, IMAGE, spacing=torch.tensor(2.0))
    with pytest.raises(crfrefine.ConfigError):
        crfrefine.refine(LOGITS, IMAGE, spacing=1.0, input_type="logit")  # type: ignore[arg-type]


def test_the_layer_is_called_with_types_and_returns_a_tensor() -> None:
    logits = torch.from_numpy(LOGITS)[None]
    image = torch.from_numpy(IMAGE)[None]
    crf = crfrefine.CrfRnn(3, 2, compatibility="potts", learn="weights").freeze("theta")
    refined = crf(logits, image, np.array([1.0, 1.5, 2.0]), mask=np.ones(GRID, bool))
    assert_type(refined, torch.Tensor)
    for spacing in (torch.ones(1, 3), [[1.0, 1.0, 1.0]], (1, 1, 1), np.float32(1.0)):
        assert crf(logits, image, spacing=spacing).shape == refined.shape
    loss = crfrefine.crf_loss(
        logits,
        image,
        np.ones(3),
        theta_alpha=np.float64(2.0),
        theta_beta=np.array([0.1, 0.2]),
        filter="truncated",
    )
    assert_type(loss, torch.Tensor)
    with pytest.raises(crfrefine.InputError):
        crf(LOGITS, image, 1.0)  # type: ignore[arg-type]
    with pytest.raises(crfrefine.ConfigError):
        crf.freeze("wieghts")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        crf(logits, image, spcing=1.0)  # type: ignore[call-arg]
    assert_type(
        crfrefine.layer.functional.mean_field(
            logits, image, bilateral=[(1.0, np.array([1.0, 1.0, 2.0]), 0.1)], spacing=1
        ),
        torch.Tensor,
    )


def test_modules_have_types_without_an_import_of_their_own() -> None:
    smooth = crfrefine.parameters.sections.SpatialParameters(weight=1.0)
    assert_type(
        crfrefine.CrfParameters().replace(spatial=smooth).spatial,
        crfrefine.parameters.sections.SpatialParameters,
    )
    assert crfrefine.metrics.overlap.measure_case.__doc__
