"""A real browser without a window: Debian's Chromium, driven by selenium."""

import importlib.util
import json
import shutil
from contextlib import contextmanager

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# Nothing of it is to reach out for the network, and a container's root has no sandbox.
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --force-color-profile=srgb"
)


def missing_browser():
    """Why no browser can be driven here; empty if one can."""
    if importlib.util.find_spec("selenium") is None:
        return "no selenium, which drives the browser: it is in the group `test` of pyproject.toml"
    for what, names in (("Chromium or Chrome", NAMES), ("chromedriver", ("chromedriver",))):
        if not any(map(shutil.which, names)):
            return f"no {what} on this machine: as root, `apt-get install chromium chromium-driver` brings both"
    return ""


@contextmanager
def open_browser(profile):
    """Start a browser with a profile of its own."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = next(path for path in map(shutil.which, NAMES) if path)
    for option in (*OPTIONS.split(), f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def requested(driver):
    """Every address that the page asked for since the last call; the browser's own first page may still be loading, and asks, too."""
    messages = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    return [params["request"]["url"] for params in sent if not params["documentURL"].startswith("chrome:")]


def resize(driver, width):
    """Make the page as wide as a phone or a desk, in CSS pixels."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def prefer(driver, scheme):
    """Let the system prefer "light" or "dark"."""
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})


def wait(driver, condition):
    """Until a condition in the page's own language holds."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 60, poll_frequency=0.02).until(lambda driver: driver.execute_script(f"return Boolean({condition})"), condition)
