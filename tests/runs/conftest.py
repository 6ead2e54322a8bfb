"""Cases for the tests of the page with sliders."""

import pytest


@pytest.fixture(scope="module")
def labeled_folders(tmp_path_factory):
    """Two cases with their labels."""
    from tune_helpers import write_labeled

    return write_labeled(tmp_path_factory.mktemp("cases"), "first", "second")
