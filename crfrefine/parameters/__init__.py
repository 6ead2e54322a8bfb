"""Parameters: the tables of a parameter file, their checks, presets, and the model of a case."""

from functools import partial
from typing import TYPE_CHECKING

from crfrefine.base.submodules import attributes_of, module_of

if TYPE_CHECKING:
    from crfrefine.parameters import model as model
    from crfrefine.parameters import sections as sections

__getattr__ = partial(module_of, __name__)
__dir__ = partial(attributes_of, __name__)
