"""Statistics of differences: paired tests, intervals, corrections, comparison, verdict."""

from functools import partial
from typing import TYPE_CHECKING

from crfrefine.base.submodules import attributes_of, module_of

if TYPE_CHECKING:
    from crfrefine.statistics import comparison as comparison
    from crfrefine.statistics import verdict as verdict

__getattr__ = partial(module_of, __name__)
__dir__ = partial(attributes_of, __name__)
