"""Fixtures shared by all tests."""

import gc
import signal
import subprocess

import pytest
from cuda_shim import shim_backend
from oracles import torch64
from strict_device import serve

from crfrefine.engines import get_backend
from crfrefine.errors import BackendUnavailableError

# A job in the background ignores Ctrl-C, and so would the processes that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported and collected stays to the end: garbage is not looked for in it."""
    gc.disable()
    found = yield
    gc.freeze()
    gc.enable()
    return found


def _load(name, monkeypatch):
    serve(monkeypatch, "cuda-shim", lambda _: shim_backend())
    serve(monkeypatch, "torch", lambda _: torch64())
    try:
        return get_backend(name)
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["torch", "cpu", "cuda-shim", ON_GPU])
def backend(request, monkeypatch):
    """Every backend in turn: a test that takes this fixture is written once and must hold for all
    of them.

    `cuda-shim` is the GPU engine with its kernels compiled as C++; `cuda` needs a GPU; `torch`
    computes in float64.
    """
    return _load(request.param, monkeypatch)


@pytest.fixture(params=["cpu", "cuda-shim", ON_GPU])
def compiled_backend(request, monkeypatch):
    """Those to be compared with plain tensor operations."""
    return _load(request.param, monkeypatch)


@pytest.fixture
def folders(tmp_path, request):
    """Small cases as files: a, b and c, or the CASES of the test's module."""
    from cli_helpers import write_folders

    return write_folders(tmp_path, *getattr(request.module, "CASES", "abc"))


@pytest.fixture(autouse=True)
def _no_folders_of_nnunet(monkeypatch):
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def control_group(tmp_path, monkeypatch):
    """The folder of this process's control group, job in pod, as containers have it: empty."""
    (tmp_path / "cgroup").write_text("0::/pod/job\n", encoding="ascii")
    job = tmp_path / "sys/pod/job"
    job.mkdir(parents=True)
    for name, place in (("ROOT", "sys"), ("OWN_GROUP", "cgroup")):
        monkeypatch.setattr(f"crfrefine.base.limits.{name}", tmp_path / place)
    return job


@pytest.fixture
def one_torch_thread():
    """PyTorch with one thread: several would only wait for each other in tiny problems, and sums
    depend on how many there are.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB: enough for label maps, not for probabilities."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", mounted],
        capture_output=True,
        check=False,
    ).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield mounted
    subprocess.run(["umount", mounted], check=True)
