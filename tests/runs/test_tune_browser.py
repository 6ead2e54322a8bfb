"""The page in a real browser: a slider changes contours and Dice, what is saved is what was shown,
and nothing is asked of elsewhere.
"""

import importlib.util
import json
import shutil

import numpy as np
import pytest
from cli_helpers import run_here
from tune_helpers import missing_server, open_page, open_session, options_for

from crfrefine.io import read_volume
from crfrefine.runs.pictures.planes import PLANES

BROWSER = next(
    filter(
        None,
        map(
            shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        ),
    ),
    None,
)
# Nothing of it is to reach out for the network, and a container's root has no sandbox.
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run "
    "--disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --force-color-profile=srgb "
    "--window-size=1200,900"
)
pytestmark = [
    pytest.mark.skipif(bool(missing_server()), reason=missing_server() or "there is a server"),
    pytest.mark.skipif(
        not (BROWSER and shutil.which("chromedriver") and importlib.util.find_spec("selenium")),
        reason="needs selenium and Chromium: as root, `apt-get install chromium chromium-driver`",
    ),
]


@pytest.fixture
def page(running, tmp_path):
    """The page, freshly opened; whatever it complains about on the console fails the test."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in (*OPTIONS.split(), f"--user-data-dir={tmp_path}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))
    )
    try:
        driver.get(running.address)
        wait_until_done(driver)
        yield driver
        assert driver.get_log("browser") == []
    finally:
        driver.quit()


def requested(driver):
    """Every address that the page asked for; the browser's own first page asks, too."""
    messages = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    sent = [
        message["params"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    return [params["request"]["url"] for params in sent if params["documentURL"].startswith("http")]


def wait(driver, condition):
    """Until a condition in the page's own language holds."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 60, poll_frequency=0.02).until(
        lambda driver: driver.execute_script(f"return Boolean({condition})"), condition
    )


@pytest.fixture
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("out") / "params.toml"


@pytest.fixture
def running(labeled_folders, saved):
    cases, labels = labeled_folders
    outputs = ("-o", saved, "--corrections", saved.with_name("corrections"))
    with open_page(
        "-i", cases.images, "-p", cases.logits, "-l", labels, *outputs, "-c", "default"
    ) as page:
        yield page


def wait_until_done(driver, after=0):
    wait(
        driver,
        f"document.body.dataset.state === 'done' && Number(document.body.dataset.number) > {after}",
    )


def number(driver):
    return int(driver.execute_script("return document.body.dataset.number"))


def picture(driver):
    """The pixels of the first plane, once it is drawn."""
    wait(driver, "!document.querySelector('img[aria-busy=true]')")
    return driver.execute_script(
        "const image = document.querySelector('.plane img'), canvas = "
        "document.createElement('canvas');"
        "Object.assign(canvas, { width: image.naturalWidth, height: image.naturalHeight });"
        "canvas.getContext('2d').drawImage(image, 0, 0); return canvas.toDataURL()"
    )


def dice(driver):
    return driver.execute_script(
        "return [...document.querySelectorAll('#scores tbody tr')].map((row) => "
        "row.cells[2].textContent)"
    )


CONTROL = """
    const slider = document.querySelector(`[name='${arguments[0]}']`);
    const field = slider.parentElement.querySelector('[type=number]');
"""
SLIDE = """
    slider.value = Number(slider.max) * arguments[1];
    slider.dispatchEvent(new Event('input', { bubbles: true }));
"""
TYPE = "field.value = arguments[1]; field.dispatchEvent(new Event('change'))"
# The text of a field, whether it is marked, the message beside it, and the place of its slider.
LOOK = """
    const told = document.getElementById(field.getAttribute('aria-describedby'));
    const message = told.hidden ? '' : told.textContent;
    return [field.value, field.getAttribute('aria-invalid'), message, slider.value];
"""


def at_control(driver, name, script, *values):
    return driver.execute_script(CONTROL + script, name, *values)


def test_sliders_change_what_is_shown_and_saved(page, running, saved):
    from selenium.webdriver.common.keys import Keys

    before = picture(page), dice(page), number(page)
    for share in (0.2, 0.4, 0.6):
        at_control(page, "bilateral.theta_alpha", SLIDE, share)
    at_control(page, "mean_field.num_iterations", SLIDE, 0.5)
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
    position = "return document.querySelector('.plane output').textContent"
    first = page.execute_script(position)
    page.find_element("css selector", ".plane img").send_keys(Keys.PAGE_UP)
    assert page.execute_script(position) != first
    proportions = page.execute_script(
        "return [...document.querySelectorAll('.plane img')].map((node) => node.clientWidth / "
        "node.clientHeight)"
    )
    # mm; the phantom's axes are turned
    columns = 15 * 1.25
    rows = 18 * 1.0
    planes = 11 * 2.5
    np.testing.assert_allclose(
        proportions, [columns / rows, columns / planes, rows / planes], rtol=0.02
    )

    # A value that is not allowed is marked beside the one that applies.
    name = "bilateral.theta_alpha"
    at_control(page, name, TYPE, 4.5)
    wait(page, "document.querySelector('#toml').textContent.includes('theta_alpha = 4.5')")
    place = at_control(page, name, LOOK)[3]
    at_control(page, name, TYPE, -3)
    wait(page, "document.querySelector('[aria-invalid=true]')")
    message = "must be greater than 0, got -3; 4.5 still applies"
    assert at_control(page, name, LOOK) == ["-3", "true", message, place]
    at_control(page, name, SLIDE, 0.5)
    wait(page, "!document.querySelector('[aria-invalid=true]')")
    (complaint,) = page.get_log("browser")
    assert "400" in complaint["message"], "browsers log every refused request"
    assert all(url.startswith((running.address, "data:")) for url in requested(page))
    page.find_element("id", "end").click()
    assert running.process.wait(30) == 0
    wait(page, "document.body.dataset.state === 'ended'")


# ---- Strokes

UPRIGHT = (15, 18, 11)  # voxels of the phantom, upright


def drag(driver, number, start, end, kind):
    """Press a pointer on a voxel of a plane, (across, up), move it to another voxel, and let it go.

    The page has then `before`, the voxels that the plane's canvas showed, and `overlaid()`, those
    that it shows.
    """
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    places = driver.execute_script(
        "const image = document.querySelectorAll('.plane img')[arguments[0]];"
        "const box = image.getBoundingClientRect(), [across, up] = arguments[1];"
        "return arguments[2].map(([x, y]) => [box.left + (x + 0.5) * box.width / across, "
        "box.bottom - (y + 0.5) * box.height / up])",
        number,
        [UPRIGHT[axis] for axis in PLANES[number][1:3]],
        [start, end],
    )
    driver.execute_script(
        """
        const shown = document.querySelectorAll('.plane canvas')[arguments[0]];
        const { width, height } = shown;
        window.overlaid = () => {
          const canvas = Object.assign(document.createElement('canvas'), { width, height });
          const pen = canvas.getContext('2d');
          pen.drawImage(shown, 0, 0);
          const { data } = pen.getImageData(0, 0, width, height);
          return data.filter((value, place) => place % 4 === 3 && value).length;
        };
        const keep = () => { window.before = window.overlaid(); };
        document.addEventListener('pointerup', keep, { once: true, capture: true });
        """,
        number,
    )
    actions = ActionBuilder(driver, mouse=PointerInput(kind, kind), duration=20)
    actions.pointer_action.move_to_location(*map(round, places[0])).pointer_down()
    actions.pointer_action.move_to_location(*map(round, places[1])).pointer_up()
    actions.perform()


def drawn(driver):
    return int(
        driver.execute_script("return document.querySelector('#saved-case').textContent").split()[0]
    )


def press(driver, key):
    driver.find_element("tag name", "body").send_keys(key)


def test_strokes_are_drawn_in_each_plane_undone_and_saved_for_infer(
    page, running, saved, labeled_folders, tmp_path
):
    names = page.execute_script(
        "return [...document.querySelectorAll('#brushes label')].map((node) => node.textContent)"
    )
    assert names == ["crosshair", "label 1", "label 2", "label 3", "background", "erase"]
    x, y, z = running.json("describe")["place"]
    expected = np.zeros(UPRIGHT, int)
    before = dice(page)
    press(page, "[[")  # a brush of one voxel
    strokes = (  # plane, first and last voxel, key, value, pointer
        (0, (2, 3), (6, 3), "2", 2, "mouse"),
        (1, (8, 1), (8, 5), "0", 255, "touch"),
        (2, (4, 6), (7, 9), "3", 3, "pen"),
        (0, (3, 3), (4, 3), "e", 0, "touch"),
    )
    for plane, start, end, key, value, pointer in strokes:
        former = number(page), picture(page)
        press(page, key)
        drag(page, plane, start, end, pointer)
        wait_until_done(page, former[0])
        _, across, up, _ = PLANES[plane]
        steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
        place = [x, y, z]
        for step in range(steps + 1):
            place[across], place[up] = (
                a + (b - a) * step // steps for a, b in zip(start, end, strict=True)
            )
            expected[tuple(place)] = value
        x, y, z = place
        assert drawn(page) == np.count_nonzero(expected)
        assert picture(page) != former[1]
        assert page.execute_script("return [window.before, window.overlaid()]") == [steps + 1, 0]
    assert dice(page) != before

    # The keyboard draws, too, and takes back what it drew.
    last = number(page)
    press(page, "2]")
    page.find_element("css selector", ".plane img").send_keys(" ")
    wait_until_done(page, last)
    assert drawn(page) > np.count_nonzero(expected)
    last = number(page)
    press(page, "z")
    wait_until_done(page, last)
    assert drawn(page) == np.count_nonzero(expected)

    for button, told in (("save", "#saved"), ("save-case", "#saved-case")):
        page.find_element("id", button).click()
        wait(page, f"document.querySelector('{told}').textContent.startsWith('saved')")
    folder = saved.with_name("corrections")
    cases = labeled_folders[0]
    values = read_volume(folder / "strokes" / "first.nii.gz").data
    with open_session(options_for(cases)) as session:
        np.testing.assert_array_equal(session.case.pose.turn(values), expected)
    inputs = ("-i", cases.images, "-p", cases.logits, "-c", saved, "--strokes", folder / "strokes")
    run_here("infer", *inputs, "-o", tmp_path / "out", "--threads", 1, status=0)
    refined = read_volume(folder / "refined" / "first.nii.gz").data
    np.testing.assert_array_equal(refined, read_volume(tmp_path / "out" / "first.nii.gz").data)
    shown = page.execute_script(
        "return [...document.querySelectorAll('#scores tbody tr')].map((row) => "
        "row.cells[4].textContent)"
    )
    assert shown == [str(np.count_nonzero(refined == label)) for label in (1, 2, 3)]
