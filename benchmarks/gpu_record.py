"""Records launches of the GPU engine's kernels, which `gpu_replay.py` plays on a GPU.

    python benchmarks/gpu_record.py RECORD.npz

No GPU is needed: the kernels run as C++ (`tests/helpers/cuda_shim.py`). Of each kernel, its
constants and the pointers that are null, one launch of the small cases of `gpu_every_kernel.py` is
kept: source text and options as CuPy gets them, grid and block, scalars, and every array before and
after. Each runs twice, its threads in order and in reverse: what then differs depends on who comes
first.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gpu_every_kernel import run_all
from gpu_replay import arguments_of, view
from numpy.typing import NDArray
from scripts import ROOT, new_parser

sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from cuda_shim import FilledXp, ShimDevice, run_kernel

from crfrefine.engines.cuda.cupy_device import BLOCK
from crfrefine.engines.cuda.sources import KernelSource, kernel_source, pack_arguments

_ENOUGH = 1 << 19
"""Bytes of a launch: the first one below is kept, or else the smallest."""
_UNWRITTEN = 0x55555555
"""What new memory is full of, so that a record is the same each time: as float32 1.5e13."""


class RecordingDevice(ShimDevice):
    """Remembers in `found` a launch of each kernel, its constants and its null pointers."""

    def __init__(self) -> None:
        super().__init__()
        self.xp = FilledXp(_UNWRITTEN)
        self.found: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._sizes: dict[tuple[Any, ...], int] = {}

    def prepare(self, source, kernel, constants, num_items, arguments):
        """Prepare a launch that is remembered when it runs."""
        # of these a kernel asks, and goes another way
        nulls = tuple(sorted(name for name, value in arguments.items() if value is None))
        key = source, kernel, tuple(sorted(constants.items())), nulls
        size = sum(value.nbytes for value in arguments.values() if isinstance(value, np.ndarray))
        run = super().prepare(source, kernel, constants, num_items, arguments)

        def launch() -> None:
            known = self._sizes.get(key, 1 << 62)
            if known <= _ENOUGH or size >= known:
                run()
                return
            self._sizes[key] = size
            text = kernel_source(source, constants)
            self.found[key] = _recorded(text, kernel, constants, num_items, arguments)

        return launch


def _recorded(
    source: KernelSource,
    kernel: str,
    constants: Mapping[str, int],
    num_items: int,
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """Run a launch: how to repeat it, and what it leaves."""
    launch: dict[str, Any] = {"source": source, "kernel": kernel, "constants": dict(constants)}
    if source.has_blocks(kernel):
        launch |= {"grid": num_items, "block": constants["CRF_THREADS"]}
    else:
        launch |= {"grid": -(-num_items // BLOCK), "block": BLOCK}
    names = list(source.kernels[kernel])
    launch["names"] = names
    pieces = _pieces([value for value in arguments.values() if isinstance(value, np.ndarray)])
    launch["arguments"] = []
    in_order = pack_arguments(source, kernel, constants, arguments)
    for name, packed in zip(names, in_order, strict=True):
        described = None if arguments[name] is None else _described(packed, pieces)
        launch["arguments"].append(described)
    before = [_content(piece) for piece in pieces]
    reverse = [piece.copy() for piece in before]
    again = dict(zip(names, arguments_of(launch, reverse), strict=True))
    for name, value in arguments.items():
        if value is None:
            again[name] = None
    run_kernel(source, kernel, constants, num_items, again, order=0)
    run_kernel(source, kernel, constants, num_items, arguments)
    after = [_content(piece) for piece in pieces]
    launch["memory"] = list(zip(before, after, strict=True))
    for argument in launch["arguments"]:
        if argument is not None and "piece" in argument:
            argument["order"] = _order(view(argument, after), view(argument, reverse))
    return launch


def _content(piece: tuple[int, int]) -> NDArray[np.uint8]:
    begin, end = piece
    return np.frombuffer(ctypes.string_at(begin, end - begin), dtype=np.uint8).copy()


def _pieces(arrays: Sequence[NDArray[Any]]) -> list[tuple[int, int]]:
    """(begin, end) of the memory that arrays lie in; those that overlap share a piece."""
    found: list[tuple[int, int]] = []
    ends = [(array.ctypes.data, array.ctypes.data + array.nbytes) for array in arrays]
    for begin, end in sorted(ends):
        if found and (begin < found[-1][1] or (begin, end) == found[-1]):
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def _described(value: Any, pieces: Sequence[tuple[int, int]]) -> dict[str, Any]:
    dtype = str(value.dtype)
    if not isinstance(value, np.ndarray):
        return {"value": value.item(), "dtype": dtype}
    begin = value.ctypes.data
    piece = 0
    while not pieces[piece][0] <= begin <= begin + value.nbytes <= pieces[piece][1]:
        piece += 1
    offset = begin - pieces[piece][0]
    return {"piece": piece, "offset": offset, "dtype": dtype, "shape": list(value.shape)}


def _order(one: NDArray[Any], other: NDArray[Any]) -> str:
    """Whether what a kernel writes keeps its order, whoever comes first, only its set, or none."""
    if one.tobytes() == other.tobytes():
        return "kept"
    if np.array_equal(np.sort(one, axis=None), np.sort(other, axis=None)):
        return "set"
    return "any"


def write(path: Path, launches: Sequence[dict[str, Any]]) -> None:
    """Write a record; arrays and source texts that occur twice are stored once."""
    arrays: dict[str, NDArray[np.uint8]] = {}
    entries = []

    def store(array: NDArray[np.uint8]) -> str:
        name = hashlib.sha256(array.tobytes()).hexdigest()[:16]
        arrays[name] = array
        return name

    for launch in launches:
        source = launch["source"]
        text = store(np.frombuffer(source.text.encode(), dtype=np.uint8))
        memory = [(store(before), store(after)) for before, after in launch["memory"]]
        source = {"source": source.name, "text": text, "options": source.options}
        entries.append({**launch, **source, "memory": memory})
    index = np.frombuffer(json.dumps(entries).encode(), dtype=np.uint8)
    np.savez_compressed(path, index=index, **arrays)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("record", type=Path)
    record = parser.parse_args().record
    started = time.perf_counter()
    device = RecordingDevice()
    run_all(device)
    write(record, list(device.found.values()))
    size = record.stat().st_size / 2**20
    seconds = time.perf_counter() - started
    kernels = f"{len(device.found)} kernels with their constants"
    print(f"{record}: {kernels}, {size:.1f} MiB, {seconds:.0f} s")


if __name__ == "__main__":
    main()
