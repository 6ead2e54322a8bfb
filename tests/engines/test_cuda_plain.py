"""CRFREFINE_CUDA: the same results without PyTorch's memory, and with a wait that names a kernel's error."""

import cuda_shim
import numpy as np
import pytest
import recorded_cupy
from oracles import random_case
from strict_device import PARAMETERS

import crfrefine
from crfrefine import ConfigError, refine
from crfrefine.engines.cuda.mode import VARIABLE
from crfrefine.errors import DeviceLostError

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")


@pytest.fixture
def machine(monkeypatch):
    with recorded_cupy.for_a_program(1, monkeypatch) as found:
        yield found


@pytest.fixture(scope="module")
def case():
    return random_case(3, num_modalities=2, num_labels=4, grid_shape=(5, 7, 6))


def refined(case, asked, monkeypatch):
    recorded_cupy.forget_engines()
    monkeypatch.setenv(VARIABLE, asked)
    found = refine(case.logits, case.image, spacing=(1.0, 1.5, 2.5), parameters=PARAMETERS, device="cuda")
    _ = found.logits
    return found


def test_all_modes_have_the_same_bits(machine, case, monkeypatch):
    """The host waits before and after each kernel only where it is asked to."""
    expected = None
    for asked in ("", "plain"):
        machine.notes.clear()
        found = refined(case, asked, monkeypatch)
        expected = expected or found
        np.testing.assert_array_equal(found.logits, expected.logits)
        assert found.energy == expected.energy
        kernels = [number for number, note in enumerate(machine.notes) if note != "wait"]
        assert len(kernels) > 20
        waits = [machine.notes[number - 1] == machine.notes[number + 1] == "wait" for number in kernels[:-1]]
        assert all(waits) if asked else not any(waits)


def test_an_error_names_its_kernel(machine, case, monkeypatch):
    """Though CUDA says so only when somebody waits."""
    machine.breaks_in = "update"
    with pytest.raises(DeviceLostError, match=r"in the kernel update of mean_field with .*'CRF_LABELS': 4.*cudaErrorIllegalAddress"):
        refined(case, "plain", monkeypatch)
    assert machine.notes[-2:] == ["wait", "update"]


@pytest.mark.parametrize("asked", ["plain,graphs", "Plain"])
def test_an_unknown_mode_is_refused(asked, machine, case, monkeypatch):
    """Also where `auto` would take the CPU if the GPU could not be used."""
    monkeypatch.setenv(VARIABLE, asked)
    for device in ("cuda", "auto"):
        with pytest.raises(ConfigError, match=f"CRFREFINE_CUDA is '{asked}'; expected plain, or nothing"):
            crfrefine.engines.get_backend(device)
