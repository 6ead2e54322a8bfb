"""The picture of `crfrefine tune` in the documentation: the page on the demo's phantom, in a headless Chromium.

Needs `pip install '.[tune]' selenium`, and chromium with chromedriver. Run as `python examples/tuning_picture.py`.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from crfrefine.apps.demo.phantom import make_phantom, write_phantom

MOST_BYTES = 300_000
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "tune.png"
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--force-color-profile=srgb")


def photograph(address: str) -> bytes:
    """Return the page as PNG, after its whole case was refined; end the page."""
    from selenium import webdriver
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = next(path for path in map(shutil.which, ("chromium", "google-chrome")) if path)
    for option in (*OPTIONS, "--window-size=1180,960"):
        options.add_argument(option)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.get(address)
        WebDriverWait(driver, 60).until(lambda driver: driver.execute_script("return document.body.dataset.state === 'done'"))
        driver.execute_script("document.querySelector('#show-changes').click()")
        picture: bytes = driver.get_screenshot_as_png()
        driver.find_element("id", "end").click()
        return picture
    finally:
        driver.quit()


def main() -> None:
    """Start the page on the phantom, and write the picture."""
    from PIL import Image

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=PICTURE, help="file to write (default: docs/pictures/tune.png)")
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        made = write_phantom(make_phantom(), folder)
        arguments = ["-i", made.images, "-p", made.logits, "-l", made.labels, "--no-browser"]
        values = ["--set", "bilateral.weight=5", "--set", "bilateral.theta_alpha=2.5", "--set", "bilateral.theta_beta=0.1"]
        command = [sys.executable, "-m", "crfrefine", "tune", *map(str, arguments), *values]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                picture = photograph(process.stdout.readline().strip())
            finally:
                process.terminate()
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(256, kmeans=4).save(buffer, "PNG", optimize=True)
    if len(buffer.getvalue()) > MOST_BYTES:
        sys.exit(f"the picture has {len(buffer.getvalue())} bytes, more than {MOST_BYTES}")
    output.write_bytes(buffer.getvalue())
    print(f"{output}: {len(buffer.getvalue()) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
