"""A headless Chromium with the page of `tune`, driven as a person would."""

import importlib.util
import shutil
from contextlib import contextmanager

import pytest
from tune_helpers import missing_server, open_page

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
    "--window-size=1200,700"
)
needs_browser = [
    pytest.mark.skipif(bool(missing_server()), reason=missing_server() or "there is a server"),
    pytest.mark.skipif(
        not (BROWSER and shutil.which("chromedriver") and importlib.util.find_spec("selenium")),
        reason="needs selenium and Chromium: as root, `apt-get install chromium chromium-driver`",
    ),
]


def start_browser(profile):
    """A browser with an empty tab, for many tests: its start takes longer than most of them."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in (*OPTIONS.split(), f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(
        options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))
    )


@contextmanager
def open_tab(page, driver):
    """A tab on a running page; whatever it complains about on the console fails the test.

    But for what the test expects (`expect_complaints`), of which something has to come. The page
    keeps nothing in the browser, and each program has an address of its own: tabs that come one
    after the other know nothing of each other.
    """
    empty = driver.current_window_handle
    driver.switch_to.new_window("tab")
    driver.page = page
    driver.expected_complaints = []
    for kind in ("browser", "performance"):
        driver.get_log(kind)  # What came before is not of this page.
    try:
        driver.get(page.address)
        wait_until_done(driver)
        yield driver
        complaints = [entry["message"] for entry in driver.get_log("browser")]
        expected = driver.expected_complaints
        assert bool(complaints) == bool(expected), complaints
        for complaint in complaints:
            assert any(about in complaint for about in expected), complaint
    finally:
        for tab in set(driver.window_handles) - {empty}:
            driver.switch_to.window(tab)
            driver.close()
        driver.switch_to.window(empty)


def expect_complaints(driver, *about):
    """The browser logs each request that fails and each that is refused, with its status."""
    driver.expected_complaints += about


def wait(driver, condition):
    """Until a condition in the page's own language holds."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 60, poll_frequency=0.02).until(
        lambda driver: driver.execute_script(f"return Boolean({condition})"), condition
    )


def wait_until_done(driver, after=0):
    wait(
        driver,
        f"document.body.dataset.state === 'done' && Number(document.body.dataset.number) > {after}"
        "&& !document.querySelector('.plane [aria-busy=true]')",
    )


def number(driver):
    return int(driver.execute_script("return document.body.dataset.number"))


def picture(driver, number=0):
    """The pixels of a plane, once it is drawn."""
    wait(driver, "!document.querySelector('.plane [aria-busy=true]')")
    return driver.find_elements("css selector", ".plane .view")[number].screenshot_as_base64


# Where voxels of a plane, (across, up), lie in the window, unless the plane is enlarged.
PLACES = """
    const [number, { size, steps }, voxels] = arguments;
    const box = document.querySelectorAll('.overlay')[number].getBoundingClientRect();
    const scale = Math.min(box.width / (size[0] * steps[0]), box.height / (size[1] * steps[1]));
    const left = box.left + (box.width - size[0] * steps[0] * scale) / 2;
    const bottom = box.bottom - (box.height - size[1] * steps[1] * scale) / 2;
    return voxels.map(([x, y]) => [left + (x + 0.5) * steps[0] * scale,
        bottom - (y + 0.5) * steps[1] * scale]);
"""


def places_of(driver, number, voxels):
    case = driver.page.json("cases")["open"]
    spec = driver.page.json(f"case/{case}/describe")["planes"][number]
    return driver.execute_script(PLACES, number, spec, voxels)


def drag(driver, number, start, end, kind):
    """Press a pointer on a voxel of a plane, (across, up), move it to another voxel, and let it go.

    Return whether the stroke is seen just before the pointer goes.
    """
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    places = places_of(driver, number, [start, end])
    driver.execute_script(
        "const ink = document.querySelectorAll('.ink')[arguments[0]];"
        "const before = ink.toDataURL();"
        "const look = () => { window.isInked = ink.toDataURL() !== before; };"
        "document.addEventListener('pointerup', look, { once: true, capture: true })",
        number,
    )
    actions = ActionBuilder(driver, mouse=PointerInput(kind, kind), duration=20)
    actions.pointer_action.move_to_location(*map(round, places[0])).pointer_down()
    actions.pointer_action.move_to_location(*map(round, places[1])).pause(0.2).pointer_up()
    actions.perform()
    return driver.execute_script("return window.isInked")


def drawn(driver):
    return int(
        driver.execute_script("return document.querySelector('#saved-case').textContent").split()[0]
    )


def press(driver, key):
    driver.find_element("tag name", "body").send_keys(key)


def open_case(driver):
    return driver.execute_script("return document.querySelector('#case').textContent")


def case_states(driver):
    return driver.execute_script(
        "return [...document.querySelectorAll('#case-list .state')].map((node) => node.textContent)"
    )


# ---- Correcting cases


@contextmanager
def correcting(arguments, folder, browser):
    """The page on a folder of corrections, in a tab of the browser."""
    with (
        open_page(*arguments, "--corrections", folder) as running,
        open_tab(running, browser) as page,
    ):
        yield running, page


def stroke(driver, start, end, key="2"):
    """Draw with a brush of one voxel in the first plane, and wait for the result."""
    last = number(driver)
    driver.execute_script(
        "const size = document.querySelector('#size'); size.value = 1;"
        "size.dispatchEvent(new Event('input'))"
    )
    press(driver, key)
    drag(driver, 0, start, end, "mouse")
    wait_until_done(driver, last)


def is_shown(name):
    return f"document.querySelector('#{name}').checkVisibility()"


def wait_for_case(driver, name):
    wait(driver, f"document.querySelector('#case').textContent === '{name}'")
    wait(driver, "!document.querySelector('#planes').inert")
    wait_until_done(driver)


def pointer(driver, *steps):
    """Move the pointer to places of the window, press it ("down") or let it go ("up")."""
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    actions = ActionBuilder(driver)
    for step in steps:
        if step == "down":
            actions.pointer_action.pointer_down()
        elif step == "up":
            actions.pointer_action.pointer_up()
        else:
            actions.pointer_action.move_to_location(*map(round, step))
    actions.perform()


def connect(driver, *, is_offline):
    conditions = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd(
        "Network.emulateNetworkConditions", {**conditions, "offline": is_offline}
    )
