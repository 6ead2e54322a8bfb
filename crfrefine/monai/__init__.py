"""The CRF as transforms of MONAI, for `Compose` and the configurations of bundles.

It needs MONAI, which brings PyTorch.

    CrfRefine     refines logits by an image: one case, channels first, or a batch
    CrfRefined    the same on dictionaries

A configuration names them `"_target_": "crfrefine.monai.CrfRefined"` (docs/guide/monai.md).
"""

try:
    import monai as _monai  # noqa: F401
except ImportError as error:
    from crfrefine.errors import BackendUnavailableError

    raise BackendUnavailableError(
        f"crfrefine.monai needs MONAI ({error}): pip install 'crfrefine[monai]'"
    ) from error

from crfrefine.monai.transforms import CrfRefine as CrfRefine
from crfrefine.monai.transforms import CrfRefined as CrfRefined

CrfRefineD = CrfRefineDict = CrfRefined
