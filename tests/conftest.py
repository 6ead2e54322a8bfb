"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest

from crfrefine.backends import get_backend
from crfrefine.backends.base import Backend
from crfrefine.errors import BackendUnavailableError


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every backend in turn: a test that takes this fixture is written once and must hold for all of them."""
    try:
        return get_backend(request.param)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
