"""The page in a real browser: a slider changes contours and Dice, what is saved is what was shown, on a phone and in the dark."""

import numpy as np
import pytest
from browser_helpers import missing_browser, prefer, requested, resize, wait
from tune_helpers import missing_server, open_page

pytestmark = pytest.mark.skipif(
    bool(missing_browser() or missing_server()), reason=missing_browser() or missing_server() or "both are there"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("out") / "params.toml"


@pytest.fixture(scope="module")
def running(folders, saved):
    with open_page("-i", folders[0].images, "-p", folders[0].logits, "-l", folders[1], "-o", saved, "-c", "default") as page:
        yield page


@pytest.fixture
def page(browser, running):
    """The page, freshly opened; whatever it complains about on the console fails the test."""
    prefer(browser, "light")
    resize(browser, 1200)
    browser.get_log("browser")
    requested(browser)
    browser.get(running.address)
    wait_until_done(browser)
    yield browser
    assert browser.get_log("browser") == []


def wait_until_done(driver, after=0):
    wait(driver, f"document.body.dataset.state === 'done' && Number(document.body.dataset.number) > {after}")


def number(driver):
    return int(driver.execute_script("return document.body.dataset.number"))


def picture(driver):
    """The pixels of the first plane, once it is drawn."""
    wait(driver, "!document.querySelector('img[aria-busy=true]')")
    return driver.execute_script(
        "const image = document.querySelector('.plane img'), canvas = document.createElement('canvas');"
        "Object.assign(canvas, { width: image.naturalWidth, height: image.naturalHeight });"
        "canvas.getContext('2d').drawImage(image, 0, 0); return canvas.toDataURL()"
    )


def dice(driver):
    return driver.execute_script("return [...document.querySelectorAll('#scores tbody tr')].map((row) => row.cells[2].textContent)")


def slide(driver, name, share):
    driver.execute_script(
        "const node = document.querySelector(`[name='${arguments[0]}']`); node.value = Number(node.max) * arguments[1];"
        "node.dispatchEvent(new Event('input', { bubbles: true }))",
        name,
        share,
    )


def type_in(driver, name, value):
    driver.execute_script(
        "const slider = document.querySelector(`[name='${arguments[0]}']`), field = slider.parentElement.querySelector('[type=number]');"
        "field.value = arguments[1]; field.dispatchEvent(new Event('change'))",
        name,
        value,
    )


def told_beside(driver, name):
    """The text of a field, whether it is marked, the message beside it, and the place of its slider."""
    return driver.execute_script(
        "const slider = document.querySelector(`[name='${arguments[0]}']`), field = slider.parentElement.querySelector('[type=number]');"
        "const told = document.getElementById(field.getAttribute('aria-describedby'));"
        "return [field.value, field.getAttribute('aria-invalid'), told.hidden ? '' : told.textContent, slider.value]",
        name,
    )


def choose(driver, name, value):
    driver.execute_script(
        "const node = document.querySelector(arguments[0]); node.value = arguments[1]; node.dispatchEvent(new Event('change'))", name, value
    )


def test_sliders_change_what_is_shown_and_saved(page, running, saved):
    from selenium.webdriver.common.keys import Keys

    before = picture(page), dice(page), number(page)
    for share in (0.2, 0.4, 0.6):
        slide(page, "bilateral.theta_alpha", share)
    slide(page, "mean_field.num_iterations", 0.5)
    wait(page, "document.querySelector('#toml').textContent.includes('num_iterations = 10 ')")
    wait_until_done(page, before[2])
    assert picture(page) != before[0]
    assert dice(page) != before[1]
    shown = page.execute_script("return document.querySelector('#toml').textContent")
    assert not saved.exists()
    page.find_element("id", "save").click()
    wait(page, "document.querySelector('#saved').textContent.startsWith('saved')")
    assert saved.read_text() == shown

    seen = [picture(page)]
    for selector in ("#show-refined", "#show-changes", "#show-reference", "#no-labels"):
        page.find_element("css selector", selector).click()
        seen.append(picture(page))
    assert len(set(seen)) == len(seen)
    canvas = page.find_element("css selector", ".plane img")
    position = "return [...document.querySelectorAll('.plane output')].at(arguments[0]).textContent"
    for key, plane in ((Keys.PAGE_UP, 0), (Keys.ARROW_LEFT, -1)):
        first = page.execute_script(position, plane)
        canvas.send_keys(key)
        assert page.execute_script(position, plane) != first
    proportions = page.execute_script(
        "return [...document.querySelectorAll('.plane img')].map((node) => node.clientWidth / node.clientHeight)"
    )
    columns, rows, planes = 15 * 1.25, 18 * 1.0, 11 * 2.5  # mm; the phantom's axes are turned
    np.testing.assert_allclose(proportions, [columns / rows, columns / planes, rows / planes], rtol=0.02)

    # A value that is not allowed is marked beside the one that applies.
    name = "bilateral.theta_alpha"
    type_in(page, name, 4.5)
    wait(page, "document.querySelector('#toml').textContent.includes('theta_alpha = 4.5')")
    place = told_beside(page, name)[3]
    type_in(page, name, -3)
    wait(page, "document.querySelector('[aria-invalid=true]')")
    assert told_beside(page, name) == ["-3", "true", "must be greater than 0, got -3; 4.5 still applies", place]
    type_in(page, "mean_field.temperature", "")
    assert told_beside(page, "mean_field.temperature")[1:3] == ["true", "expected a number; 1 still applies"]
    assert "theta_alpha = 4.5" in page.execute_script("return document.querySelector('#toml').textContent")
    slide(page, name, 0.5)
    wait(page, "document.querySelectorAll('[aria-invalid=true]').length === 1")
    assert told_beside(page, name)[1:3] == ["false", ""]
    (complaint,) = page.get_log("browser")
    assert "400" in complaint["message"], "browsers log every refused request"

    assert all(url.startswith((running.address, "data:")) for url in requested(page))


@pytest.mark.long
def test_a_preset_can_be_chosen_again_and_the_network_s_contour_is_seen_over_the_refined_one(page):
    """With a weight of 0 both contours are the same."""
    shown, preset = "document.querySelector('#toml').textContent", "return document.querySelector('#preset').value"
    slide(page, "mean_field.num_iterations", 0.35)
    wait(page, f"{shown}.includes('num_iterations = 7 ')")
    assert page.execute_script(preset) == "changed"
    before = number(page)
    choose(page, "#preset", "")
    wait(page, f"{shown}.includes('num_iterations = 5 ')")
    wait_until_done(page, before)
    before = number(page)
    type_in(page, "bilateral.weight", 0)
    wait_until_done(page, before)
    wait(page, "document.querySelector('#status').textContent.startsWith('Whole case: 0 voxels changed')")
    with_both = picture(page)
    page.find_element("id", "show-network").click()
    assert picture(page) != with_both


@pytest.mark.long
def test_a_phone_shows_all_of_it_in_the_dark(page):
    prefer(page, "dark")
    resize(page, 360)
    wait(page, "document.querySelector('.plane img').clientWidth < 360")
    tops = "return [...document.querySelectorAll('#sliders input[type=range]')].map((node) => node.getBoundingClientRect().top)"
    assert page.execute_script(tops)[2] < 844, "the first sliders are in sight"
    page.execute_script("window.scrollBy(0, arguments[0])", page.execute_script(tops)[-1] - 700)
    wait(page, "document.querySelector('.plane img').getBoundingClientRect().top >= 0")
    assert max(page.execute_script("return [...document.querySelectorAll('td label')].map((node) => node.clientHeight)")) < 30, "one line"
    page.execute_script("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    levels = page.execute_script("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert sum(levels) < 200
    unnamed = page.execute_script(
        "return [...document.querySelectorAll('input, select, button, img')].filter((node) => !node.textContent.trim()"
        " && !node.labels?.length && !node.ariaLabel && !node.alt).map((node) => node.outerHTML)"
    )
    assert unnamed == []


def test_the_end_button_ends_the_program(browser, running):
    """The last test of the page that all share."""
    browser.get(running.address)
    wait_until_done(browser)
    browser.get_log("browser")
    browser.find_element("id", "end").click()
    assert running.process.wait(30) == 0
    wait(browser, "document.body.dataset.state === 'ended'")
    alive = "return [...document.querySelectorAll('button, input, select')].filter((node) => getComputedStyle(node).opacity > 0.6)"
    assert [node.get_attribute("id") for node in browser.execute_script(alive)] == []
    assert browser.get_log("browser") == []
