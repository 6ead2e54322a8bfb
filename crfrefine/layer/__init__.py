"""The CRF in PyTorch: the module, the function, autograd, and the parameters in learnable form. Needs PyTorch."""

from crfrefine.layer.module import CrfRnn as CrfRnn
