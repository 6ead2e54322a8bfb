"""Cases that a GPU's memory does not hold are computed on the CPU, with a note."""

from dataclasses import replace

import cuda_shim
import numpy as np
import pytest
from cli_helpers import Folders, save_nifti
from oracles import random_case
from strict_device import StrictDevice, use

from crfrefine import CrfParameters, RegionScheme, refine
from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.runs.options import InferenceOptions
from crfrefine.runs.run import run_inference

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")

SHAPE = (98, 5, 6)
SPACING = (1.0, 0.6, 1.7)
SETTINGS = {
    "spatial.weight": 0.5,
    "bilateral.theta_alpha": 1.2,
    "bilateral.theta_beta": 0.3,
    "mean_field.filter": "truncated",
    "mean_field.num_iterations": 2,
    "mean_field.tolerance": 0.0,
}


REGIONS = RegionScheme.of({"whole": [1, 2, 3], "core": [2, 3], "tip": 3, "rest": 4})
NOTE = "computed on the CPU, since the case does not fit into the memory of cuda-shim: "


def case():
    return replace(random_case(3, num_modalities=1, num_labels=4, grid_shape=SHAPE), spacing=SPACING)


def refined(device, **options):
    given = case()
    parameters = CrfParameters().replace(**SETTINGS)
    return refine(given.logits, given.image, mask=given.mask, spacing=SPACING, parameters=parameters, device=device, **options)


@pytest.mark.parametrize("regions", [None, REGIONS])
@pytest.mark.parametrize("is_told", [True, False])
def test_a_case_beyond_the_memory_has_the_result_of_the_cpu(is_told, regions, monkeypatch):
    """Also where the device does not tell what is free, so that allocations fail in the middle: nothing of them stays."""
    large = StrictDevice()
    use(CudaBackend(large), monkeypatch)
    whole = refined("cuda", regions=regions)
    assert (whole.device, whole.notes) == ("cuda-shim", ())
    small = StrictDevice(int(0.7 * large.most), is_told=is_told)
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


def test_a_folder_run_says_so(tmp_path, monkeypatch):
    given = case()
    folders = Folders(tmp_path / "images", tmp_path / "logits", tmp_path / "out")
    folders.images.mkdir()
    folders.logits.mkdir()
    save_nifti(folders.images / "a_0000.nii.gz", given.image[0].T)
    save_nifti(folders.logits / "a.nii.gz", np.moveaxis(given.logits, 0, -1).transpose(2, 1, 0, 3))
    use(CudaBackend(StrictDevice(20_000)), monkeypatch)
    options = InferenceOptions(
        (folders.images,), (folders.logits,), folders.output, parameters=CrfParameters().replace(**SETTINGS), device="cuda"
    )
    (record,) = run_inference(options).cases
    assert (record.status, record.device) == ("done", "cpu")
    assert any(note.startswith(NOTE) for note in record.notes)
