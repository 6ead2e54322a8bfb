"""What each kernel of a step is given to read and write: bytes counted by the stand-in, against the table in docs/decisions/gpu.md."""

from __future__ import annotations

import cuda_shim
import numpy as np
import pytest
from oracles import random_case, resolve
from strict_device import StrictDevice

from crfrefine.engines.cuda.backend import CudaBackend

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")


@pytest.mark.parametrize("masked", [True, False])
def test_a_step_reads_and_writes_the_bytes_of_the_table(masked: bool) -> None:
    """Voxels are read, messages and logits are written once in a step; taps, weights and sums are a few hundred bytes more."""
    num_dims, num_labels, width, few, many = 3, 5, 4, 3, 5
    case = random_case(num_dims, num_modalities=2, num_labels=num_labels, masked=masked, grid_shape=(4, 5, 39))
    num_bytes, launches = [], []
    for num_iterations in (few, many):
        model = {"bilateral__theta_alpha": 3.0, "spatial__weight": 0.5, "mean_field__filter": "lattice", "mean_field__tolerance": 0.0}
        device = StrictDevice(is_watched=True)
        spec = resolve(case, **model, mean_field__num_iterations=num_iterations)
        CudaBackend(device).mean_field(case.logits, case.image, case.mask, case.spacing, spec)
        num_bytes.append(device.num_bytes)
        launches.append(device.num_launches["filter_axis"])
    voxels, places = int(case.inside.sum()), int(np.prod([np.ptp(index) + 1 for index in np.nonzero(case.inside)]))
    corners = 6
    expected = {
        # 8w (d - 1) B + N (12w + 8), the sum that is added to counted once; 4 B more for each axis with a mask.
        "filter_axis": 8 * width * (num_dims - 1) * places + voxels * (8 * width + 8) + 4 * num_dims * places * masked,
        # N (4L + 8w + 12), and sums of 48 bytes per thread.
        "update": voxels * (4 * num_labels + 3 * 4 * width + 12 + 48),
        # N (6 (D + 1) + 4w + 4), a row per vertex, and at most a piece of 8 bytes for each entry of a list.
        "splat": voxels * (6 * corners + 4 * width + 4),
    }
    most_more = {"splat": voxels * corners * (8 + 4 * width), "update": 4096 + 8 * voxels * masked}
    for kernel, least in expected.items():
        found = (num_bytes[1][kernel] - num_bytes[0][kernel]) / (many - few)
        assert least <= found < least + most_more.get(kernel, 4096), kernel
    assert launches == [num_dims * (2 + few), num_dims * (2 + many)]  # twice for the normalization


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
