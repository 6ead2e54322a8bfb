"""`--device auto` with a volume term on a machine with a GPU, whose engine does not have the term."""

from __future__ import annotations

import pytest
from cli_helpers import write_folders
from cuda_shim import shim_backend
from oracles import random_case

import crfrefine
import crfrefine.engines
from crfrefine.engines.cuda.cupy_device import is_available
from crfrefine.errors import ConfigError
from crfrefine.execution.observer import Observer
from crfrefine.infer.options import InferenceOptions
from crfrefine.infer.run import run_inference
from crfrefine.train.device import choose_device

NOTE = "--device auto takes the CPU: the GPU engine cannot keep volumes (volume.weight is above 0)"
KEEPING = crfrefine.CrfParameters().replace(**{"volume.weight": 0.5, "volume.keep": "argmax", "mean_field.filter": "truncated"})
PLAIN = KEEPING.replace(**{"volume.weight": 0.0})


class Notes(Observer):
    """Keeps what it is told, and of which case."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, str]] = []

    def note(self, text: str, *, case_id: str = "") -> None:
        self.notes.append((case_id, text))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine on which `auto` finds a GPU: the GPU engine with its kernels compiled as C++; its name."""
    if is_available():
        return "cuda"
    device = shim_backend()
    monkeypatch.setattr(crfrefine.engines, "_TABLE", (("auto", lambda _: device), *crfrefine.engines._TABLE))
    return device.name


def test_refine_takes_the_cpu_and_says_why(gpu: str) -> None:
    """Only where volumes are kept, and only if the choice was left to it."""
    case = random_case(3)
    found = crfrefine.refine(case.logits, case.image, spacing=case.spacing, parameters=KEEPING, device="auto")
    assert (found.device, found.notes) == ("cpu", (NOTE,))
    plain = crfrefine.refine(case.logits, case.image, spacing=case.spacing, parameters=PLAIN, device="auto")
    assert (plain.device, plain.notes) == (gpu, ())
    on_cpu = crfrefine.refine(case.logits, case.image, spacing=case.spacing, parameters=KEEPING, device="cpu")
    assert on_cpu.notes == ()


def test_a_folder_is_refined_on_the_cpu_with_one_note(gpu: str, tmp_path) -> None:
    """Not an error per case, nor a note per case."""
    folders = write_folders(tmp_path, "a", "b")
    options = InferenceOptions(images=(folders.images,), logits=(folders.logits,), output=folders.output, parameters=KEEPING)
    recorder = Notes()
    summary = run_inference(options, recorder)
    assert (summary.device, summary.requested_device, summary.count("done")) == ("cpu", "auto", 2)
    assert gpu != "cpu"
    assert [(case_id, note) for case_id, note in recorder.notes if "device" in note] == [("", NOTE)]


@pytest.mark.usefixtures("gpu")
def test_training_that_keeps_volumes_takes_the_cpu() -> None:
    """The note is printed at the start."""
    device = choose_device("auto", keeps_volumes=True)
    assert (device.name, device.note) == ("cpu", NOTE)


def test_a_gpu_that_was_asked_for_is_never_replaced(compiled_backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name: then the term is refused."""
    if compiled_backend.name == "cpu":
        pytest.skip("no GPU engine")
    monkeypatch.setattr(crfrefine.engines, "_TABLE", ((compiled_backend.name, lambda _: compiled_backend),))
    case = random_case(3)
    with pytest.raises(ConfigError, match=r"volume\.weight: the GPU engine cannot keep volumes"):
        crfrefine.refine(case.logits, case.image, spacing=case.spacing, parameters=KEEPING, device=compiled_backend.name)
