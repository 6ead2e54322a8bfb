"""The page in a real browser: a slider changes contours and Dice, what is saved is what was shown,
and nothing is asked of elsewhere.
"""

import json

import numpy as np
import pytest
from cli_helpers import run_here
from tune_browser import (
    case_states,
    drag,
    drawn,
    expect_complaints,
    needs_browser,
    number,
    open_tab,
    picture,
    places_of,
    press,
    wait,
    wait_until_done,
)
from tune_helpers import open_page, open_session, options_for

from crfrefine.io import read_volume
from crfrefine.pictures.planes import PLANES

pytestmark = needs_browser


@pytest.fixture
def page(running, browser):
    with open_tab(running, browser) as driver:
        yield driver


def requested(driver):
    """Every address that the page asked for; the browser's own first page asks, too."""
    messages = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    sent = [
        message["params"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    return [params["request"]["url"] for params in sent if params["documentURL"].startswith("http")]


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

    first_look = page.execute_script(
        "return [getComputedStyle(document.querySelector('.fill')).opacity,"
        "document.querySelector('#window').selectedOptions[0].textContent]"
    )
    assert first_look == ["0", "automatic"]
    before = picture(page), dice(page), number(page)
    for share in (0.2, 0.4, 0.6):
        at_control(page, "bilateral.theta_alpha", SLIDE, share)
    at_control(page, "mean_field.num_iterations", SLIDE, 0.5)
    wait(page, "document.querySelector('#toml').textContent.includes('num_iterations = 10 ')")
    wait_until_done(page, before[2])
    assert picture(page) != before[0]
    assert dice(page) != before[1]
    shown = page.execute_script("return document.querySelector('#toml').textContent")
    assert saved.read_text() == shown
    page.execute_script("document.querySelector('#controls').open = true")
    page.find_element("id", "save").click()
    wait(page, "document.querySelector('#saved').textContent.startsWith('saved')")
    assert saved.read_text() == shown

    # What is shown is chosen by boxes, selects and sliders.
    seen = [picture(page)]
    for selector in ("#show-refined", "#show-reference", "#no-labels"):
        page.find_element("css selector", selector).click()
        seen.append(picture(page))
    page.find_element("id", "all-labels").click()
    for name, value in (("since", "network"), ("opacity", 60), ("width", 900), ("level", 600)):
        page.execute_script(
            "const node = document.getElementById(arguments[0]); node.value = arguments[1];"
            "for (const type of ['input', 'change']) node.dispatchEvent(new Event(type))",
            name,
            value,
        )
        seen.append(picture(page))
    assert len(set(seen)) == len(seen)
    position = "return document.querySelector('.plane output').textContent"
    first = page.execute_script(position)
    page.find_element("css selector", ".overlay").send_keys(Keys.PAGE_UP)
    assert page.execute_script(position) != first

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
    expect_complaints(page, "400")
    assert all(url.startswith((running.address, "data:")) for url in requested(page))
    page.find_element("id", "end").click()
    assert running.process.wait(30) == 0
    wait(page, "document.body.dataset.state === 'ended'")


# ---- Strokes

UPRIGHT = (15, 18, 11)  # voxels of the phantom, upright


def test_strokes_are_drawn_in_each_plane_undone_and_saved_for_infer(
    page, running, saved, labeled_folders, tmp_path
):
    names = page.execute_script(
        "return [...document.querySelectorAll('#tools label, #brushes label')]"
        ".map((node) => node.textContent)"
    )
    names_of_tools = ["crosshair", "move", "background", "erase", "measure"]
    assert names == [*names_of_tools, "label 1", "label 2", "label 3"]
    x, y, z = running.json("case/0/describe")["place"]
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
        former = number(page), picture(page, plane)
        press(page, key)
        is_seen = drag(page, plane, start, end, pointer)
        assert is_seen, "a stroke is seen while it is drawn"
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
        assert picture(page, plane) != former[1]
    assert dice(page) != before

    # The keyboard draws, too, and takes back what it drew.
    last = number(page)
    press(page, "2]")
    page.find_element("css selector", ".overlay").send_keys(" ")
    wait_until_done(page, last)
    assert drawn(page) > np.count_nonzero(expected)
    last = number(page)
    press(page, "z")
    wait_until_done(page, last)
    assert drawn(page) == np.count_nonzero(expected)
    last = number(page)
    press(page, "y")
    wait_until_done(page, last)
    assert drawn(page) > np.count_nonzero(expected)
    last = number(page)
    press(page, "z")
    wait_until_done(page, last)

    page.execute_script("document.querySelector('#controls').open = true")
    for button, told in (("save", "#saved"), ("save-case", "#saved-case")):
        page.find_element("id", button).click()
        wait(page, f"document.querySelector('{told}').textContent.startsWith('saved')")
    folder = saved.with_name("corrections")
    cases = labeled_folders[0]
    values = read_volume(folder / "strokes" / "first.nii.gz").data
    with open_session(options_for(cases)) as session:
        np.testing.assert_array_equal(session.case.upright.apply(values), expected)
    inputs = ("-i", cases.images, "-p", cases.logits, "-c", saved, "--strokes", folder / "strokes")
    run_here("infer", *inputs, "-o", tmp_path / "out", "--threads", 1, status=0)
    refined = read_volume(folder / "refined" / "first.nii.gz").data
    np.testing.assert_array_equal(refined, read_volume(tmp_path / "out" / "first.nii.gz").data)
    shown = page.execute_script(
        "return [...document.querySelectorAll('#scores tbody tr')].map((row) => "
        "row.cells[4].textContent)"
    )
    assert shown == [str(np.count_nonzero(refined == label)) for label in (1, 2, 3)]


# ---- A folder of cases

ZOOM = """
    const [number, [clientX, clientY], deltaY] = arguments;
    document.querySelectorAll('.overlay')[number].dispatchEvent(new WheelEvent('wheel',
        { clientX, clientY, deltaY, ctrlKey: true, bubbles: true, cancelable: true }));
"""


def test_a_folder_is_corrected_case_by_case(page, running, saved, labeled_folders, tmp_path):
    """Zoom, strokes in two planes, the next case, saving and reopening."""
    press(page, "[[2")
    voxel = (7, 5)
    before = picture(page)
    (place,) = places_of(page, 0, [voxel])
    for _ in range(4):
        page.execute_script(ZOOM, 0, place, -100)
    assert picture(page) != before
    # The voxel under the pointer has stayed there.
    last = number(page)
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    actions = ActionBuilder(page)
    actions.pointer_action.move_to_location(*map(round, place)).pointer_down().pointer_up()
    actions.perform()
    wait_until_done(page, last)
    page.find_element("id", "fit").click()
    last = number(page)
    drag(page, 1, (8, 1), (8, 3), "mouse")
    wait_until_done(page, last)
    assert drawn(page) == 4
    last = number(page)
    for _ in range(2):
        page.find_element("id", "undo").click()
    wait(page, "document.querySelector('#undo').disabled")
    page.find_element("id", "redo").click()
    page.find_element("id", "redo").click()
    wait(page, "document.querySelector('#redo').disabled")
    wait_until_done(page, last)
    assert drawn(page) == 4

    page.find_element("id", "save-case").click()
    wait(page, "document.querySelector('#saved-case').textContent.startsWith('saved')")
    press(page, ".")
    wait(page, "document.querySelector('#case').textContent === 'second'")
    wait_until_done(page)
    assert case_states(page) == ["saved", "untouched"]
    assert drawn(page) == 0
    last = number(page)
    press(page, "3")
    drag(page, 0, (5, 6), (7, 6), "mouse")
    wait_until_done(page, last)
    page.find_element("id", "save-case").click()
    wait(page, "document.querySelector('#saved-case').textContent.startsWith('saved')")

    # The first case again, with its strokes.
    page.find_element("css selector", "#case-menu").click()
    wait(page, "document.querySelectorAll('#case-list .state.saved').length === 2")
    page.find_element("css selector", "#case-list button").click()
    wait(page, "document.querySelector('#case').textContent === 'first'")
    wait_until_done(page)
    assert drawn(page) == 4
    page.execute_script("document.querySelector('#controls').open = true")
    page.find_element("id", "save").click()
    wait(page, "document.querySelector('#saved').textContent.startsWith('saved')")

    folder = saved.with_name("corrections")
    cases = labeled_folders[0]
    inputs = ("-i", cases.images, "-p", cases.logits, "-c", saved, "--strokes", folder / "strokes")
    run_here("infer", *inputs, "-o", tmp_path / "out", "--threads", 1, status=0)
    strokes = read_volume(folder / "strokes" / "first.nii.gz").data
    with open_session(options_for(cases)) as session:
        upright = session.case.upright.apply(strokes)
        through = session.case.first_place()[2]
    assert upright[(*voxel, through)] == 2
    for name in ("first", "second"):
        refined = read_volume(folder / "refined" / f"{name}.nii.gz").data
        expected = read_volume(tmp_path / "out" / f"{name}.nii.gz").data
        np.testing.assert_array_equal(refined, expected)

    # The order by change counts the changes of all cases.
    page.execute_script(
        "const node = document.getElementById('order'); node.value = '-1';"
        "node.dispatchEvent(new Event('change'))"
    )
    wait(
        page, "[...document.querySelectorAll('#case-list .count')].every((one) => one.textContent)"
    )


def test_every_control_has_a_name_and_a_narrow_page_is_no_wider_than_its_window(page):
    unnamed = page.execute_script(
        "return [...document.querySelectorAll('button, input, select, summary, .overlay')].filter("
        "(node) => !(node.ariaLabel || node.textContent.trim() || node.labels?.length || "
        "node.hidden)).map((node) => node.outerHTML)"
    )
    assert unnamed == []
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True},
    )
    page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    wait(page, "innerWidth === 390")
    assert page.execute_script("return document.documentElement.scrollWidth") <= 390
    small = page.execute_script(
        "return [...document.querySelectorAll('button, select, label.choice, summary')].filter("
        "(node) => node.checkVisibility() && node.getBoundingClientRect().height < 44).map("
        "(node) => node.outerHTML)"
    )
    assert small == []
    main, beside = page.execute_script(
        "return [...document.querySelectorAll('.overlay')].slice(0, 2).map((node) => "
        "node.clientWidth)"
    )
    assert main > 1.5 * beside > 60


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colors_of_text_meet_the_contrast_of_wcag_aa(scheme):
    import re
    from pathlib import Path

    import crfrefine.tune

    style = Path(crfrefine.tune.__file__).with_name("assets") / "tune.css"
    pairs = re.findall(r"--(\w+): light-dark\((#\w+), (#\w+)\)", style.read_text())
    colors = {name: both[scheme] for name, *both in pairs}

    def luminance(color):
        digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
        shares = np.array([int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)])
        linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    for text in ("ink", "faint", "better", "worse", "link"):
        for ground in ("paper", "card"):
            light, dark = sorted((luminance(colors[text]), luminance(colors[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)
