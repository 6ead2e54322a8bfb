"""What each kernel of a step is given to read and write: bytes counted by the stand-in, against the table in docs/decisions/gpu.md."""

from __future__ import annotations

from collections import Counter

import cuda_shim
import numpy as np
import pytest
from oracles import random_case, resolve
from strict_device import StrictDevice

from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.engines.cuda.grid import GridSize
from crfrefine.engines.cuda.voxels import BilateralInput, Voxels

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")

WIDTH, LABELS = 4, 5
FEW, MANY = 3, 5
SHAPE = (4, 5, 39)


def traffic(
    *, masked: bool, num_dims: int = 3, num_labels: int = LABELS, spatial_weight: float = 0.5, filter_name: str = "lattice"
) -> tuple[dict[str, float], Counter[str], int, int]:
    """Bytes of a step by kernel, all launches of a run with FEW steps, voxels, and places of the mask's box."""
    grid_shape = SHAPE[-num_dims:] if num_dims > 1 else (157,)
    case = random_case(num_dims, num_modalities=2, num_labels=num_labels, masked=masked, grid_shape=grid_shape)
    devices = []
    for num_iterations in (FEW, MANY):
        changes = {"spatial__weight": spatial_weight, "mean_field__filter": filter_name, "mean_field__tolerance": 0.0}
        parameters = resolve(case, bilateral__theta_alpha=3.0, **changes, mean_field__num_iterations=num_iterations)
        devices.append(StrictDevice(is_watched=True))
        CudaBackend(devices[-1]).mean_field(case.logits, case.image, case.mask, case.spacing, parameters)
    few, many = devices
    per_step = {kernel: (many.num_bytes[kernel] - few.num_bytes[kernel]) / (MANY - FEW) for kernel in many.num_bytes}
    places = int(np.prod([np.ptp(index) + 1 for index in np.nonzero(case.inside)]))
    return {kernel: count for kernel, count in per_step.items() if count}, few.num_launches, int(case.inside.sum()), places


@pytest.mark.parametrize(
    ("num_dims", "masked"), [(3, True), (3, False), *(pytest.param(*case, marks=pytest.mark.long) for case in ((1, True), (2, False)))]
)
def test_the_spatial_kernel_reads_voxels_and_writes_messages_itself(num_dims: int, masked: bool) -> None:
    """No copy into a box and none out of it; the numbers of the voxels only with a mask. Taps and weights are a few hundred bytes."""
    found, launches, num_voxels, places = traffic(masked=masked, num_dims=num_dims)
    assert launches["filter_axis"] == num_dims * (2 + FEW)  # twice for the normalization
    # 8w (d - 1) B + N (12w + 8), the sum that is added to counted once; 4 B more for each axis with a mask.
    expected = 8 * WIDTH * (num_dims - 1) * places + num_voxels * (8 * WIDTH + 8) + 4 * num_dims * places * masked
    assert expected <= found["filter_axis"] < expected + 4096


def test_the_splat_gathers_voxels_and_their_factors() -> None:
    """N (6 (D + 1) + 4w + 4), a row per vertex, and a few bytes for each piece of a list."""
    found, _, num_voxels, _ = traffic(masked=True)
    corners = 6
    least = num_voxels * (6 * corners + 4 * WIDTH + 4)
    # At most one piece of 8 bytes and one row per entry: far less where lists are long.
    assert least <= found["splat"] <= least + num_voxels * corners * (8 + 4 * WIDTH)


@pytest.mark.parametrize("num_labels", [5, *(pytest.param(num_labels, marks=pytest.mark.long) for num_labels in (9, 40))])
def test_the_update_reads_and_writes_once(num_labels: int) -> None:
    """N (4L + 8w + 12) for all rows of channels, with any number of labels, and sums of 48 bytes per thread."""
    found, _, num_voxels, _ = traffic(masked=False, num_labels=num_labels)
    padded = -(-(num_labels - 1) // 8) * 8 if num_labels > 5 else WIDTH
    expected = num_voxels * (4 * num_labels + 3 * 4 * padded + 12 + 48)
    assert expected <= found["update"] < expected + 4096 + 4 * num_labels**2


@pytest.mark.long
@pytest.mark.parametrize("masked", [False, True], ids=["everywhere", "masked"])
def test_a_grid_takes_one_pass_each_way_and_one_over_its_cells(masked: bool) -> None:
    """Voxels are read once and messages written once; cells of planes are written and read twice, those of the grid twice each.

    Tables of the axes and numbers of tiles are a few hundred bytes.
    """
    found, launches, num_voxels, places = traffic(masked=masked, filter_name="grid")
    case = random_case(3, num_modalities=2, num_labels=LABELS, masked=masked, grid_shape=SHAPE)
    voxels = Voxels(cuda_shim.ShimDevice(), case.image.shape[1:], case.spacing, case.mask)
    size = GridSize.of(BilateralInput(voxels, case.image, [3.0] * 3, [0.15] * 2))
    of_voxels = num_voxels * (4 * 2 + 4 * WIDTH + 4) + 4 * places * masked
    planes, cells = 4 * WIDTH * size.num_plane_cells, 4 * WIDTH * size.num_cells
    for kernel, expected in {
        "splat_planes": of_voxels + planes,
        "splat_axis": planes + cells,
        "blur_cells": 2 * cells,
        "slice_axis": cells + planes,
        "slice_tiles": planes + of_voxels,
    }.items():
        assert expected <= found[kernel] < expected + 4096, kernel
    # Twice for the normalization.
    assert launches["slice_tiles"] == launches["splat_planes"] == 2 + FEW


@pytest.mark.parametrize("filter_name", ["lattice", "grid"])
def test_modalities_and_axes_are_waited_for_together(filter_name: str) -> None:
    """The ends of all of them come back at once: a wait for each would idle the device between."""
    waits = []
    for num_modalities in (1, 2):
        case = random_case(3, num_modalities, num_labels=4, masked=True, grid_shape=(7, 6, 9))
        device = StrictDevice(is_watched=True)
        spec = resolve(case, mean_field__filter=filter_name, spatial__weight=0.0).kernels
        CudaBackend(device).kernels(case.image, case.mask, case.spacing, spec)
        waits.append(sum(device.waits.values()))
    assert waits[0] == waits[1] <= 6
