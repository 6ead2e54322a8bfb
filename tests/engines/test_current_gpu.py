"""On a stand-in for CuPy that records: contexts are only where work is, the caller's current GPU stays, and what plain mode waits for."""

from concurrent.futures import ThreadPoolExecutor

import cuda_shim
import numpy as np
import pytest
import recorded_cupy
from cli_helpers import run_process, write_folders
from oracles import Case, random_case
from strict_device import PARAMETERS

from crfrefine import ConfigError, refine
from crfrefine.engines import get_backend
from crfrefine.engines.cuda.mode import VARIABLE
from crfrefine.errors import DeviceLostError

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")


@pytest.fixture
def machine(monkeypatch):
    with recorded_cupy.for_a_program(2, monkeypatch) as found:
        yield found


@pytest.fixture
def case():
    found = random_case(3, num_modalities=2, num_labels=4, grid_shape=(7, 11, 9))
    return Case(found.logits, (900 * found.image).astype(np.int16), None, (1.0, 1.5, 2.5))


def refined(case, device="cuda:1", **options):
    return refine(case.logits, case.image, spacing=case.spacing, parameters=PARAMETERS, device=device, **options)


@pytest.mark.parametrize(("device", "expected"), [("cuda:2", [{2}]), pytest.param("cuda:2,1", [{1}, {2}], marks=pytest.mark.long)])
def test_a_command_opens_contexts_only_on_its_gpus(device, expected, tmp_path):
    """In all of its threads and processes: those that read, compute and write."""
    folders = write_folders(tmp_path, *"abcd")
    settings = ("--set", "mean_field.filter=truncated", "--set", "spatial.weight=0.5", "--threads", 1, "--save-logits")
    there = recorded_cupy.environment(tmp_path / "state", 3)
    result = run_process("infer", *folders.arguments, *settings, "--device", device, env=there, timeout=300)
    assert result.status == 0, result.stderr
    assert sorted(recorded_cupy.contexts_in(tmp_path / "state").values(), key=min) == expected


def test_the_callers_gpu_is_current_again(machine, case):
    """After a run, after an error in it, and in each thread; with the results of any GPU."""
    found = refined(case)
    _ = found.logits
    assert machine.current == 0
    assert machine.contexts == {0, 1}

    def stop(stage, step, num_steps):
        assert machine.current == 1
        raise KeyError(stage)

    with pytest.raises(KeyError):
        refined(case, progress=stop)
    assert machine.current == 0
    with ThreadPoolExecutor(1) as other:
        np.testing.assert_array_equal(other.submit(refined, case).result().label_map, found.label_map)
        assert other.submit(lambda: machine.current).result() == 0
    np.testing.assert_array_equal(refined(case, "cuda:0").label_map, found.label_map)
    np.testing.assert_array_equal(found.label_map, refined(case, "reference").label_map)


def test_a_gpu_that_is_current_already_stays_so(machine, case):
    """As PyTorch leaves it after work on tensors there: nothing happens on another one."""
    machine.set(1)
    _ = refined(case).logits
    assert machine.set_to == [1]
    assert (machine.current, machine.contexts) == (1, {1})


def test_a_gpu_that_another_process_has_costs_no_result(machine, case):
    """It can be current for nobody in this process; the thread stays, and is told once."""
    machine.refusing.add(0)
    message = r"GPU 0, which was current before work on GPU 1, cannot be set back to \(cudaErrorDevices"
    with pytest.warns(RuntimeWarning, match=message) as told:
        found = refined(case)
    assert len(told) == 1
    assert machine.current == 1
    np.testing.assert_array_equal(found.label_map, refined(case).label_map)


def in_mode(asked, case, monkeypatch):
    """A run with CRFREFINE_CUDA: without PyTorch's memory, and with a wait that names a kernel's error."""
    recorded_cupy.forget_engines()
    monkeypatch.setenv(VARIABLE, asked)
    found = refined(case)
    _ = found.logits
    return found


def test_all_modes_have_the_same_bits(machine, case, monkeypatch):
    """The host waits before and after each kernel only where it is asked to."""
    expected = None
    for asked in ("", "plain"):
        machine.notes.clear()
        found = in_mode(asked, case, monkeypatch)
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
        in_mode("plain", case, monkeypatch)
    assert machine.notes[-2:] == ["wait", "update"]


@pytest.mark.parametrize("asked", ["plain,graphs", "Plain"])
def test_an_unknown_mode_is_refused(asked, machine, monkeypatch):
    """Also where `auto` would take the CPU if the GPU could not be used."""
    monkeypatch.setenv(VARIABLE, asked)
    for device in ("cuda", "auto"):
        with pytest.raises(ConfigError, match=f"CRFREFINE_CUDA is '{asked}'; expected plain, or nothing"):
            get_backend(device)
