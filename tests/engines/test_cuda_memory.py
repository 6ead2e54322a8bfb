"""The GPU engine's memory, on a stand-in that counts it (strict_device.py): what is computed on the CPU for lack of it."""

from dataclasses import replace

import cuda_shim
import numpy as np
import pytest
from oracles import random_case, resolve
from strict_device import StrictDevice, use

from crfrefine import CrfParameters, RegionScheme, refine
from crfrefine.engines.cuda.backend import CudaBackend

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")


def test_a_single_voxel_keeps_to_the_rules():
    """Channels are rows as they lie, but not where a wide load may begin: a weight per label leaves records of an odd number of them."""
    case = random_case(3, num_modalities=2)
    mask = np.zeros(case.inside.shape, dtype=bool)
    mask[1, 2, 3] = True
    case = replace(case, mask=mask)
    settings = {"bilateral__weight": [1.0, 1.5, 2.0], "spatial__weight": 0.5, "mean_field__num_iterations": 3}
    model = resolve(case, bilateral__theta_alpha=1.4, bilateral__theta_beta=0.2, **settings)
    kernels = CudaBackend(StrictDevice(is_watched=True)).kernels(case.grid, model.kernels)
    kernels.backward(kernels.forward(case.logits, model.mean_field), case.logits, case.logits, wants_image=True, wants_theta=True)


SETTINGS = CrfParameters().replace(
    **{
        "spatial.weight": 0.5,
        "bilateral.theta_alpha": 1.2,
        "bilateral.theta_beta": 0.3,
        "mean_field.filter": "truncated",
        "mean_field.num_iterations": 2,
        "mean_field.tolerance": 0.0,
    }
)


REGIONS = RegionScheme.of({"whole": [1, 2, 3], "core": [2, 3], "tip": 3, "rest": 4})
NOTE = "computed on the CPU, since the case does not fit into the memory of cuda-shim: "


def refined(device, **options):
    case = random_case(3, num_modalities=1, num_labels=4, grid_shape=(98, 5, 6))
    return refine(case.logits, case.image, spacing=case.spacing, parameters=SETTINGS, device=device, **options)


@pytest.mark.parametrize("regions", [None, REGIONS])
def test_a_case_beyond_the_memory_has_the_result_of_the_cpu(regions, monkeypatch):
    """Allocations fail in the middle, and nothing of them stays."""
    large = StrictDevice()
    use(CudaBackend(large), monkeypatch)
    whole = refined("cuda", regions=regions)
    assert (whole.device, whole.notes) == ("cuda-shim", ())
    small = StrictDevice(int(0.7 * large.most))
    use(CudaBackend(small), monkeypatch)
    found = refined("cuda", regions=regions)
    assert small.most <= small.limit
    assert found.device == "cpu"
    (note,) = found.notes
    assert note.startswith(NOTE)
    expected = refined("cpu", regions=regions)
    np.testing.assert_array_equal(found.label_map, expected.label_map)
    np.testing.assert_array_equal(found.marginals, expected.marginals)
    assert found.energy == expected.energy
