"""`--device auto` with a volume term on a machine with a GPU."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from cli_helpers import write_folders
from cuda_shim import shim_backend
from oracles import random_case

import crfrefine
import crfrefine.engines
from crfrefine.engines.cuda.cupy_device import is_available
from crfrefine.execution.observer import Observer
from crfrefine.infer.options import InferenceOptions
from crfrefine.infer.run import run_inference

pytestmark = pytest.mark.gpu

KEEPING = crfrefine.CrfParameters().replace(**{"volume.weight": 0.5, "volume.keep": "argmax", "mean_field.filter": "truncated"})


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine on which `auto` finds a GPU: the GPU engine with its kernels compiled as C++; its name."""
    if is_available():
        return "cuda"
    device = shim_backend()
    monkeypatch.setattr(crfrefine.engines, "_TABLE", (("auto|cuda-shim", lambda _: device), *crfrefine.engines._TABLE))
    return device.name


@pytest.mark.parametrize("keep", ["argmax", "largest"])
def test_refine_keeps_volumes_on_the_gpu(gpu: str, keep: str) -> None:
    """As without the term; float32 on both."""
    case = random_case(3, masked=True)
    parameters = KEEPING.replace(**{"volume.keep": keep})
    settings = {"spacing": case.spacing, "mask": case.mask, "parameters": parameters}
    found, expected = (crfrefine.refine(case.logits, case.image, device=device, **settings) for device in ("auto", "cpu"))
    assert (found.device, found.notes) == (gpu, ())
    np.testing.assert_array_equal(found.label_map, expected.label_map)
    np.testing.assert_allclose(found.marginals, expected.marginals, atol=2e-5)


def test_a_folder_is_refined_on_the_gpu(gpu: str, tmp_path: Path) -> None:
    """Label maps as on the CPU."""
    folders = write_folders(tmp_path, "a", "b")
    for device, output in (("auto", tmp_path / "gpu"), ("cpu", tmp_path / "cpu")):
        options = InferenceOptions(images=(folders.images,), logits=(folders.logits,), output=output, parameters=KEEPING, device=device)
        summary = run_inference(options, Observer())
        assert (summary.device, summary.count("done")) == (gpu if device == "auto" else "cpu", 2)
    names = [path.name for path in (tmp_path / "cpu").glob("*.nii.gz")]
    assert len(names) == 2
    for name in names:
        np.testing.assert_array_equal(*(np.asarray(nib.load(tmp_path / folder / name).dataobj) for folder in ("cpu", "gpu")))
