"""The main bodies of labels by a plain search, voxel by voxel."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray
from oracles import Case, softmax

from crfrefine.parameters.specs import MeanFieldSpec

LEAST = 0.3


def main_bodies(case: Case, run: MeanFieldSpec) -> NDArray[np.bool_]:
    """The voxels of the largest component of each foreground label, (*grid)."""
    bias = np.zeros(run.num_labels) if run.bias is None else run.bias.astype(np.float64)
    scores = case.logits.astype(np.float64) + bias.reshape(-1, *(1,) * case.inside.ndim)
    found = np.zeros(case.inside.shape, dtype=bool)
    for probability in softmax(scores / run.temperature)[1:]:
        left = {tuple(voxel) for voxel in np.argwhere((probability > LEAST) & case.inside).tolist()}
        largest: set[tuple[int, ...]] = set()
        while left:
            component = _component_of(min(left), left)
            left -= component
            largest = component if len(component) > len(largest) else largest
        for voxel in largest:
            found[voxel] = True
    return found


def _component_of(first: tuple[int, ...], voxels: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
    component, ends = {first}, [first]
    steps = list(itertools.product((-1, 0, 1), repeat=len(first)))
    while ends:
        voxel = ends.pop()
        neighbors = {tuple(at + step for at, step in zip(voxel, by, strict=True)) for by in steps}
        new = (neighbors & voxels) - component
        component |= new
        ends += new
    return component
