"""Statistics of differences: paired tests, intervals, corrections, comparison, verdict."""

from typing import TYPE_CHECKING

from crfrefine.base.submodules import on_first_use

if TYPE_CHECKING:
    from crfrefine.statistics import comparison as comparison
    from crfrefine.statistics import verdict as verdict

__getattr__, __dir__ = on_first_use(__name__)
