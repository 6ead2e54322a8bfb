"""The CRF in PyTorch: the module `CrfRnn`, the functions behind it, and the loss.

It needs PyTorch.
"""

from crfrefine.errors import BackendUnavailableError

try:
    import torch as torch
except ImportError as error:
    raise BackendUnavailableError(
        f"the trainable layer needs PyTorch ({error}): pip install 'crfrefine[train]'"
    ) from error

from crfrefine.layer import functional as functional
from crfrefine.layer.loss import crf_loss as crf_loss
from crfrefine.layer.loss import partial_cross_entropy as partial_cross_entropy
from crfrefine.layer.module import CrfRnn as CrfRnn
