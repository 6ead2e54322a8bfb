"""Cases for the tests of the page with sliders, and their list."""

from dataclasses import replace

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


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folders of three cases, and that of their labels."""
    from tune_helpers import write_labeled

    return write_labeled(tmp_path_factory.mktemp("cases"), "a", "b", "c")


@pytest.fixture
def options(study, tmp_path):
    """Options of the page on the three cases, with a folder of corrections."""
    from tune_helpers import options_for

    return replace(options_for(*study), corrections=tmp_path / "corrections")


@pytest.fixture
def worklist(options):
    """The three cases as the page opens them."""
    from crfrefine.tune.finding import find_cases_to_show
    from crfrefine.tune.worklist import Worklist

    worklist = Worklist(options, find_cases_to_show(options))
    yield worklist
    worklist.end()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A browser with an empty tab, beside which tests open theirs."""
    from tune_browser import start_browser

    browser = start_browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.quit()
