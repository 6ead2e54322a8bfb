"""One description of the model for all engines, and one way to run it."""

from dataclasses import replace

import numpy as np
from oracles import kernel_set

from crfrefine.axes import StorageOrder
from crfrefine.specs import KernelSpec, MeanFieldSpec

POTTS = 1.0 - np.eye(3)


def test_the_last_channel_is_left_out_where_every_kernel_has_one_weight():
    shared, own = np.array([[2.0] * 3, [0.5] * 3]), np.array([[2.0] * 3, [0.5, 0.5, 0.6]])
    assert [MeanFieldSpec(weights, POTTS, 4).num_channels for weights in (shared, own, shared[:0])] == [2, 3, 2]


def test_weights_that_a_precision_does_not_tell_apart_are_one():
    spec = MeanFieldSpec(np.array([[1.0, 1.0 + 1e-12, 1.0]]), POTTS, 4)
    assert spec.num_channels == 3
    assert spec.rounded(np.float32).num_channels == 2


def test_bandwidths_of_position_go_into_storage_and_those_of_intensity_stay():
    spec = kernel_set([((1.0, 2.0, 3.0), (0.1, 0.2))], (4.0, 5.0, 6.0), normalization="after", filter="exact")
    stored = spec.in_storage(StorageOrder((2, 0, 1)))
    assert stored.kernels == (KernelSpec((3.0, 1.0, 2.0), (0.1, 0.2)), KernelSpec((6.0, 4.0, 5.0)))
    assert (stored.normalization, stored.filter, stored.watches_energy) == ("after", "exact", False)


def test_neighbors_are_as_far_apart_as_the_unit_of_the_bandwidths_says():
    spec = kernel_set([((1.0, 2.0, 3.0), (0.1,))], None, normalization="after", filter="exact")
    for positions, expected in (("mm", (0.8, 1.5, 2.5)), ("voxels", (1.0, 1.0, 1.0))):
        assert replace(spec, positions=positions).distances((0.8, 1.5, 2.5)) == expected
