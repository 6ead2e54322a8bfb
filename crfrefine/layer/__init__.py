"""The CRF in PyTorch: the module, the function, autograd, the parameters in learnable form, and the loss. Needs PyTorch."""

from crfrefine.layer import functional as functional
from crfrefine.layer.loss import crf_loss as crf_loss
from crfrefine.layer.loss import partial_cross_entropy as partial_cross_entropy
from crfrefine.layer.module import CrfRnn as CrfRnn
