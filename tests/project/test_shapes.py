"""The public functions keep to the shapes and types of their docstrings, in one to four dimensions: checked by jaxtyping and beartype."""

from typing import Any

import numpy as np
import pytest
from beartype import beartype
from jaxtyping import Float32, TypeCheckError, UInt8, jaxtyped
from oracles import random_case

import crfrefine
from crfrefine import RefinementResult

checked = jaxtyped(typechecker=beartype)


@checked
def check_result(
    logits: Float32[np.ndarray, "labels *grid"],
    image: Float32[np.ndarray, "modalities *grid"],
    label_map: UInt8[np.ndarray, "*grid"],
    network_label_map: UInt8[np.ndarray, "*grid"],
    marginals: Float32[np.ndarray, "labels *grid"],
    refined: Float32[np.ndarray, "labels *grid"],
) -> None:
    """Fail unless all shapes and types belong together."""


def arrays_of(result: RefinementResult) -> tuple[Any, ...]:
    return result.label_map, result.network_label_map, result.marginals, result.logits


@pytest.mark.parametrize("num_dims", [1, 2, 3, 4])
def test_refine(num_dims):
    case = random_case(num_dims, num_modalities=2, num_labels=4, masked=num_dims % 2 == 0)
    found = arrays_of(crfrefine.refine(case.logits, case.image, spacing=case.spacing, mask=case.mask))
    check_result(case.logits, case.image, *found)
    with pytest.raises(TypeCheckError):
        check_result(case.logits, case.image, found[0][..., :-1], *found[1:])
    with pytest.raises(TypeCheckError):
        check_result(case.logits, case.image, *found[:2], found[2].astype(np.float64), found[3])
