"""The examples in the docstrings of the public names run and print what they say."""

import doctest
import importlib
import warnings

import pytest

import crfrefine

MODULES = {"refinement.case": "refine", "parameters.model": "CrfParameters", "layer.loss": "crf_loss", "layer.module": "CrfRnn"}


@pytest.mark.parametrize(("module", "name"), MODULES.items())
def test_every_public_name_that_does_something_has_an_example_that_runs(module, name):
    if module.startswith("layer"):
        pytest.importorskip("torch", reason="the layer needs PyTorch: pip install 'crfrefine[train]'")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = doctest.testmod(importlib.import_module(f"crfrefine.{module}"))
    assert found.attempted > 0 == found.failed
    assert ">>> " in getattr(crfrefine, name).__doc__
