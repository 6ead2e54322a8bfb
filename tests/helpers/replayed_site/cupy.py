"""What `benchmarks/gpu_replay.py` uses of CuPy, for its processes: memory is numpy's, kernels run as C++.

REPLAY_LIBRARIES in the environment has the libraries that `cuda_shim.py` has made, by the hash of their text. REPLAY_FAULTS plants
faults, a word per kernel and width (`blur 4`):

| fault | what happens |
| --- | --- |
| `wrong` | the kernel leaves one number that is not the right one |
| `outside` | it writes one byte behind an array |
| `sticky` | it is an error of CUDA, and from then on everything is, in this process |
| `hang` | it never ends, nor does a process that it starts, whose number is then in the file REPLAY_STARTED |
| `crash` | it ends the process |
| `compile` | its source does not compile |
| `absent` | of any kernel: there is no driver |
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

_LIBRARIES: dict[str, str] = json.loads(os.environ["REPLAY_LIBRARIES"])
_FAULTS: dict[str, str] = json.loads(os.environ.get("REPLAY_FAULTS", "{}"))
_pending: list[str] = []  # faults that show once somebody waits
_lost = False

asnumpy = np.array


def asarray(array: Any) -> Any:
    _use()
    return np.array(array)


class RawModule:
    def __init__(self, *, code: str, options: tuple[str, ...], backend: str) -> None:
        assert backend == "nvrtc"
        assert all(option.startswith("-") for option in options)
        self._code = code

    def get_function(self, name: str) -> Any:
        width = re.search(r"#define CRF_WIDTH (\d+)", self._code)
        fault = _FAULTS.get(f"{name} {width[1]}" if width else name, "")
        if fault == "compile":
            raise ValueError(f"{name}: error: identifier is undefined")
        library = ctypes.CDLL(_LIBRARIES[hashlib.sha256(self._code.encode()).hexdigest()])
        has_blocks = re.search(rf"CRF_BLOCK_KERNEL\({name},", self._code) is not None

        def launch(grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...], *, shared_mem: int) -> None:
            _use()
            assert shared_mem == 0
            arrays = [value for value in arguments if isinstance(value, np.ndarray)]
            held = [np.array(np.uint64(value.ctypes.data) if isinstance(value, np.ndarray) else value) for value in arguments]
            pointers = (ctypes.c_void_p * len(held))(*(cell.ctypes.data for cell in held))
            run = getattr(library, f"launch_{name}")
            run.restype = ctypes.c_char_p
            found = run(ctypes.c_longlong(grid[0] * (1 if has_blocks else block[0])), ctypes.c_int(1), pointers)
            assert found is None, found
            _plant(fault, arrays)

        return launch


def _plant(fault: str, arrays: list[Any]) -> None:
    if fault == "wrong":
        arrays[-1].reshape(-1)[-1] += 1
    elif fault == "outside":
        end = arrays[-1].ctypes.data + arrays[-1].nbytes
        ctypes.memset(end, 0, 1)
    elif fault:
        _pending.append(fault)


def _use() -> None:
    if _lost:
        raise RuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered")


def _wait() -> None:
    global _lost
    if "absent" in _FAULTS.values():
        raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version")
    if "sticky" in _pending:
        _lost = True
    if "crash" in _pending:
        os.abort()
    if "hang" in _pending:
        started = subprocess.Popen(["sleep", "600"])
        Path(os.environ["REPLAY_STARTED"]).write_text(str(started.pid), encoding="ascii")
        started.wait()
    _use()


class _Event:
    def record(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        _wait()


cuda = SimpleNamespace(
    Event=_Event,
    get_elapsed_time=lambda begin, end: 1e3 * (end.seconds - begin.seconds),
    runtime=SimpleNamespace(deviceSynchronize=_wait),
)
