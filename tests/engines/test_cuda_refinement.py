"""Cases refined on the GPU: the CPU's label maps, whatever is prepared before and asked afterwards; what is copied there and back."""

import cuda_shim
import numpy as np
import pytest
from oracles import Case, random_case
from strict_device import PARAMETERS, StrictDevice, use

from crfrefine import refine
from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.engines.cuda.cupy_device import CupyDevice, is_available

BOX = (slice(2, 7), slice(1, 9), slice(3, 6))


@pytest.fixture(params=["cuda-shim", pytest.param("cuda", marks=pytest.mark.gpu)])
def gpu_engine(request):
    """The GPU engine under a GPU's rules (strict_device.py), and on a GPU."""
    if request.param == "cuda-shim":
        if cuda_shim.compiler() is None:
            pytest.skip("no C++ compiler to compile the GPU's kernels with")
        return CudaBackend(StrictDevice())
    if not is_available():
        pytest.skip("needs a GPU and CuPy")
    return CudaBackend(CupyDevice())


def refined(case, device, *, changes=None, **options):
    given = {"mask": case.mask, "spacing": case.spacing, "parameters": PARAMETERS.replace(**(changes or {}))}
    return refine(case.logits, case.image, device=device, allow_vanishing=True, **(given | options))


def case_of(kind):
    """A case that differs from the usual in one respect."""
    case = random_case(3, num_modalities=2, num_labels=4, grid_shape=(9, 11, 8))
    logits, mask = case.logits.copy(), case.image[0] > np.quantile(case.image[0], 0.2)  # scattered
    if "box" in kind or kind == "slice":
        box = np.zeros(mask.shape, bool)
        box[(slice(2, 8), slice(None), 5) if kind == "slice" else BOX] = True
        mask = box if kind == "slice" else mask & box
    elif "mask" not in kind:
        mask = None
    if kind.startswith("padding"):
        logits[:, :, :3] = 0.25
    if "huge padding" in kind:
        logits[:, :2] = np.finfo(np.float32).min
    if "two labels" in kind:
        logits = logits[:2]
    if kind.startswith("axes in another order"):
        logits, image = (np.asfortranarray(array.T).T.transpose(0, 3, 1, 2) for array in (logits, case.image))
        return Case(logits, image, None, (case.spacing[2], case.spacing[0], case.spacing[1]))
    return Case(logits, case.image, mask, case.spacing)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("plain", {}),
        ("padding in a box", {}),
        ("scattered mask, two labels", {}),
        ("slice", {}),
        ("axes in another order, huge padding", {}),
        ("box", {"postprocess.keep_largest": "each", "bilateral.weight": 0.1, "spatial.weight": 0.0}),
        ("box", {"volume.weight": 0.5}),
    ],
)
def test_a_case_of_any_kind_is_refined_as_on_the_cpu(gpu_engine, kind, changes, monkeypatch):
    use(gpu_engine, monkeypatch)
    found, expected = (refined(case_of(kind), device, changes=changes) for device in ("cuda", "cpu"))
    for name in ("label_map", "network_label_map"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    assert found.label_map.dtype == expected.label_map.dtype
    np.testing.assert_allclose(found.marginals, expected.marginals, atol=2e-5)
    assert found.num_padding_voxels == expected.num_padding_voxels
    assert found.changes == expected.changes
    assert found.changes.voxels_changed > 0
    assert (found.voxels_removed > 0) == ("postprocess.keep_largest" in changes)
