"""The examples in the docstrings of the public names run and print what they say."""

import doctest
import importlib
import warnings

import pytest

import crfrefine

MODULES = ("crfrefine.refinement.case", "crfrefine.parameters.model", "crfrefine.layer.loss", "crfrefine.layer.module")


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module(name):
    if name.startswith("crfrefine.layer"):
        pytest.importorskip("torch", reason="the layer needs PyTorch: pip install 'crfrefine[train]'")
    module = importlib.import_module(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("name", ["CrfParameters", "CrfRnn", "crf_loss", "refine"])
def test_every_public_name_that_does_something_has_an_example(name):
    if name in {"CrfRnn", "crf_loss"}:
        pytest.importorskip("torch", reason="the layer needs PyTorch: pip install 'crfrefine[train]'")
    assert ">>> " in getattr(crfrefine, name).__doc__
