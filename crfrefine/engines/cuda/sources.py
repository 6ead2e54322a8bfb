"""The kernels' source text, with its headers inlined, as CuPy caches modules by their text.

Each kernel's parameters are found in its text, by which the arguments of a launch are checked and
put in order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.MULTILINE)
_KERNEL = re.compile(r"^CRF_(?:BLOCK_)?KERNEL\((\w+),([^)]*)\)\s*\{", re.MULTILINE)
_QUALIFIER = re.compile(r"\b(?:const|__restrict__) ")

# numpy's types, by those of the kernels.
_TYPES: dict[str, type[np.generic]] = {
    "int": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "double": np.float64,
    "float": np.float32,
    "Real": np.float32,
    "Channels": np.float32,  # rows of CRF_WIDTH numbers
}

# Sources whose multiplications and additions must not be fused: integers that all engines share
# depend on them.
UNCONTRACTED = frozenset({"lattice_build"})


def kernels_dir() -> Path:
    """Return the folder of the sources: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parents[2]
    inside = package / "kernels"
    return inside if inside.is_dir() else package.parent / "kernels"


class KernelSource:
    """A source file ready for a compiler.

    Attributes:
        name: file name without suffix.
        text: source with headers and constants.
        kernels: the types of each kernel's parameters by name, in order, such as "int" or
            "Channels*".
        options: options for NVRTC.
    """

    def __init__(self, name: str, constants: Mapping[str, int]) -> None:
        """Read kernels/cuda/<name>.cu for values of the constants that it requires.

        These are named CRF_*, in its first lines. Each header is inlined once, where it comes
        first.
        """
        folder = kernels_dir()
        text = (folder / "cuda" / f"{name}.cu").read_text(encoding="utf-8")
        included = set()
        while match := _INCLUDE.search(text):
            header = ""
            if match[1] not in included:
                included.add(match[1])
                path = folder / match[1]
                header = path.read_text(encoding="utf-8").replace("#pragma once\n", "")
            text = text[: match.start()] + header + text[match.end() :]

        self.name = name
        self.kernels: dict[str, dict[str, str]] = {}
        for match in _KERNEL.finditer(text):
            parameters = {}
            for declaration in match[2].split(","):  # such as "const Real* scale"
                kind, _, parameter = _QUALIFIER.sub("", declaration).strip().rpartition(" ")
                parameters[parameter] = kind
            self.kernels[match[1]] = parameters

        self.options: tuple[str, ...] = ("-std=c++17",)
        if name in UNCONTRACTED:
            self.options += ("--fmad=false",)
        if constants.get("CRF_WIDE_KEYS"):
            self.options += ("--device-int128",)
        self._constants = constants
        lines = [f"#define {key} {value}\n" for key, value in sorted(constants.items())]
        self.text = "".join(lines) + text

    def has_blocks(self, kernel: str) -> bool:
        """Return whether a kernel's threads share memory by block."""
        return f"CRF_BLOCK_KERNEL({kernel}," in self.text

    def pack(self, kernel: str, arguments: Mapping[str, Any]) -> list[Any]:
        """Return the arguments of a launch in the driver's form, in the order of the parameters.

        Raises TypeError if one is missing, unknown or does not fit, which a GPU would not notice.
        """
        parameters = self.kernels[kernel]
        if arguments.keys() != parameters.keys():
            missing = sorted(parameters.keys() - arguments.keys())
            unknown = sorted(arguments.keys() - parameters.keys())
            raise TypeError(f"{self.name}.{kernel}: missing arguments {missing}, unknown {unknown}")
        packed = []
        for name, kind in parameters.items():
            value = arguments[name]
            base = kind.removesuffix("*")
            number = _TYPES[base]
            if kind == base:
                packed.append(number(value))
                continue
            if value is None:
                packed.append(np.uint64(0))
                continue
            is_contiguous = value.flags.c_contiguous
            if value.dtype != number or not is_contiguous:
                raise TypeError(
                    f"{self.name}.{kernel}: {name} is a {value.dtype} array (contiguous: "
                    f"{is_contiguous}); expected {number.__name__}"
                )
            if base == "Channels" and value.shape[-1] != self._constants["CRF_WIDTH"]:
                raise TypeError(
                    f"{self.name}.{kernel}: {name} has rows of {value.shape[-1]}; expected "
                    f"{self._constants['CRF_WIDTH']}"
                )
            packed.append(value)
        return packed
