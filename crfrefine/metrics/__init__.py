"""Metrics of label maps: overlap, distances, calibration, connected components; for labels and regions."""

from typing import TYPE_CHECKING

from crfrefine.base.submodules import on_first_use

if TYPE_CHECKING:
    from crfrefine.metrics import overlap as overlap

__getattr__, __dir__ = on_first_use(__name__)
