"""Parameters: the tables of a parameter file, their checks, TOML, presets, and their resolution for a case."""

from typing import TYPE_CHECKING

from crfrefine.base.submodules import on_first_use

if TYPE_CHECKING:
    from crfrefine.parameters import model as model
    from crfrefine.parameters import sections as sections

__getattr__, __dir__ = on_first_use(__name__)
