"""The page in several tabs: all show one state, and a tab that is behind can neither change nor save nor see parts of two states."""

import pytest
from browser_helpers import missing_browser, open_browser, wait
from cli_helpers import load_nifti, save_nifti
from tune_helpers import missing_server, open_page, open_session, options_for, write_labeled

from crfrefine.apps.tune.session import BehindError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("cases")
    folders, labels = write_labeled(root, "first", "second")
    for path in root.rglob("second*"):
        save_nifti(path, load_nifti(path)[:-2])
    return folders, labels


@pytest.fixture
def session(folders, tmp_path):
    with open_session(options_for(*folders, output=tmp_path / "saved.toml")) as session:
        yield session


def test_a_tab_that_is_behind_changes_saves_and_sees_nothing(session, tmp_path):
    behind = session.describe()
    present = session.take_case(behind["number"], "second")
    for act in (
        lambda number: session.change(number, {"bilateral.weight": 3.0}, behind["place"]),
        lambda number: session.take_preset(number, "default"),
        lambda number: session.take_case(number, "first"),
        session.save,
    ):
        with pytest.raises(BehindError, match="in another tab"):
            act(behind["number"])
    with pytest.raises(BehindError):
        session.plane(behind["opened"], 0, 5, 0)
    assert session.describe() == present
    news = session.news(0, 0.0)
    assert news["number"] == present["opened"] > behind["number"]
    assert news["result"] is None or news["result"]["number"] == present["opened"]
    columns, rows, _ = present["grid"]
    assert len(session.plane(present["opened"], 0, 5, 0)) == 7 * columns * rows
    assert not (tmp_path / "saved.toml").exists()
    session.save(present["number"])
    assert (tmp_path / "saved.toml").read_text() == present["toml"]
    assert "on case second" in present["toml"]
    changed = session.change(present["number"], {"bilateral.weight": 3.0})
    assert session.describe()["opened"] == present["opened"] < changed["number"], "the case is the same"


def test_a_case_that_is_read_while_another_tab_changes_something_is_not_shown(session, monkeypatch):
    opened, first = session._open, session.describe()

    def change_meanwhile(number):
        session.change(first["number"], {"bilateral.weight": 3.0})
        return opened(number)

    monkeypatch.setattr(session, "_open", change_meanwhile)
    with pytest.raises(BehindError):
        session.take_case(first["number"], "second")
    assert (session.describe()["case"], session.describe()["opened"]) == ("first", first["opened"])
    assert "weight = 3.0" in session.parameters()["toml"]


SEEN = """
const text = (selector) => document.querySelector(selector).textContent;
return [document.querySelector('#case').value, text('#grid'), text('#scores tbody'), text('#toml'),
  decodeURIComponent(document.querySelector('#download').href.split(',').slice(1).join(',')),
  [...document.querySelectorAll('#sliders input, #sliders select')].map((node) => node.value)]
"""
HOLD_NEWS = """
const asked = window.fetch;
window.fetch = (...sent) => (sent[0].startsWith('news') ? new Promise(() => { window.isHeld = true; }) : asked(...sent));
"""
CHOOSE = "const node = document.querySelector(arguments[0]); node.value = arguments[1]; node.dispatchEvent(new Event(arguments[2]))"


@pytest.mark.long
@pytest.mark.skipif(bool(missing_browser() or missing_server()), reason=missing_browser() or missing_server() or "both are there")
def test_two_tabs_of_a_browser_show_the_same_and_save_what_they_show(folders, tmp_path):
    saved = tmp_path / "saved.toml"
    arguments = ("-i", folders[0].images, "-p", folders[0].logits, "-l", folders[1], "-o", saved)
    with open_page(*arguments) as page, open_browser(tmp_path / "profile") as driver:

        def seen(tab):
            driver.switch_to.window(tab)
            wait(driver, "document.body.dataset.state === 'done'")
            return driver.execute_script(SEEN)

        one = driver.current_window_handle
        driver.get(page.address)
        driver.switch_to.new_window("tab")
        other = driver.current_window_handle
        driver.get(page.address)
        before = seen(other)
        assert before[3] == before[4]
        driver.execute_script(CHOOSE, "#case", "second", "change")
        wait(driver, "document.querySelector('#case').value === 'second' && document.querySelector('#scores tbody').textContent")
        after = seen(other)
        assert all(old != new for old, new in zip(before[:5], after[:5], strict=True))
        driver.switch_to.window(one)
        wait(driver, "document.querySelector('#case').value === 'second' && document.querySelector('#scores tbody').textContent")
        assert seen(one) == after

        # A tab that has not heard yet saves nothing, and shows what it would have saved.
        driver.execute_script(HOLD_NEWS)
        driver.execute_script(CHOOSE, "[name='mean_field.num_iterations']", "7", "input")
        wait(driver, "window.isHeld && document.querySelector('#toml').textContent.includes('num_iterations = 7')")
        page.json("change", {"number": page.json("describe")["number"], "changes": {"bilateral.weight": 7.5}})
        assert "weight = 7.5" not in driver.find_element("id", "toml").text
        driver.find_element("id", "save").click()
        wait(driver, "document.querySelector('#error').textContent.includes('in another tab')")
        assert not saved.exists()
        shown = driver.execute_script(SEEN)
        assert "weight = 7.5" in shown[3]
        assert "num_iterations = 7" in shown[3]
        driver.find_element("id", "save").click()
        wait(driver, "document.querySelector('#saved').textContent.startsWith('saved')")
        assert saved.read_text() == shown[3] == shown[4]
