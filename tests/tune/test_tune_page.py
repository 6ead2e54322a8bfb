"""What somebody who corrects cases sees and does on the page of `tune`, in a browser."""

import csv
import json

import numpy as np
import pytest
from cli_helpers import save_nifti
from tune_browser import (
    correcting,
    drag,
    drawn,
    expect_complaints,
    needs_browser,
    number,
    open_case,
    open_tab,
    picture,
    places_of,
    press,
    wait,
    wait_for_case,
    wait_until_done,
)
from tune_helpers import open_page, write_labeled, write_large

from crfrefine.io import read_volume, write_label_map
from crfrefine.io.volume import Segment

pytestmark = needs_browser

NAMES = {1: "left lung", 2: "liver", 3: "spleen"}


@pytest.fixture
def arguments(labeled_folders, tmp_path):
    """A label map with names and colors, and an image like CT in two modalities."""
    cases, labels = labeled_folders
    folder = tmp_path / "images"
    (tmp_path / "network").mkdir()
    for name in ("first", "second"):
        image = read_volume(cases.images / f"{name}_0000.nii.gz")
        values = np.asarray(image.data, np.float32)
        scaled = (values - values.min()) / np.ptp(values) * 1500 - 1000
        save_nifti(folder / f"{name}_0000.nii.gz", scaled.astype(np.int16), image.affine)
        save_nifti(folder / f"{name}_0001.nii.gz", (-scaled).astype(np.int16), image.affine)
        network = read_volume(labels / f"{name}.nii.gz")
        segments = [Segment(label, text) for label, text in NAMES.items()]
        segments[1] = Segment(2, "liver", (0.0, 0.0, 1.0))
        write_label_map(
            tmp_path / "network" / f"{name}.nii.gz",
            network.data.astype(np.uint8),
            network.header,
            segments=segments,
        )
    return ("-i", folder, "-p", tmp_path / "network", "-c", "default")


@pytest.fixture
def page(arguments, folder, browser):
    with (
        open_page(*arguments, "--corrections", folder) as running,
        open_tab(running, browser) as page,
    ):
        yield page


def size_of_window(driver, width, height):
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )
    wait(driver, f"innerWidth === {width}")


def text(driver, name):
    return driver.execute_script(f"return document.querySelector('#{name}').textContent")


def chosen(driver):
    return driver.execute_script(
        "return document.querySelector('[name=brush]:checked').closest('label').textContent"
    )


def draw(driver, start, end):
    last = number(driver)
    drag(driver, 0, start, end, "mouse")
    wait_until_done(driver, last)


def undo(driver):
    """Take the only stroke back."""
    last = number(driver)
    press(driver, "z")
    wait_until_done(driver, last)
    assert drawn(driver) == 0


def set_fields(driver, values):
    driver.execute_script(
        "for (const [id, value] of arguments[0]) {"
        "const field = document.getElementById(id); field.value = value;"
        "for (const kind of ['input', 'change']) field.dispatchEvent(new Event(kind)); }",
        values,
    )


def test_labels_have_names_and_colors_of_their_file_and_are_picked_from_the_picture(page, folder):
    labels = page.page.json("case/0/describe")["labels"]
    assert [one["name"] for one in labels] == ["1 left lung", "2 liver", "3 spleen"]
    assert labels[1]["color"] == "#0000ff"

    # What is under the pointer: name, value and unit; P picks it.
    network = np.asarray(read_volume(folder.with_name("network") / "first.nii.gz").data)
    image = np.asarray(read_volume(folder.with_name("images") / "first_0000.nii.gz").data)
    case = page.page.json("case/0/describe")
    through = case["place"][2]
    # The case is stored upright but for flips and order; the page says which label it shows.
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    seen = set()
    for voxel in ((7, 9), (5, 7), (9, 11), (1, 1)):
        (place,) = places_of(page, 0, [voxel])
        actions = ActionBuilder(page)
        actions.pointer_action.move_to_location(*map(round, place))
        actions.perform()
        wait(page, f"document.querySelector('#under').textContent.startsWith('{voxel[0] + 1}, ')")
        under = text(page, "under").split(" · ")
        assert under[0] == f"{voxel[0] + 1}, {voxel[1] + 1}, {through + 1}"
        assert int(under[1].removesuffix(" HU")) in image
        press(page, "p")
        assert chosen(page) == under[2]
        seen.add(under[2])
    assert len(seen) > 1
    assert network.max() == 3

    # The list is filtered by words, and a key shows and hides the chosen label.
    press(page, "/")
    page.switch_to.active_element.send_keys("SPL")
    rows = page.execute_script(
        "return [...document.querySelectorAll('.label')].filter((row) => row.checkVisibility())"
        ".map((row) => row.textContent)"
    )
    assert rows == ["3 spleen"]
    page.switch_to.active_element.send_keys("\ue003" * 3)  # backspaces
    page.execute_script("document.activeElement.blur()")
    press(page, "2")
    before = picture(page)
    press(page, "h")
    assert picture(page) != before
    stops = "[...document.querySelectorAll('.eye')].filter((one) => one.tabIndex >= 0).length"
    assert page.execute_script(f"return {stops}") == 0


@pytest.mark.parametrize("mode", ["correct", "choose"])
def test_the_picture_and_the_tools_are_in_sight_without_scrolling(arguments, folder, mode, browser):
    kept = ("--corrections", folder) if mode == "correct" else ()
    with (
        open_page(*arguments, *kept) as running,
        open_tab(running, browser) as page,
    ):
        size_of_window(page, 1400, 900)
        assert page.execute_script("return document.documentElement.scrollHeight") <= 900
        names = ["planes", "what-to-do", "status"]
        names += (
            ["tools", "brushes", "undo", "save-case", "window", "opacity", "since", "show-network"]
            if mode == "correct"
            else ["sliders", "preset"]
        )
        for name in names:
            top, bottom = page.execute_script(
                f"const box = document.getElementById('{name}').getBoundingClientRect();"
                "return [box.top, box.bottom]"
            )
            assert 0 <= top < (900 if name == "sliders" else bottom), name
            assert name == "sliders" or bottom <= 900, name
        is_open = page.execute_script("return document.querySelector('#controls').open")
        assert is_open == (mode == "choose")
        assert text(page, "what-to-do")
        size_of_window(page, 390, 800)
        page.execute_script("document.querySelector('#case-panel').showPopover()")
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390


def box_of(driver, selector):
    return driver.execute_script(
        f"const box = document.querySelector('{selector}').getBoundingClientRect();"
        "return [box.width, box.height]"
    )


def test_the_picture_and_the_list_of_labels_take_the_room_that_there_is(page):
    size_of_window(page, 1024, 768)
    assert box_of(page, ".plane.main .view")[0] > 500
    assert box_of(page, ".plane:not(.main) input")[0] > 120
    assert min(box_of(page, ".eye")) >= 16
    size_of_window(page, 1400, 900)
    bottom = page.execute_script(
        "return document.querySelector('#side > :last-child').getBoundingClientRect().bottom"
        " - document.querySelector('#side').getBoundingClientRect().bottom"
    )
    assert abs(bottom) < 2, "nothing is blank below"
    assert box_of(page, "#brushes")[1] > 200


def test_images_are_smooth_or_sharp_and_change_by_a_key(page):
    seen = [picture(page)]
    for key in ("g", "c"):
        press(page, key)
        wait(page, "document.querySelector('.overlay').ariaBusy === 'false'")
        seen.append(picture(page))
    assert page.execute_script("return document.querySelector('#modality').value") == "1"
    assert len(set(seen)) == 3


def test_a_ball_an_outline_and_a_range_of_intensities(page, folder):
    press(page, "2")
    page.execute_script(
        "const size = document.querySelector('#size'); size.value = 7;"
        "size.dispatchEvent(new Event('input'))"
    )
    draw(page, (6, 7), (7, 7))
    in_plane = drawn(page)
    undo(page)
    press(page, "b")
    draw(page, (6, 7), (7, 7))
    assert drawn(page) > 1.3 * in_plane, "a ball reaches into other planes"
    undo(page)

    press(page, "b")
    corners = places_of(page, 0, [(3, 3), (9, 3), (9, 8), (3, 8)])
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    actions = ActionBuilder(page)
    last = number(page)
    actions.pointer_action.move_to_location(*map(round, corners[0])).pointer_down()
    for corner in corners[1:]:
        actions.pointer_action.move_to_location(*map(round, corner))
    actions.pointer_action.pointer_up()
    actions.perform()
    wait_until_done(page, last)
    assert drawn(page) == 7 * 6
    undo(page)

    # Only intensities: half of them.
    page.execute_script("document.querySelector('#shape').value = 'disk'")
    page.execute_script("document.querySelector('#shape').dispatchEvent(new Event('change'))")
    press(page, "i")
    for lowest, why in ((6000, "no intensity there is in the range"), ("", "expected a lowest")):
        set_fields(page, [["lowest", lowest], ["highest", 5000]])
        drag(page, 0, (2, 4), (12, 12), "mouse")
        wait(page, f"document.querySelector('#error').textContent.includes('{why}')")
        assert drawn(page) == 0
    expect_complaints(page, "400")
    set_fields(page, [["lowest", -200], ["highest", 5000]])
    draw(page, (2, 4), (12, 12))
    content = json.loads((folder / "drawing" / "first.json").read_text())
    (edit,) = content["edits"]
    firsts, lengths = edit["runs"]
    voxels = [at + step for at, many in zip(firsts, lengths, strict=True) for step in range(many)]
    image = np.asarray(read_volume(folder.with_name("images") / "first_0000.nii.gz").data)
    drawn_on = image.ravel()[voxels]
    assert drawn_on.min() >= -200
    assert len(voxels) == drawn(page)


def test_a_note_and_a_state_of_each_case_are_in_the_list_and_in_a_table(page, folder):
    set_fields(page, [["review-state", "to discuss"], ["note", "=odd border"]])
    wait(page, "document.querySelector('#case-list .review').textContent === 'to discuss'")
    wait(page, "document.querySelector('#case-list button').title.includes('odd border')")
    rows = list(csv.reader((folder / "reviews.csv").read_text().splitlines()))
    assert rows == [
        ["case", "state", "note"],
        ["first", "to discuss", "'=odd border"],
        ["second", "to do", ""],
    ]


def test_one_key_opens_the_next_case_that_nobody_has_touched(tmp_path, folder, browser):
    """Behind cases that are corrected, done, or to be discussed, from any of them."""
    names = [f"case{number}" for number in range(6)]
    cases, _ = write_labeled(tmp_path, *names)
    arguments = ("-i", cases.images, "-p", cases.logits, "-c", "default")
    with correcting(arguments, folder, browser) as (running, page):
        point = {"plane": 0, "place": [4, 5, 6], "path": [4, 5], "value": 1}
        for number in (0, 1, 2):
            edit = {**point, "shape": "disk", "radius": 0, "within": {}, "mark": ""}
            running.json(f"case/{number}/draw", edit)
        running.json("review", {"number": 3, "review": "done", "note": ""})
        running.json("review", {"number": 4, "review": "to discuss", "note": "Odd border"})
        page.refresh()
        wait_until_done(page)
        assert open_case(page) == "case0"
        press(page, "t")
        wait_for_case(page, "case5")
        press(page, "t")
        wait_for_case(page, "case0")

        # The list is filtered by words and states, and Next follows it.
        def listed():
            return page.execute_script(
                "return [...document.querySelectorAll('#case-list li:not([hidden])')]"
                ".map((entry) => entry.querySelector('span').textContent)"
            )

        for kind, words, expected in (
            ("corrected", "", names[:3]),
            ("not done", "", [*names[:3], *names[4:]]),
            ("", "odd", ["case4"]),
            ("to discuss", "5", []),
            ("untouched", "case", names[3:]),
        ):
            set_fields(page, [["case-kind", kind], ["case-words", words]])
            assert listed() == expected
        press(page, ".")
        wait_for_case(page, "case3")


def test_states_follow_strokes_and_the_list_closes_and_keeps_the_focus(page):
    press(page, "2")
    draw(page, (4, 7), (6, 7))
    page.find_element("id", "save-case").click()
    wait(page, "document.querySelector('#case-count').textContent.endsWith('1 saved')")
    draw(page, (4, 9), (6, 9))
    assert text(page, "case-count").endswith("0 saved")
    summary = page.find_element("css selector", "#case-menu")
    summary.click()
    entry = page.find_elements("css selector", "#case-list button")[1]
    page.execute_script("arguments[0].focus()", entry)
    page.execute_script(
        "document.querySelector('#order').value = '-1';"
        "document.querySelector('#order').dispatchEvent(new Event('change'))"
    )
    wait(
        page, "[...document.querySelectorAll('#case-list .count')].every((one) => one.textContent)"
    )
    assert page.execute_script("return document.activeElement === arguments[0]", entry)
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    entry.send_keys(Keys.ESCAPE)
    assert page.execute_script("return !document.querySelector(':popover-open')")

    # Keys of one letter can be switched off; Ctrl+S saves all the same.
    page.execute_script("document.querySelector('#keys').checked = false")
    before = chosen(page)
    press(page, "m")
    assert chosen(page) == before
    ActionChains(page).key_down(Keys.CONTROL).send_keys("s").key_up(Keys.CONTROL).perform()
    wait(page, "document.querySelector('#case-count').textContent.endsWith('1 saved')")


def test_keys_read_out_what_lies_at_the_crosshair_and_the_next_case_keeps_the_focus(page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    across, up, through = page.page.json("case/0/describe")["place"]
    focused = "document.activeElement.classList.contains('overlay')"
    page.execute_script("document.querySelector('.overlay').focus()")
    ActionChains(page).send_keys(Keys.ARROW_RIGHT, Keys.PAGE_UP).perform()
    place = f"{across + 2}, {up + 1}, {through + 2} · "
    wait(page, f"document.querySelector('#under').textContent.startsWith('{place}')")
    ActionChains(page).send_keys(".").perform()
    wait_for_case(page, "second")
    wait(page, focused)


def test_a_damaged_case_is_told_and_passed_by(arguments, folder, tmp_path, browser):
    damaged = tmp_path / "images" / "middle_0000.nii.gz"
    for modality in (0, 1):
        content = (tmp_path / "images" / f"first_000{modality}.nii.gz").read_bytes()
        damaged.with_name(f"middle_000{modality}.nii.gz").write_bytes(content[:300])
    network = (tmp_path / "network" / "first.nii.gz").read_bytes()
    (tmp_path / "network" / "middle.nii.gz").write_bytes(network)
    with (
        open_page(*arguments, "--corrections", folder) as running,
        open_tab(running, browser) as page,
    ):
        press(page, ".")
        wait(page, "document.querySelector('#error').textContent.includes('middle_0000')")
        wait(page, "!document.querySelector('#planes').inert")
        press(page, ".")
        wait(page, "document.querySelector('#case').textContent === 'second'")
        wait(page, "document.querySelector('#error').hidden")
        expect_complaints(page, "400")


def test_what_lies_under_a_pointer_that_rests_is_told_anew(page):
    """After the wheel, a stroke and another brush."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    place = [*map(round, places_of(page, 0, [(1, 1)])[0])]
    chain = ActionChains(page)
    chain.w3c_actions.pointer_action.move_to_location(*place)
    chain.perform()
    through = page.page.json("case/0/describe")["place"][2]
    wait(page, f"document.querySelector('#under').textContent.startsWith('2, 2, {through + 1} ')")
    ActionChains(page).scroll_from_origin(ScrollOrigin.from_viewport(*place), 0, 100).perform()
    wait(page, f"document.querySelector('#under').textContent.startsWith('2, 2, {through} ')")

    press(page, "3")
    last = number(page)
    ActionChains(page).click().perform()
    wait_until_done(page, last)
    wait(page, "document.querySelector('#under').textContent.includes('3 spleen')")
    ring = "return document.querySelector('.ring:not([hidden])').clientWidth"
    width = page.execute_script(ring)
    press(page, "]")
    assert page.execute_script(ring) > width


def test_a_stroke_is_drawn_in_the_case_that_is_shown(page):
    """Another tab opens a case again before this one knows its next case."""
    page.execute_script(
        "const { fetch } = window; window.fetch = async (address, options) => {"
        "if (String(address).endsWith('case/1/describe'))"
        "await fetch('open', { method: 'POST', body: JSON.stringify({ number: 0 }) });"
        "return fetch(address, options); }"
    )
    press(page, ".")
    wait(page, "document.querySelector('#error').textContent.includes('another case is open')")
    wait(page, "!document.querySelector('#planes').inert")
    wait_until_done(page)
    assert text(page, "case") == "first"
    press(page, "2")
    draw(page, (4, 7), (6, 7))
    assert page.page.json("case/0/describe")["strokes"]["drawn"] == drawn(page) > 0
    assert page.page.json("cases")["cases"][1]["state"] == "untouched"
    expect_complaints(page, "400")


def test_the_last_whole_result_stays_in_sight_outside_of_the_frame(tmp_path, browser):
    """On a case that is larger than the box: a first correction does not vanish in the next one."""
    cases, _ = write_large(tmp_path)
    arguments = ("-i", cases.images, "-p", cases.logits, "-c", "default")
    with (
        open_page(*arguments, "--corrections", tmp_path / "kept") as running,
        open_tab(running, browser) as page,
    ):
        press(page, "2")
        draw(page, (4, 5), (8, 5))
        case = running.json("case/0/describe")
        place = case["place"]
        point = {"plane": 0, "place": place, "path": [40, 40], "value": 1}
        edit = {**point, "shape": "disk", "radius": 0, "within": {}, "mark": ""}
        assert case["grid"][0] == 52
        running.json("case/0/draw", edit)
        counter = 10**14
        answer = running.json(
            "case/0/refine",
            {"counter": counter, "preset": "", "changes": {}, "place": place, "is_whole": False},
        )
        assert not answer["result"]["is_whole"]
        view = json.dumps({"plane": 0, "place": place, "modality": 0, "is_known": True})
        from urllib.parse import quote

        _, content, _ = running.ask(f"case/0/plane/0?{quote(view)}")
        line, _, arrays = content.partition(b"\n")
        header = json.loads(line)
        assert header["frame"] is not None
        rows, columns = header["rows"], header["columns"]
        at = header["layers"].index(["refined", "u1"])
        labels = np.frombuffer(arrays, np.uint8, rows * columns, at * rows * columns)
        shown = labels.reshape(rows, columns)
        assert (shown[rows - 1 - 5, 4:9] == 2).all()
