"""Refine 3-D medical segmentations with a dense CRF run as a recurrent network.

The public names are imported on first use, so that `import crfrefine` costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crfrefine.errors import BackendUnavailableError as BackendUnavailableError
    from crfrefine.errors import CapacityError as CapacityError
    from crfrefine.errors import ConfigError as ConfigError
    from crfrefine.errors import CrfRefineError as CrfRefineError
    from crfrefine.errors import GridMismatchError as GridMismatchError
    from crfrefine.errors import InputError as InputError
    from crfrefine.errors import UnsupportedFormatError as UnsupportedFormatError
    from crfrefine.layer.module import CrfRnn as CrfRnn
    from crfrefine.parameters.model import CrfParameters as CrfParameters
    from crfrefine.refinement import RefinementResult as RefinementResult
    from crfrefine.refinement import refine as refine

__version__ = "0.1.0"

_ERRORS = (
    "BackendUnavailableError",
    "CapacityError",
    "ConfigError",
    "CrfRefineError",
    "GridMismatchError",
    "InputError",
    "UnsupportedFormatError",
)
_MODULE_OF = {
    "CrfParameters": "crfrefine.parameters.model",
    "CrfRnn": "crfrefine.layer.module",
    "RefinementResult": "crfrefine.refinement",
    "refine": "crfrefine.refinement",
    **dict.fromkeys(_ERRORS, "crfrefine.errors"),
}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'crfrefine' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
