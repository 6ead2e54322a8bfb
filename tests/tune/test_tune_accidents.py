"""What happens to strokes when hands, keys, tabs and connections do what nobody meant."""

import json
from urllib.parse import quote

import numpy as np
import pytest
from tune_browser import (
    case_states,
    connect,
    correcting,
    drawn,
    expect_complaints,
    is_shown,
    needs_browser,
    number,
    places_of,
    pointer,
    press,
    stroke,
    wait,
    wait_for_case,
    wait_until_done,
)

pytestmark = needs_browser


POINTERS = """
    const [number, events] = arguments;
    const overlay = document.querySelectorAll('.overlay')[number];
    overlay.setPointerCapture = () => {}; // No such pointers are there.
    for (const [type, pointerId, pointerType, [clientX, clientY]] of events) {
        overlay.dispatchEvent(new PointerEvent(type, { pointerId, pointerType, clientX, clientY,
            bubbles: true, button: 0 }));
    }
"""


def move_pointers(driver, *events):
    """Several pointers at once, by their numbers and kinds; the browser's own driver has one."""
    driver.execute_script(POINTERS, 0, events)


def wait_for_file(driver, path):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 60, poll_frequency=0.02).until(lambda _: path.exists(), str(path))


def edits_of(folder, name="first"):
    content = json.loads((folder / "drawing" / f"{name}.json").read_text())
    edits = []
    for edit in content["edits"][: content["done"]]:
        edits.append((edit["value"], sum(edit["runs"][1])))
    return edits


def test_a_hand_beside_the_pen_takes_no_stroke_away_and_draws_none(arguments, folder, browser):
    with correcting(arguments, folder, browser) as (_, page):
        press(page, "2[[")
        last = number(page)
        start, end, palm = places_of(page, 0, [(2, 3), (6, 3), (10, 12)])
        move_pointers(
            page,
            ("pointerdown", 5, "touch", palm),
            ("pointermove", 5, "touch", end),
            ("pointerdown", 1, "pen", start),
            ("pointerdown", 6, "touch", palm),
            ("pointermove", 1, "pen", end),
            ("lostpointercapture", 6, "touch", palm),
            ("lostpointercapture", 5, "touch", palm),
            ("lostpointercapture", 1, "pen", end),
        )
        wait_until_done(page, last)
        assert edits_of(folder) == [(2, 5)]

        # Two fingers pinch, three do, too, and the next one draws.
        fingers = [("pointerdown", at, "touch", palm) for at in (7, 8, 9)]
        moves = [("pointermove", at, "touch", start) for at in (7, 8, 9)]
        ends = [("lostpointercapture", at, "touch", start) for at in (7, 8, 9)]
        move_pointers(page, *fingers, *moves, *ends)
        page.find_element("id", "fit").click()
        last = number(page)
        move_pointers(
            page, ("pointerdown", 7, "touch", palm), ("lostpointercapture", 7, "touch", palm)
        )
        wait_until_done(page, last)
        assert edits_of(folder) == [(2, 5), (2, 1)]


def test_a_stroke_whose_answer_breaks_off_is_drawn_once(arguments, folder, browser):
    with correcting(arguments, folder, browser) as (_, page):
        page.execute_script(
            "const { fetch } = window; let broken = 0; window.fetch = async (address, options) => {"
            "const answer = await fetch(address, options);"
            "if (!String(address).endsWith('draw') || (broken += 1) > 1) return answer;"
            "const cut = async () => { throw new TypeError('network error'); };"
            "return new Proxy(answer, { get: (one, name) =>"
            "['json', 'text', 'arrayBuffer'].includes(name) ? cut : Reflect.get(one, name) }); }"
        )
        stroke(page, (2, 3), (6, 3))
        assert drawn(page) == 5
        assert page.execute_script("return document.querySelector('#error').hidden")
        assert edits_of(folder) == [(2, 5)]


def test_a_stroke_is_drawn_in_the_plane_that_is_seen(arguments, folder, browser):
    """The next plane does not come, since the connection is lost."""
    with correcting(arguments, folder, browser) as (running, page):
        place = running.json("case/0/describe")["place"]
        press(page, "2[[")
        last = number(page)
        connect(page, is_offline=True)
        page.find_element("css selector", ".overlay").send_keys("\ue00e")  # page up
        wait(page, is_shown("connection"))
        (here,) = places_of(page, 0, [(2, 3)])
        pointer(page, here, "down", "up")
        connect(page, is_offline=False)
        wait_until_done(page, last)
        view = {"plane": 0, "place": place, "modality": 0, "is_known": True}
        assert strokes_in_plane(running, view) == 1
        assert strokes_in_plane(running, view | {"place": [*place[:2], place[2] + 1]}) == 0
        expect_complaints(page, "net::ERR_INTERNET_DISCONNECTED")


def strokes_in_plane(running, view):
    _, content, _ = running.ask(f"case/0/plane/0?{quote(json.dumps(view))}")
    line, _, arrays = content.partition(b"\n")
    header = json.loads(line)
    size = header["rows"] * header["columns"]
    start = 0
    for name, kind in header["layers"]:
        if name == "strokes":
            return np.count_nonzero(np.frombuffer(arrays, f"<{kind}", size, start))
        start += size * int(kind[1])
    raise AssertionError


@pytest.mark.parametrize("leaving", ["reload", "back"])
def test_a_stroke_under_way_is_kept_when_its_page_goes(arguments, folder, leaving, browser):
    with correcting(arguments, folder, browser) as (running, page):
        press(page, "2[[")
        start, end = places_of(page, 0, [(2, 3), (6, 3)])
        pointer(page, start, "down", end)
        page.execute_script("window.isLeft = true")
        if leaving == "reload":
            page.refresh()
        else:
            page.back()
        # The driver may come back before the reload, and waits forever if it then asks for a page.
        wait(page, "!window.isLeft && document.readyState === 'complete'")
        wait_for_file(page, folder / "drawing" / "first.json")
        assert edits_of(folder) == [(2, 5)]
        page.get(running.address)
        wait_until_done(page)
        assert drawn(page) == 5


def test_a_case_that_is_passed_by_quickly_leaves_strokes_in_their_cases(arguments, folder, browser):
    """The second case is asked for, and the first one again before it is there."""
    with correcting(arguments, folder, browser) as (_, page):
        page.execute_script(
            "const { fetch } = window; window.waiting = []; window.numAnswered = 0;"
            "window.fetch = async (address, options) => {"
            "if (!String(address).endsWith('describe')) return fetch(address, options);"
            "await new Promise((done) => { window.waiting.push(done); });"
            "const answer = await fetch(address, options);"
            "setTimeout(() => { window.numAnswered += 1; });"
            "return answer; }"
        )
        for key, count in ((".", 1), (",", 2)):
            press(page, key)
            wait(page, f"window.waiting.length === {count}")
        for number_of_answer in (1, 0):
            page.execute_script(f"window.waiting[{number_of_answer}]()")
            wait(page, f"window.numAnswered === {2 - number_of_answer}")
            wait_for_case(page, "first")
            wait_until_done(page)
        assert page.execute_script("return document.querySelector('#error').hidden")
        stroke(page, (2, 3), (6, 3))
        assert case_states(page) == ["corrected", "untouched"]
        expect_complaints(page, "400")  # The program has the first case open again.


def test_a_key_that_is_held_draws_and_saves_once(arguments, folder, browser):
    with correcting(arguments, folder, browser) as (_, page):
        press(page, "2[[")
        last = number(page)
        page.execute_script(
            "const press = (node, key) => { for (const repeat of [false, true, true])"
            "node.dispatchEvent(new KeyboardEvent('keydown', { key, repeat, bubbles: true,"
            "cancelable: true })); };"
            "const { fetch } = window; window.numSaved = 0; window.fetch = (address, options) => {"
            "window.numSaved += String(address).endsWith('save-case'); "
            "return fetch(address, options); };"
            "press(document.querySelector('.overlay'), ' '); press(document.body, 's')"
        )
        wait_until_done(page, last)
        wait(page, "document.querySelector('#saved-case').textContent.startsWith('saved')")
        assert page.execute_script("return window.numSaved") == 1
        assert edits_of(folder) == [(2, 1)]


def test_nothing_is_asked_of_a_program_that_has_ended(arguments, folder, browser):
    """The list of cases would be, after a result that comes late."""
    with correcting(arguments, folder, browser) as (running, page):
        page.find_element("id", "end").click()
        wait(page, "document.body.dataset.state === 'ended'")
        running.process.wait(60)
        page.execute_script(
            "const node = document.querySelector('#note');"
            "node.value = 'late'; node.dispatchEvent(new Event('input'));"
            "node.dispatchEvent(new Event('change'))"
        )
        wait(page, "!document.querySelector('#error').hidden")
        assert page.execute_script("return document.querySelector('#connection').hidden")


def test_a_brush_without_a_size_draws_a_voxel(arguments, folder, browser):
    with correcting(arguments, folder, browser) as (_, page):
        last = number(page)
        page.execute_script(
            "const size = document.querySelector('#size'); size.value = '';"
            "size.dispatchEvent(new Event('input'))"
        )
        press(page, "2")
        pointer(page, *places_of(page, 0, [(2, 3)]), "down", "up")
        wait_until_done(page, last)
        assert edits_of(folder) == [(2, 1)]


def test_keys_in_the_first_moment_do_nothing(arguments, folder, browser):
    """A slow program has not described its case yet."""
    with correcting(arguments, folder, browser) as (_, page):
        page.execute_cdp_cmd(
            "Page.addScriptToEvaluateOnNewDocument",
            {
                "source": "const ask = window.fetch; window.fetch = async (address, options) => {"
                "if (String(address).endsWith('describe'))"
                "await new Promise((done) => { window.describe = done; });"
                "return ask(address, options); }"
            },
        )
        page.refresh()
        wait(page, "window.describe")
        for key in "ciszyxfgb+/":
            press(page, key)
        page.execute_script("window.describe()")
        wait_until_done(page)
        expected = {"modality": "0", "shape": "disk", "lowest": "", "order": "name"}
        for name, value in expected.items():
            assert page.execute_script(f"return document.querySelector('#{name}').value") == value
        assert not page.execute_script("return document.querySelector('#limit').checked")
