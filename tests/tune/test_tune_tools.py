"""Tools on the page of `tune`, by mouse and keys, in a browser."""

import numpy as np
import pytest
from cli_helpers import run_here
from tune_browser import (
    correcting,
    drag,
    drawn,
    expect_complaints,
    needs_browser,
    number,
    press,
    wait,
    wait_until_done,
)
from tune_helpers import write_islands

from crfrefine.io import read_volume

pytestmark = needs_browser


def set_field(driver, name, value):
    driver.execute_script(
        "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
        "field.dispatchEvent(new Event('change'))",
        name,
        value,
    )


def wait_for_text(driver, name, text):
    wait(driver, f"document.querySelector('#{name}').textContent.includes('{text}')")


def number_drawn(driver, act):
    """Do something that draws; return the voxels that are drawn then, and take it back."""
    last = number(driver)
    act()
    wait_until_done(driver, last)
    found = drawn(driver)
    last = number(driver)
    press(driver, "z")
    wait_until_done(driver, last)
    assert drawn(driver) == 0, "one step takes it back"
    return found


@pytest.mark.parametrize("kind", ["space", "flat"])
def test_tools_draw_what_infer_takes_and_one_step_takes_it_back(kind, tmp_path, browser):
    folders = write_islands(tmp_path)[kind]
    arguments = ("-i", folders.images, "-p", folders.logits, "--input-type", "labels")
    kept = tmp_path / "kept"
    weak = ("-c", "default", "--set", "bilateral.weight=0.01")  # Islands stay.
    with correcting((*arguments, *weak), kept, browser) as (running, page):
        case = running.json("case/0/describe")
        # The array's first axes are the second and the first one of the upright grid in space.
        spec = case["planes"][0]
        turn = reversed if kind == "space" else tuple

        def point(*voxel):
            return [*turn(voxel)]

        # Islands: the next one, its removal, and that of all others.
        press(page, "1")
        for found in ("Island 2 of 2", "Island 1 of 2", "Island 2 of 2"):
            press(page, "j")
            wait_for_text(page, "found", found)
        size = int(
            page.execute_script("return document.querySelector('#found').textContent").split()[-2]
        )
        assert number_drawn(page, lambda: press(page, "o")) == size
        press(page, "j")
        wait_for_text(page, "found", "Island 1 of")
        # A fill takes a range of intensities at once, and goes through planes if it is to.
        press(page, "2")
        set_field(page, "shape", "fill")
        assert page.execute_script("return document.querySelector('#limit').checked")
        set_field(page, "lowest", 50)
        set_field(page, "highest", 1000)
        seed = point(9, 12)
        in_plane = number_drawn(page, lambda: drag(page, 0, seed, seed, "mouse"))
        set_field(page, "shape", "flood")
        through = number_drawn(page, lambda: drag(page, 0, seed, seed, "mouse"))
        assert (through > in_plane > 40) if kind == "space" else (through == in_plane)
        # Nothing is drawn over what is protected.
        set_field(page, "over", "background")
        drag(page, 0, seed, seed, "mouse")
        wait_for_text(page, "error", "protected")
        expect_complaints(page, "400")
        set_field(page, "over", "start")
        set_field(page, "shape", "disk")
        press(page, "i")
        across = [point(2, 12), point(16, 12)]
        over_background = number_drawn(page, lambda: drag(page, 0, *across, "mouse"))
        set_field(page, "over", "")
        assert over_background < number_drawn(page, lambda: drag(page, 0, *across, "mouse"))

        # By keys: a line to the crosshair, and a length in mm.
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        set_field(page, "size", 1)
        overlay = page.find_element("css selector", ".plane .overlay")
        page.execute_script("arguments[0].focus()", overlay)
        press_keys = ActionChains(page).send_keys(Keys.SPACE, *[Keys.ARROW_UP] * 3)
        last = number(page)
        press_keys.key_down(Keys.SHIFT).send_keys(Keys.SPACE).key_up(Keys.SHIFT).perform()
        wait_until_done(page, last)
        wait(page, "document.querySelector('#saved-case').textContent.startsWith('4 voxels')")
        press(page, "u")
        page.execute_script("arguments[0].focus()", overlay)
        ActionChains(page).send_keys(Keys.SPACE, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT).perform()
        wait_for_text(page, "measured", f"{2 * spec['steps'][0]:.1f} mm")

        # The label from all sides.
        press(page, "1")
        page.execute_script("document.querySelector('#sides').open = true")
        shown = "[...document.querySelectorAll('#projections img')]"
        wait(page, f"{shown}.every((one) => one.naturalWidth > 0)")
        assert page.execute_script(f"return {shown}.length") == len(case["planes"])
        assert page.execute_script(f"return {shown}[0].naturalWidth") == spec["size"][0]
        if kind == "space":
            # A click leads to the label's depth.
            page.execute_script(
                "const slider = document.querySelector('.plane input'); slider.value = 0;"
                "slider.dispatchEvent(new Event('input'));"
                f"const [image] = {shown};"
                "const box = image.getBoundingClientRect();"
                "const [x, y] = arguments[0].map((at, axis) => (at + 0.5) / arguments[1][axis]);"
                "image.dispatchEvent(new MouseEvent('click', { clientX: box.left + x * box.width,"
                "clientY: box.top + (1 - y) * box.height }));",
                seed,
                spec["size"],
            )
            wait(page, "document.querySelector('.plane input').value > 0")
            wait_for_text(page, "side-label", "label 1")

        if kind == "space":
            stroke = {"plane": 0, "value": 2, "shape": "disk", "radius": 4.0, "within": {}}
            for slice_number in (2, 6):
                place = [*point(9, 12), slice_number]
                sent = {**stroke, "place": place, "path": point(9, 12), "mark": ""}
                before = running.json("case/0/draw", sent)["drawn"]
            page.execute_script("window.dispatchEvent(new Event('focus'))")
            press(page, "2")
            last = number(page)
            press(page, "a")
            wait_until_done(page, last)
            assert drawn(page) > before
        page.find_element("id", "save-case").click()
        wait_for_text(page, "saved-case", "saved to")
        assert not page.execute_script("return document.querySelector('#error').textContent")
    saved = ("-c", kept / "parameters" / "a.toml", "--strokes", kept / "strokes")
    out = tmp_path / "out"
    run_here("infer", *arguments, *saved, "-o", out, "--threads", 1, status=0)
    np.testing.assert_array_equal(
        read_volume(out / "a.nii.gz").data, read_volume(kept / "refined" / "a.nii.gz").data
    )
