"""The kernels' source text, with its headers inlined, as CuPy caches modules by their text.

Each kernel's parameters are found in its text, by which the arguments of a launch are checked and
put in order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.MULTILINE)
_KERNEL = re.compile(r"^CRF_(?:BLOCK_)?KERNEL\((\w+),([^)]*)\)\s*\{", re.MULTILINE)
_QUALIFIER = re.compile(r"\b(?:const|__restrict__) ")

# Names of numpy's types, by those of the kernels.
_TYPES = {
    "int": "int32",
    "int64": "int64",
    "uint8": "uint8",
    "uint16": "uint16",
    "uint32": "uint32",
    "uint64": "uint64",
    "double": "float64",
    "float": "float32",
    "Real": "float32",
    "Channels": "float32",
}

# Sources whose multiplications and additions must not be fused: integers that all engines share
# depend on them.
UNCONTRACTED = frozenset({"lattice_build"})


class Parameter(NamedTuple):
    """The type of a kernel's parameter."""

    dtype: np.dtype[Any]
    is_array: bool
    is_rows: bool  # an array of rows of CRF_WIDTH channels


class KernelSource(NamedTuple):
    """A source file ready for a compiler."""

    name: str  # file name without suffix
    text: str  # source with headers and constants
    kernels: dict[str, dict[str, Parameter]]  # the parameters of each kernel by name, in order
    options: tuple[str, ...]  # options for NVRTC

    def has_blocks(self, kernel: str) -> bool:
        """Return whether a kernel's threads share memory by block."""
        return f"CRF_BLOCK_KERNEL({kernel}," in self.text


def kernels_dir() -> Path:
    """Return the folder of the sources: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parents[2]
    inside = package / "kernels"
    return inside if inside.is_dir() else package.parent / "kernels"


def source_names() -> list[str]:
    """Return the name of every source file of the GPU engine."""
    return sorted(path.stem for path in (kernels_dir() / "cuda").glob("*.cu"))


@cache
def _inlined(name: str) -> str:
    """Return the text of a source file, each of whose headers is inlined once."""
    included: set[Path] = set()

    def read(path: Path) -> str:
        def include(match: re.Match[str]) -> str:
            beside = path.parent / match[1]
            header = beside if beside.is_file() else kernels_dir() / match[1]
            if header in included:
                return ""
            included.add(header)
            return read(header)

        text = path.read_text(encoding="utf-8").replace("#pragma once\n", "")
        return _INCLUDE.sub(include, text)

    return read(kernels_dir() / "cuda" / f"{name}.cu")


@cache
def kernel_source(name: str, /, **constants: int) -> KernelSource:
    """Return the text of kernels/cuda/<name>.cu for values of the constants that it requires.

    These are named CRF_*, in its first lines.
    """
    text = _inlined(name)
    kernels = {}
    for match in _KERNEL.finditer(text):
        parameters = {}
        for declaration in match[2].split(","):  # such as "const Real* scale"
            kind, _, own_name = _QUALIFIER.sub("", declaration).strip().rpartition(" ")
            base = kind.rstrip("*")
            dtype = np.dtype(_TYPES[base])
            parameters[own_name] = Parameter(dtype, kind.endswith("*"), base == "Channels")
        kernels[match[1]] = parameters

    options = ["-std=c++17"]
    if name in UNCONTRACTED:
        options.append("--fmad=false")
    if constants.get("CRF_WIDE_KEYS"):
        options.append("--device-int128")
    lines = [f"#define {key} {value}\n" for key, value in sorted(constants.items())]
    return KernelSource(name, "".join(lines) + text, kernels, tuple(options))


def pack_arguments(
    source: KernelSource, kernel: str, constants: Mapping[str, int], arguments: Mapping[str, Any]
) -> list[Any]:
    """Return the arguments of a launch in the driver's form, in the order of the parameters.

    Raises TypeError if one is missing, unknown or does not fit, which a GPU would not notice.
    """
    parameters = source.kernels[kernel]
    if arguments.keys() != parameters.keys():
        missing = sorted(parameters.keys() - arguments.keys())
        unknown = sorted(arguments.keys() - parameters.keys())
        raise TypeError(f"{source.name}.{kernel}: missing arguments {missing}, unknown {unknown}")
    packed = []
    for name, parameter in parameters.items():
        value = arguments[name]
        if not parameter.is_array:
            packed.append(parameter.dtype.type(value))
            continue
        if value is None:
            packed.append(np.uint64(0))
            continue
        is_contiguous = value.flags.c_contiguous
        if value.dtype != parameter.dtype or not is_contiguous:
            raise TypeError(
                f"{source.name}.{kernel}: {name} is a {value.dtype} array (contiguous: "
                f"{is_contiguous}); expected {parameter.dtype}"
            )
        if parameter.is_rows and value.shape[-1] != constants["CRF_WIDTH"]:
            raise TypeError(
                f"{source.name}.{kernel}: {name} has rows of {value.shape[-1]}; expected "
                f"{constants['CRF_WIDTH']}"
            )
        packed.append(value)
    return packed
