"""Cases for the tests of the page with sliders."""

import pytest


@pytest.fixture(scope="module")
def labeled_folders(tmp_path_factory):
    """Two cases with their labels."""
    from tune_helpers import write_labeled

    return write_labeled(tmp_path_factory.mktemp("cases"), "first", "second")


@pytest.fixture
def arguments(labeled_folders):
    cases, _ = labeled_folders
    return ("-i", cases.images, "-p", cases.logits, "-c", "default")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "corrections"
