"""The public functions keep to the shapes and types of their docstrings, in one to four dimensions: checked by jaxtyping and beartype."""

from typing import Any

import numpy as np
import pytest
from beartype import beartype
from jaxtyping import Float, Float32, TypeCheckError, UInt8, jaxtyped
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


@pytest.mark.parametrize(("num_dims", "dtype"), [(1, "float32"), (2, "float64"), (3, "float32"), (4, "float64")])
def test_the_layer(num_dims, dtype):
    torch = pytest.importorskip("torch", reason="the layer needs PyTorch: pip install 'crfrefine[train]'")
    case = random_case(num_dims, num_modalities=2, num_labels=4)

    @checked
    def check_layer(
        logits: Float[torch.Tensor, "batch labels *grid"],
        image: Float[torch.Tensor, "batch modalities *grid"],
        refined: Float[torch.Tensor, "batch labels *grid"],
        gradient: Float[torch.Tensor, "batch labels *grid"],
    ) -> None:
        assert refined.dtype == gradient.dtype == logits.dtype

    logits = torch.from_numpy(np.stack([case.logits, case.logits[::-1]])).to(getattr(torch, dtype)).requires_grad_()
    image = torch.from_numpy(np.stack([case.image] * 2))
    refined = crfrefine.CrfRnn(4, 2, num_dims)(logits, image, case.spacing)
    refined.square().sum().backward()
    check_layer(logits, image, refined, logits.grad)
