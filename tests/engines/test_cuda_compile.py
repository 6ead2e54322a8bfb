"""The GPU's kernels compiled to machine code for the architectures that are supported; no GPU is
needed.

A kernel of the inner loop must keep its voxel's numbers in registers: what spills goes to memory
and back in each step.
"""

import re

import cuda_shim
import numpy as np
import nvrtc
import pytest
from every_kernel import source_names
from oracles import random_case
from strict_device import PARAMETERS, StrictDevice, use

import crfrefine
from crfrefine.engines import is_available
from crfrefine.engines.cuda.cupy_device import CupyDevice
from crfrefine.engines.cuda.kernels import CudaBackend

_WIDTHS = [{"CRF_WIDTH": width} for width in (1, 4, 8)]
_LABELS = [
    {"CRF_LABELS": labels, "CRF_CHANNELS": channels, "CRF_WIDTH": width}
    for labels, channels, width in ((2, 1, 1), (5, 4, 4), (5, 5, 8), (9, 8, 8))
]

# Constants of clinical cases: CT (one modality, two labels), prostate, BraTS (four modalities,
# five labels), many organs.
HOT = {
    **dict.fromkeys(("mean_field_backward", "moments"), _WIDTHS),
    "spatial": [
        {
            **constants,
            "CRF_THREADS": 256,
            "CRF_TILE_COLUMNS": 32,
            "CRF_TILE_ROWS": 32,
            "CRF_REACH": 8,
        }
        for constants in _WIDTHS
    ],
    "lattice": [{**constants, "CRF_THREADS": 128} for constants in _WIDTHS],
    "lattice_build": [
        {"CRF_FEATURES": features, "CRF_WIDE_KEYS": wide, "CRF_THREADS": 128}
        for features, wide in ((4, 0), (7, 0), (7, 1))
    ],
    "direct": [
        {"CRF_FEATURES": features, "CRF_WIDTH": width}
        for features, width in ((1, 1), (4, 4), (7, 8))
    ],
    "mean_field": _LABELS,
    "products": [
        {"CRF_ROWS": rows, "CRF_OTHERS": others, "CRF_THREADS": 128, "CRF_TILE": 128}
        for rows, others in ((5, 1), (12, 12))
    ],
    "sums": [{"CRF_THREADS": 512}],
    "volume": [{}],
    "voxels": [{"CRF_THREADS": 256}],
}

needs_compiler = pytest.mark.skipif(
    nvrtc.nvrtc_library() is None, reason="NVRTC (nvidia-cuda-nvrtc-cu12) is not installed"
)


def test_every_source_is_listed():
    """A new file must not go uncompiled."""
    assert sorted(HOT) == source_names()


@needs_compiler
@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        *((name, "sm_80") for name in ("sums", "volume", "spatial", "lattice")),
        *(pytest.param(name, "sm_90", marks=pytest.mark.long) for name in sorted(HOT)),
    ],
)
def test_hot_kernels_spill_nothing(name, architecture):
    """Neither spills nor a stack frame, and at most 128 registers: half of a multiprocessor's
    threads or more are resident.
    """
    for constants in HOT[name][:1] if architecture == "sm_80" else HOT[name]:
        source = cuda_shim.kernel_source(name, **constants)
        usage = nvrtc.compile_for(architecture, source)
        assert set(usage) == set(source.kernels)
        for kernel, used in usage.items():
            assert (used.spill_bytes, used.stack_bytes) == (0, 0), f"{kernel} {constants}: {used}"
            assert used.registers <= 128, f"{kernel} {constants}: {used}"
            assert used.shared_bytes <= 48 * 1024, f"{kernel} {constants}: {used}"
            assert (used.shared_bytes > 0) == (f"CRF_BLOCK_KERNEL({kernel}," in source.text)


# In the two others some blocks have no number of a voxel.
NUMBERED = sorted(HOT.keys() - {"products", "sums"})


@needs_compiler
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "spatial" else pytest.mark.long) for name in NUMBERED],
)
def test_threads_are_numbered_in_64_bits(name):
    """A volume of 512 x 512 x 800 has more numbers than 32 bits: a block's times its threads is a
    wide product.
    """
    source = cuda_shim.kernel_source(name, **HOT[name][0])
    for kernel, code in nvrtc.intermediate_code(source).items():
        if f"CRF_BLOCK_KERNEL({kernel}," in source.text:
            continue  # These begin with the block's number in 64 bits.
        block = re.search(r"mov\.u32\s+(%r\d+), %ctaid\.x;", code)
        if block is not None:  # absent where a single thread does the work
            product = re.search(rf"(\S+)\s+%\w+, (?:{block[1]}, %r\d+|%r\d+, {block[1]})\b", code)
            assert product is not None, kernel
            assert product[1] == "mul.wide.u32", kernel


@needs_compiler
def test_what_integers_follow_from_is_not_contracted():
    """Rounded once, there would be other vertices than the CPU's."""
    assert "fma.rn" in "".join(
        nvrtc.intermediate_code(cuda_shim.kernel_source("lattice", **HOT["lattice"][0])).values()
    )
    assert "fma.rn" not in "".join(
        nvrtc.intermediate_code(
            cuda_shim.kernel_source("lattice_build", **HOT["lattice_build"][0])
        ).values()
    )


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


SHAPE = (9, 11, 8)
SCATTERED = np.random.default_rng(0).random(SHAPE) < 0.8
BOX = np.zeros(SHAPE, bool)
SLICE = np.zeros(SHAPE, bool)
BOX[2:7, 1:9, 3:6] = SCATTERED[2:7, 1:9, 3:6]
SLICE[2:8, :, 5] = True
FEW = {"bilateral.weight": 0.1, "spatial.weight": 0.0}


@pytest.mark.parametrize(
    ("mask", "padding", "num_labels", "axes", "changes"),
    [
        (None, None, 4, (0, 1, 2), {}),
        (BOX, 0.25, 4, (0, 1, 2), {}),
        (SCATTERED, None, 2, (0, 1, 2), {}),
        (SLICE, None, 4, (0, 1, 2), {}),
        (None, np.finfo(np.float32).min, 4, (2, 0, 1), {}),
        (BOX, None, 4, (0, 1, 2), FEW | {"postprocess.keep_largest": "each"}),
        (BOX, None, 4, (0, 1, 2), {"volume.weight": 0.5}),
    ],
    ids=[
        "plain",
        "padding in a box",
        "two labels",
        "slice",
        "axes in another order",
        "components",
        "volumes",
    ],
)
def test_a_case_of_any_kind_is_refined_as_on_the_cpu(
    gpu_engine, mask, padding, num_labels, axes, changes, monkeypatch
):
    use(gpu_engine, monkeypatch)
    case = random_case(3, num_modalities=2, num_labels=4, grid_shape=SHAPE)
    logits = case.logits[:num_labels].copy()
    if padding is not None:
        logits[:, :, :3] = padding
    logits, image = (
        np.asfortranarray(array.T).T.transpose(0, *(1 + axis for axis in axes))
        for array in (logits, case.image)
    )
    options = {
        "mask": mask,
        "spacing": [case.spacing[axis] for axis in axes],
        "parameters": PARAMETERS.replace(**changes),
    }
    found, expected = (
        crfrefine.refine(logits, image, device=device, allow_vanishing=True, **options)
        for device in ("cuda", "cpu")
    )
    for name in ("label_map", "network_label_map"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    assert found.label_map.dtype == expected.label_map.dtype
    np.testing.assert_allclose(found.marginals, expected.marginals, atol=2e-5)
    assert found.num_padding_voxels == expected.num_padding_voxels
    assert found.changes == expected.changes
    assert found.changes.voxels_changed > 0
    assert (found.voxels_removed > 0) == ("postprocess.keep_largest" in changes)
