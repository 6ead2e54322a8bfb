"""Modules of examples/ and benchmarks/, imported as `python FOLDER/NAME.py` does."""

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def importing_from(*folders):
    """Give a function that imports a module by its name; forget all modules of the folders
    afterwards.
    """
    with pytest.MonkeyPatch.context() as patch:
        for folder in folders:
            patch.syspath_prepend(str(folder))
        yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent in folders:
            del sys.modules[name]
