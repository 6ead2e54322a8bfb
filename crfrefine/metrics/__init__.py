"""Metrics of label maps and of probabilities, for labels and regions."""

from functools import partial
from typing import TYPE_CHECKING

from crfrefine.base.submodules import attributes_of, module_of

if TYPE_CHECKING:
    from crfrefine.metrics import overlap as overlap

__getattr__ = partial(module_of, __name__)
__dir__ = partial(attributes_of, __name__)
