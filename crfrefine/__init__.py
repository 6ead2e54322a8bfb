"""Refine 3-D medical segmentations with a dense CRF run as a recurrent network.

    refine              refine one case, given as arrays: a network's logits, the image, the spacing
    Plan                the CRF on one image, to refine it again with other logits or parameters
    RefinementResult    what `refine` returns: label map, marginals, logits, what changed, energy
    RegionScheme        overlapping regions, one sigmoid channel each, and the labels they become
    gaussian_filter     the fast Gaussian filter on any features, for arrays and tensors
    Lattice             its kernel, built once for many values
    bilateral_filter    smooth a volume and keep its edges
    CrfParameters       the parameters of the CRF: presets, TOML files, dotted keys
    CrfRnn              the CRF as a PyTorch module, to train it behind a network (needs PyTorch)
    crf_loss            the CRF as a term of a loss, to train from scribbles (needs PyTorch)

Modules, imported when they are first used:
    errors              the errors below
    layer               for training: partial_cross_entropy, functional.mean_field (needs PyTorch)
    metrics             overlap, distances, calibration of label maps: overlap.measure_case
    monai               transforms of MONAI: CrfRefine, CrfRefined (needs MONAI)
    nnunet              export_prediction: nnU-Net's logits, refined on the image's grid
    parameters          the sections of CrfParameters: sections.SpatialParameters
    statistics          whether a difference is real: comparison.summarize, verdict.verdict

`help(crfrefine.refine)` and so on have arguments, results and examples. The command
`crfrefine --help` works on files and folders.

Errors that a user can cause are kinds of CrfRefineError, and their messages say what to do:
    BackendUnavailableError    the device or engine is not available
    CapacityError              too large for the memory or the algorithm
    ConfigError                a parameter is unknown or outside its range
    ExportError                a CrfRnn cannot become part of an exported graph
    GridMismatchError          two files or arrays are on different grids
    InputError                 an array or file has unusable values
    UnsupportedFormatError     a file cannot be read or written as asked
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crfrefine.version import __version__ as __version__

if TYPE_CHECKING:
    from crfrefine import errors as errors
    from crfrefine import layer as layer
    from crfrefine import metrics as metrics
    from crfrefine import monai as monai
    from crfrefine import nnunet as nnunet
    from crfrefine import parameters as parameters
    from crfrefine import statistics as statistics
    from crfrefine.arrays.region_scheme import RegionScheme as RegionScheme
    from crfrefine.errors import BackendUnavailableError as BackendUnavailableError
    from crfrefine.errors import CapacityError as CapacityError
    from crfrefine.errors import ConfigError as ConfigError
    from crfrefine.errors import CrfRefineError as CrfRefineError
    from crfrefine.errors import ExportError as ExportError
    from crfrefine.errors import GridMismatchError as GridMismatchError
    from crfrefine.errors import InputError as InputError
    from crfrefine.errors import UnsupportedFormatError as UnsupportedFormatError
    from crfrefine.filters import Lattice as Lattice
    from crfrefine.filters import bilateral_filter as bilateral_filter
    from crfrefine.filters import gaussian_filter as gaussian_filter
    from crfrefine.layer.loss import crf_loss as crf_loss
    from crfrefine.layer.module import CrfRnn as CrfRnn
    from crfrefine.parameters.model import CrfParameters as CrfParameters
    from crfrefine.refinement.case import Plan as Plan
    from crfrefine.refinement.case import refine as refine
    from crfrefine.refinement.result import RefinementResult as RefinementResult

_ERRORS = (
    "BackendUnavailableError",
    "CapacityError",
    "ConfigError",
    "CrfRefineError",
    "ExportError",
    "GridMismatchError",
    "InputError",
    "UnsupportedFormatError",
)
_MODULES = ("errors", "layer", "metrics", "monai", "nnunet", "parameters", "statistics")
_NEED_TORCH = ("CrfRnn", "crf_loss", "layer")
_MODULE_OF = {
    "CrfParameters": "crfrefine.parameters.model",
    "CrfRnn": "crfrefine.layer.module",
    "Lattice": "crfrefine.filters",
    "Plan": "crfrefine.refinement.case",
    "RefinementResult": "crfrefine.refinement.result",
    "RegionScheme": "crfrefine.arrays.region_scheme",
    "bilateral_filter": "crfrefine.filters",
    "crf_loss": "crfrefine.layer.loss",
    "gaussian_filter": "crfrefine.filters",
    "refine": "crfrefine.refinement.case",
    **dict.fromkeys(_ERRORS, "crfrefine.errors"),
}

# The names that `import *` binds, and `help(crfrefine)` prints in full. Those that need PyTorch
# are not among them: importing it takes seconds, and the page of CrfRnn has a thousand lines on the
# methods of every PyTorch module. Nor are the errors, whose pages have a hundred lines each on the
# methods of every exception.
__all__ = [
    "CrfParameters",
    "Lattice",
    "Plan",
    "RefinementResult",
    "RegionScheme",
    "bilateral_filter",
    "gaussian_filter",
    "refine",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"crfrefine.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'crfrefine' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from importlib.util import find_spec

    # `help` and completion get every name that is listed: without PyTorch, these raise
    # BackendUnavailableError. `monai` is not among them, since importing MONAI takes many seconds.
    names = {"__version__", *_MODULE_OF, *_MODULES} - {"monai"}
    return sorted(names - (set(_NEED_TORCH) if find_spec("torch") is None else set()))
