"""The kernels' source text: headers inlined, as modules are cached by their text, and each kernel's arguments."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.MULTILINE)
_KERNEL = re.compile(r"^CRF_(?:BLOCK_)?KERNEL\((\w+),([^)]*)\)\s*\{", re.MULTILINE)

_TYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name) for name in ("int64", "uint8", "uint16", "uint32", "uint64")
}
_TYPES |= {"int": np.dtype("int32"), "double": np.dtype("float64")}
_TYPES |= dict.fromkeys(("float", "Real", "Channels"), np.dtype("float32"))

# Sources whose multiplications and additions must not be fused: integers that all engines share depend on them.
UNCONTRACTED = frozenset({"lattice_build"})


class Parameter(NamedTuple):
    """A parameter of a kernel."""

    name: str
    dtype: np.dtype[Any]
    is_array: bool
    is_rows: bool  # an array of rows of CRF_WIDTH channels


class KernelSource(NamedTuple):
    """A source file ready for a compiler."""

    name: str  # file name without suffix
    text: str  # source with headers and constants
    kernels: dict[str, tuple[Parameter, ...]]  # the parameters of each kernel
    options: tuple[str, ...]  # options for NVRTC


def kernels_dir() -> Path:
    """The folder of the engine's sources: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parents[2]
    inside = package / "kernels"
    return inside if inside.is_dir() else package.parent / "kernels"


def source_names() -> list[str]:
    """Every source file of the GPU engine."""
    return sorted(path.stem for path in (kernels_dir() / "cuda").glob("*.cu"))


@cache
def _inlined(name: str) -> str:
    done: set[Path] = set()

    def read(path: Path) -> str:
        def include(match: re.Match[str]) -> str:
            beside = path.parent / match[1]
            header = beside if beside.is_file() else kernels_dir() / match[1]
            if header in done:
                return ""
            done.add(header)
            return read(header)

        return _INCLUDE.sub(include, path.read_text(encoding="utf-8").replace("#pragma once\n", ""))

    return read(kernels_dir() / "cuda" / f"{name}.cu")


def kernel_source(name: str, constants: Mapping[str, int]) -> KernelSource:
    """Return the text of kernels/cuda/<name>.cu for values of the CRF_* constants that its first lines require."""
    return _with_constants(name, tuple(sorted(constants.items())))


@cache
def _with_constants(name: str, constants: tuple[tuple[str, int], ...]) -> KernelSource:
    text, kernels = _inlined(name), {}
    for match in _KERNEL.finditer(text):
        parameters = []
        for declaration in match[2].split(","):
            kind, _, label = (
                declaration.replace("const ", "")
                .replace("__restrict__ ", "")
                .strip()
                .rpartition(" ")
            )
            base = kind.rstrip("*")
            parameters.append(
                Parameter(label, _TYPES[base], kind.endswith("*"), base == "Channels")
            )
        kernels[match[1]] = tuple(parameters)
    options = ["-std=c++17"]
    options += ["--fmad=false"] if name in UNCONTRACTED else []
    options += ["--device-int128"] if dict(constants).get("CRF_WIDE_KEYS") else []
    defines = "".join(f"#define {key} {value}\n" for key, value in constants)
    return KernelSource(name, defines + text, kernels, tuple(options))


def pack_arguments(
    source: KernelSource, kernel: str, constants: Mapping[str, int], arguments: Sequence[Any]
) -> list[Any]:
    """Return the arguments of a launch in the driver's form; raise TypeError if one does not fit, which a GPU would not notice."""
    parameters = source.kernels[kernel]
    if len(arguments) != len(parameters):
        raise TypeError(
            f"{source.name}.{kernel}: {len(arguments)} arguments for {len(parameters)} parameters"
        )
    packed = []
    for parameter, value in zip(parameters, arguments, strict=True):
        where = f"{source.name}.{kernel}: {parameter.name}"
        if not parameter.is_array:
            packed.append(parameter.dtype.type(value))
        elif value is None:
            packed.append(np.uint64(0))
        else:
            if value.dtype != parameter.dtype or not value.flags.c_contiguous:
                raise TypeError(
                    f"{where} is a {value.dtype} array (contiguous: {value.flags.c_contiguous}); expected {parameter.dtype}"
                )
            if parameter.is_rows and value.shape[-1] != constants["CRF_WIDTH"]:
                raise TypeError(
                    f"{where} has rows of {value.shape[-1]}; expected {constants['CRF_WIDTH']}"
                )
            packed.append(value)
    return packed
