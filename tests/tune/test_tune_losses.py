"""Nothing that is drawn on the page of `tune` is lost: drawn in a browser, broken, compared."""

import json
import resource
import shutil
import signal
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from cli_helpers import run_here
from tune_browser import (
    case_states,
    connect,
    correcting,
    drag,
    drawn,
    expect_complaints,
    is_shown,
    needs_browser,
    number,
    open_case,
    open_tab,
    places_of,
    pointer,
    press,
    stroke,
    wait,
    wait_for_case,
    wait_until_done,
)
from tune_helpers import open_page

from crfrefine.io import read_volume

pytestmark = needs_browser


def click(driver, name):
    driver.find_element("id", name).click()


def check_infer_gives_what_is_saved(arguments, folder, out):
    inputs = ("-c", folder / "parameters" / "first.toml", "--strokes", folder / "strokes")
    run_here("infer", *arguments[:4], *inputs, "-o", out, "--threads", 1, status=0)
    saved = read_volume(folder / "refined" / "first.nii.gz").data
    np.testing.assert_array_equal(saved, read_volume(out / "first.nii.gz").data)


@pytest.mark.parametrize("ending", ["button", "interrupt", "kill"])
def test_strokes_and_undone_ones_come_back_however_the_program_ends(
    arguments, folder, tmp_path, ending, browser
):
    with correcting(arguments, folder, browser) as (running, page):
        stroke(page, (2, 3), (6, 3))
        stroke(page, (2, 5), (4, 5), "3")
        last = number(page)
        press(page, "z")
        wait_until_done(page, last)
        assert drawn(page) == 5
        if ending == "button":
            click(page, "end")
            wait(page, "document.body.dataset.state === 'ended'")
        else:
            page.get("about:blank")
            kind = {"interrupt": signal.SIGINT, "kill": signal.SIGKILL}[ending]
            running.process.send_signal(kind)
        running.process.wait(30)
    with correcting(arguments, folder, browser) as (_, page):
        assert drawn(page) == 5
        assert case_states(page) == ["corrected", "untouched"]
        last = number(page)
        press(page, "y")
        wait_until_done(page, last)
        assert drawn(page) == 8
        click(page, "save-case")
        wait(page, "document.querySelector('#saved-case').textContent.startsWith('saved')")
    values = read_volume(folder / "strokes" / "first.nii.gz").data
    assert sorted(values[values > 0]) == [2] * 5 + [3] * 3
    check_infer_gives_what_is_saved(arguments, folder, tmp_path / "out")


def strokes_on_their_way(driver):
    return driver.execute_script("return document.querySelector('.ink').toDataURL()")


def test_what_is_drawn_without_a_connection_arrives_once_it_is_back(arguments, folder, browser):
    with correcting(arguments, folder, browser) as (_, page):
        stroke(page, (2, 3), (6, 3))
        before = strokes_on_their_way(page)
        places = places_of(page, 0, [(2, 5), (2, 7)])
        connect(page, is_offline=True)
        for place in places:
            pointer(page, place, "down", "up")
        wait(page, is_shown("connection"))
        assert strokes_on_their_way(page) != before, "what is not sent yet stays in sight"
        last = number(page)
        connect(page, is_offline=False)
        wait(page, f"!{is_shown('connection')}")
        wait(page, "document.querySelector('#saved-case').textContent.startsWith('7 ')")
        wait_until_done(page, last)
        expect_complaints(page, "net::ERR_INTERNET_DISCONNECTED")
    assert json.loads((folder / "drawing" / "first.json").read_text())["done"] == 3


@pytest.mark.parametrize("is_reloaded", [False, True])
def test_what_is_drawn_while_the_program_is_dead_arrives_in_its_case_once_it_runs_again(
    arguments, folder, browser, tmp_path, is_reloaded
):
    """Its case has another number then, and meanwhile another program has its port."""
    with correcting(arguments, folder, browser) as (running, page):
        stroke(page, (2, 3), (6, 3))
        start, end = places_of(page, 0, [(2, 5), (4, 5)])
        running.process.kill()
        running.process.wait()
        press(page, "3")
        pointer(page, start, "down", end, "up")
        page.find_element("id", "note").send_keys("typed")
        wait(page, "document.querySelector('#connection').textContent.includes('start it again')")
        port = urlsplit(running.address).port
        with open_page(*arguments, "--port", port):
            told = "take the one that crfrefine tune printed"
            wait(page, f"document.querySelector('#connection').textContent.includes('{told}')")
        more = tmp_path / "more"
        for role in ("images", "logits"):
            shutil.copytree(arguments[1].parent / role, more / role)
        for first in [*more.glob("*/first*")]:
            shutil.copy(first, first.with_name(first.name.replace("first", "earlier")))
        inputs = ("-i", more / "images", "-p", more / "logits", "-c", "default")
        if is_reloaded:
            page.get("about:blank")
        with open_page(*inputs, "--corrections", folder) as again:
            assert again.address == running.address
            if is_reloaded:
                page.get(again.address)
                wait(page, "!document.body.inert")
            wait(page, f"!{is_shown('connection')}")
            wait_for_file(folder / "reviews.csv", "first,to do,typed")
            if not is_reloaded:
                wait(page, "document.querySelector('#saved-case').textContent.startsWith('8 ')")
                assert open_case(page) == "first"
            expect_complaints(page, "net::ERR_", "403", "400")
    assert json.loads((folder / "drawing" / "first.json").read_text())["done"] == 2
    assert not (folder / "drawing" / "earlier.json").exists()


def wait_for_file(path, content):
    end = time.monotonic() + 60
    while not path.exists() or content not in path.read_text():
        assert time.monotonic() < end, content
        time.sleep(0.05)


def test_a_program_that_hangs_is_told(arguments, folder, browser):
    with correcting(arguments, folder, browser) as (running, page):
        press(page, "2[[")
        start, end = places_of(page, 0, [(2, 5), (4, 5)])
        running.process.send_signal(signal.SIGSTOP)
        pointer(page, start, "down", end, "up")
        wait(page, is_shown("connection"))
        running.process.send_signal(signal.SIGCONT)
        wait(page, f"!{is_shown('connection')}")
        wait(page, "document.querySelector('#saved-case').textContent.startsWith('3 ')")


def test_without_a_folder_the_page_says_so_and_offers_one(
    arguments, tmp_path, monkeypatch, folder, browser
):
    monkeypatch.chdir(tmp_path)
    with open_page(*arguments) as running, open_tab(running, browser) as page:
        told = page.execute_script("return document.querySelector('#folder').innerText")
        assert "kept nowhere" in told
        assert not page.execute_script(f"return {is_shown('save-case')}")
        stroke(page, (2, 3), (6, 3))
        press(page, ".")
        wait_for_case(page, "second")
        press(page, ",")
        wait_for_case(page, "first")
        assert drawn(page) == 5, "another case was open meanwhile"
        wait_until_done(page)
        click(page, "end")
        wait(page, "document.querySelector('#lost').open")
        page.find_element("css selector", "#lost [value=stay]").click()
        assert running.process.poll() is None
        click(page, "end")
        wait(page, "document.querySelector('#lost').open")
        assert page.switch_to.active_element.get_attribute("value") == "keep"
        page.switch_to.active_element.click()
        assert running.process.wait(30) == 0
        wait(page, "document.body.dataset.state === 'ended'")
    with open_page(*arguments, "--corrections", folder) as running:
        assert running.json("case/0/describe")["strokes"]["drawn"] == 5
        refused = run_here("tune", *arguments, "--no-browser", "--corrections", folder, status=1)
        owner = f'this folder: {{"process": {running.process.pid},'
        assert f"another crfrefine tune corrects cases in {owner}" in refused.stderr


def test_results_of_other_parameters_are_told_and_saved_again(arguments, folder, tmp_path, browser):
    with correcting(arguments, folder, browser) as (_, page):
        stroke(page, (2, 3), (6, 3))
        click(page, "save-case")
        wait(page, "document.querySelector('#saved-case').textContent.startsWith('saved')")
        wait(page, "document.querySelector('#save-all').disabled")
        assert page.execute_script(f"return {is_shown('save-all')}"), "it keeps its place"
        last = number(page)
        page.execute_script(
            "const field = document.querySelector('[name=\"bilateral.weight\"]')"
            ".closest('.slider').querySelector('[type=number]');"
            "field.value = 3; field.dispatchEvent(new Event('change'))"
        )
        wait_until_done(page, last)
        wait(page, is_shown("save-anew"))
        assert case_states(page) == ["older than the parameters", "untouched"]
        assert page.execute_script("return document.querySelector('#save-all').disabled")
        click(page, "save-anew")
        wait(page, f"!{is_shown('save-anew')}")
        assert case_states(page) == ["saved", "untouched"]
        last = number(page)
        press(page, "z")
        wait_until_done(page, last)
        wait(page, "!document.querySelector('#save-all').disabled")
        assert case_states(page) == ["corrected", "untouched"]
    check_infer_gives_what_is_saved(arguments, folder, tmp_path / "out")


def test_nothing_is_drawn_outside_of_the_image_or_in_a_case_that_is_not_there_yet(
    arguments, folder, browser
):
    with correcting(arguments, folder, browser) as (_, page):
        press(page, "2")
        left, top, right, bottom = page.execute_script(
            "const box = document.querySelector('.overlay').getBoundingClientRect();"
            "return [box.left, box.top, box.right, box.bottom]"
        )
        for corner in ((left + 4, top + 4), (right - 4, bottom - 4)):
            pointer(page, corner, "down", (corner[0], corner[1] + 2), "up")
        assert drawn(page) == 0

        # A stroke that is being drawn belongs to its case.
        start, end = places_of(page, 0, [(2, 3), (6, 3)])
        pointer(page, start, "down", end)
        press(page, ".")
        wait_for_case(page, "second")
        pointer(page, "up")
        wait_until_done(page)
        wait(page, "document.querySelector('#case-list .state').textContent === 'corrected'")
        assert case_states(page) == ["corrected", "untouched"]
        assert drawn(page) == 0
        press(page, ",")
        wait_for_case(page, "first")
        assert open_case(page) == "first"
        assert drawn(page) > 0


def test_strokes_of_two_tabs_are_kept_and_those_of_a_full_disk_are_written_later(
    arguments, folder, browser
):
    with correcting(arguments, folder, browser) as (running, page):
        stroke(page, (2, 3), (6, 3))
        first = page.current_window_handle
        page.switch_to.new_window("tab")
        page.get(running.address)
        wait_until_done(page)
        assert drawn(page) == 5
        stroke(page, (2, 5), (4, 5))
        assert drawn(page) == 8
        press(page, ".")
        wait_for_case(page, "second")
        second = page.current_window_handle
        page.switch_to.window(first)
        spec = running.json("case/1/describe")["planes"][0]
        assert spec["size"] == [15, 18]
        drag(page, 0, (2, 7), (3, 7), "mouse")
        wait(page, "document.querySelector('#saved-case').textContent.startsWith('10 ')")
        assert json.loads((folder / "drawing" / "first.json").read_text())["done"] == 3
        wait(page, "!document.querySelector('#error').hidden")
        wait(page, "!document.querySelector('.plane [aria-busy=true]')")
        expect_complaints(page, "400")  # Another case is open, and the result is that of its tab.
        page.close()
        page.switch_to.window(second)

        limits = resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (8, -1))
        stroke(page, (2, 3), (3, 3))
        assert page.execute_script(f"return {is_shown('problem')}")
        assert drawn(page) == 2
        assert not (folder / "drawing" / "second.json").exists()
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, limits)
        click(page, "keep-again")
        wait(page, f"!{is_shown('problem')}")
    assert json.loads((folder / "drawing" / "second.json").read_text())["done"] == 1


def test_a_tab_that_gets_the_focus_has_the_strokes_of_the_other_one(arguments, folder, browser):
    with correcting(arguments, folder, browser) as (running, page):
        first = page.current_window_handle
        page.switch_to.new_window("tab")
        page.get(running.address)
        wait_until_done(page)
        second = page.current_window_handle
        stroke(page, (2, 3), (6, 3))
        for tab, key, expected in ((first, "z", 0), (second, "y", 5), (first, None, 5)):
            before = drawn(page)
            page.switch_to.window(tab)
            page.execute_cdp_cmd("Page.bringToFront", {})
            wait(page, f"document.querySelector('#saved-case').textContent.startsWith('{before} ')")
            wait_until_done(page)
            if key:
                last = number(page)
                press(page, key)
                wait_until_done(page, last)
            assert drawn(page) == expected
