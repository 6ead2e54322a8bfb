"""What each kernel of a step is given to read and write: bytes counted by the stand-in, against the table in docs/decisions/gpu.md."""

from __future__ import annotations

from collections import Counter

import cuda_shim
import numpy as np
import pytest
from counting_device import CountingDevice
from oracles import kernel_set, random_case, resolve

from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.engines.cuda.grid import GridSize
from crfrefine.engines.cuda.kernel_set import Kernel
from crfrefine.engines.cuda.lattice import Lattice
from crfrefine.engines.cuda.voxels import BilateralInput, Voxels
from crfrefine.specs import MeanFieldSpec

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")

WIDTH, LABELS = 4, 5
FEW, MANY = 4, 10


def traffic(
    *, masked: bool, num_dims: int = 3, num_labels: int = LABELS, spatial_weight: float = 0.5, filter_name: str = "lattice"
) -> tuple[dict[str, float], Counter[str], int, int]:
    """Bytes of a step by kernel, all launches of a run with FEW steps, voxels, and places of the mask's box."""
    grid_shape = (14, 11, 39)[-num_dims:] if num_dims > 1 else (157,)
    case = random_case(num_dims, num_modalities=2, num_labels=num_labels, masked=masked, grid_shape=grid_shape)
    devices = []
    for num_iterations in (FEW, MANY):
        changes = {"spatial__weight": spatial_weight, "mean_field__filter": filter_name, "mean_field__tolerance": 0.0}
        parameters = resolve(case, bilateral__theta_alpha=3.0, **changes, mean_field__num_iterations=num_iterations)
        devices.append(CountingDevice())
        CudaBackend(devices[-1]).mean_field(case.logits, case.image, case.mask, case.spacing, parameters)
    few, many = devices
    per_step = {kernel: (many.num_bytes[kernel] - few.num_bytes[kernel]) / (MANY - FEW) for kernel in many.num_bytes}
    places = int(np.prod([np.ptp(index) + 1 for index in np.nonzero(case.inside)]))
    return {kernel: count for kernel, count in per_step.items() if count}, few.num_launches, int(case.inside.sum()), places


@pytest.mark.parametrize("masked", [False, True], ids=["everywhere", "masked"])
def test_the_spatial_kernel_reads_voxels_and_writes_messages_itself(masked: bool) -> None:
    """No copy into a box and none out of it; the numbers of the voxels only with a mask. Taps and weights are a few hundred bytes."""
    found, _, num_voxels, places = traffic(masked=masked)
    assert not found.keys() & {"clear_box", "scatter_to_box", "gather_from_box"}
    spatial = sum(found[kernel] for kernel in ("filter_values", "filter_far_axis", "filter_far_axis_to_voxels"))
    # 8w (d - 1) B + N (12w + 8), the sum that is added to counted once; 8 B more with a mask.
    expected = 8 * WIDTH * 2 * places + num_voxels * (8 * WIDTH + 8) + 8 * places * masked
    assert expected <= spatial < expected + 4096


@pytest.mark.parametrize(
    ("num_dims", "kernel"), [(1, "gather_from_box"), (2, "filter_far_axis_to_voxels"), (3, "filter_far_axis_to_voxels")]
)
def test_the_last_axis_hands_the_messages_over(num_dims: int, kernel: str) -> None:
    found, _, _, _ = traffic(masked=True, num_dims=num_dims)
    assert kernel in found


def test_the_splat_gathers_no_factor_of_the_normalization() -> None:
    """It is in the weights of the entries, which are computed once: N (8 (D + 1) + 4w) + 4wK, and the lists' segments."""
    found, launches, num_voxels, _ = traffic(masked=True)
    assert "splat" not in found
    assert launches["weigh_entries"] == 1
    assert launches["splat"] == 1  # for the normalization itself
    corners = 6
    least = num_voxels * (8 * corners + 4 * WIDTH)
    # At most one segment of 8 bytes and one row per entry: far less where lists are long.
    assert least <= found["splat_weighed"] <= least + num_voxels * corners * (8 + 4 * WIDTH)


def test_where_a_segment_begins_and_ends_takes_eight_bytes() -> None:
    """Places in the lists and rows have 32 bits: one of each per segment."""
    case = random_case(3, num_modalities=2, masked=True, grid_shape=(14, 11, 39))
    voxels = Voxels(cuda_shim.ShimDevice(), case.image.shape[1:], case.spacing, case.mask)
    lists = Lattice(BilateralInput(voxels, case.image, [3.0] * 3, [0.15] * 2)).lists
    for pieces in (lists.segments, *lists.levels):
        assert pieces.begin.nbytes + pieces.row.nbytes == 8 * len(pieces) + 4


@pytest.mark.parametrize(("spatial_weight", "num_messages"), [(0.5, 1), (0.0, 0)], ids=["both", "lattice alone"])
def test_the_update_slices_the_lattice_itself(spatial_weight: float, num_messages: int) -> None:
    """The message of the lattice is neither written nor read; with a spatial kernel, that one's is read."""
    found, launches, num_voxels, _ = traffic(masked=True, spatial_weight=spatial_weight)
    assert "slice_values" not in found
    assert launches["slice_values"] == 2  # for the normalization
    # N (4L + 4w (1 + messages) + 16 + 6 (D + 1)), sums of 48 bytes per thread, at most as much for the vertices as one blur is given.
    least = num_voxels * (4 * LABELS + 4 * WIDTH * (1 + num_messages) + 16 + 6 * 6 + 48)
    assert least < found["update"] < least + found["blur"] / 6


@pytest.mark.parametrize("masked", [False, True], ids=["everywhere", "masked"])
def test_a_grid_takes_one_pass_each_way_and_one_over_its_cells(masked: bool) -> None:
    """Voxels are read once and messages written once; cells of planes are written and read twice, those of the grid twice each.

    Tables of the axes and numbers of tiles are a few hundred bytes.
    """
    found, launches, num_voxels, places = traffic(masked=masked, filter_name="grid")
    case = random_case(3, num_modalities=2, num_labels=LABELS, masked=masked, grid_shape=(14, 11, 39))
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


def test_more_channels_than_a_row_has_are_sliced_by_themselves() -> None:
    """Rows of vertices are those of one group of channels at a time."""
    found, _, _, _ = traffic(masked=True, num_labels=11)
    assert "slice_values" in found


@pytest.mark.parametrize("num_labels", [2, 5, 9])
def test_slicing_in_the_update_changes_no_bit(num_labels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of two numbers do not depend on their order: with a spatial kernel, its message is now the one that is added to."""
    case = random_case(3, num_modalities=2, num_labels=num_labels, masked=True, grid_shape=(9, 7, 12))
    parameters = resolve(case, spatial__weight=0.5, mean_field__filter="lattice", mean_field__damping=0.2)
    found = []
    for can_be_sliced in (True, False):
        if not can_be_sliced:
            monkeypatch.setattr(Kernel, "can_be_sliced", can_be_sliced)
        device = CountingDevice()
        found.append(CudaBackend(device).mean_field(case.logits, case.image, case.mask, case.spacing, parameters))
        assert (device.num_launches["slice_values"] > 2) == (not can_be_sliced)
    np.testing.assert_array_equal(found[0].logits, found[1].logits)
    assert found[0].energy == found[1].energy


def test_of_two_lattices_the_last_one_is_sliced_in_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message of the first is stored, and is what the update adds to."""
    case = random_case(3, num_modalities=2, num_labels=4, masked=True, grid_shape=(9, 7, 12))
    terms = [((1.4,) * 3, (0.2,) * 2), ((4.0,) * 3, (0.1,) * 2)]
    model = MeanFieldSpec(np.array([[1.0] * 4, [2.0] * 4]), 1.0 - np.eye(4), num_iterations=5)
    found = []
    for can_be_sliced in (True, False):
        if not can_be_sliced:
            monkeypatch.setattr(Kernel, "can_be_sliced", can_be_sliced)
        device = CountingDevice()
        spec = kernel_set(terms, None, normalization="symmetric", filter="lattice", num_labels=4, num_iterations=5)
        kernels = CudaBackend(device).kernels(case.image, case.mask, case.spacing, spec)
        before = device.num_launches["slice_values"]
        found.append(kernels.run(case.logits, model).logits)
        launched = device.num_launches["slice_values"] - before
        assert launched == (5 if can_be_sliced else 10)
    np.testing.assert_array_equal(found[0], found[1])


def test_messages_are_stored_before_they_are_added_to() -> None:
    """They are read by the update alone, which does not reset them: with `adds` switched off, what was there is not looked at."""
    device = CountingDevice()
    rows, total = np.ones((6, WIDTH), np.float32), np.full((6, WIDTH), np.nan, np.float32)
    weight, index = np.ones(WIDTH, np.float32), np.arange(6, dtype=np.int64)
    constants = {"CRF_WIDTH": WIDTH, "CRF_OUTPUTS": 8}
    for adds, expected in ((0, 1.0), (1, 2.0)):
        device.launch("spatial", "gather_from_box", constants, 6, rows, index, 6, None, weight, total, adds)
        np.testing.assert_array_equal(total, expected)


@pytest.mark.parametrize("filter_name", ["lattice", "grid"])
def test_modalities_and_axes_are_waited_for_together(filter_name: str) -> None:
    """The ends of all of them come back at once: a wait for each would idle the device between."""
    waits = []
    for num_modalities in (1, 2):
        case = random_case(3, num_modalities, num_labels=2, masked=True, grid_shape=(7, 6, 9))
        device = CountingDevice()
        spec = resolve(case, mean_field__filter=filter_name, spatial__weight=0.0).kernels
        CudaBackend(device).kernels(case.image, case.mask, case.spacing, spec)
        waits.append(sum(device.waits.values()))
    assert waits[0] == waits[1] <= 6
