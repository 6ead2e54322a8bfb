"""Metrics of label maps, of their lesions and of probabilities, for labels and regions.

    lesions    a row for each lesion: found, missed or false, its volume, place and Dice

`overlap.measure_case` and `lesion_scores.measure_lesions` have the metrics of a case.
"""

from functools import partial
from typing import TYPE_CHECKING

from crfrefine.base.submodules import attributes_of, module_of
from crfrefine.metrics.lesion_scores import lesions as lesions

if TYPE_CHECKING:
    from crfrefine.metrics import lesion_scores as lesion_scores
    from crfrefine.metrics import overlap as overlap

__getattr__ = partial(module_of, __name__)
__dir__ = partial(attributes_of, __name__)
