"""Geometry, contours and requests of the page of `tune`, without a browser: `node --test`."""

import shutil
import subprocess
from pathlib import Path

import pytest

NODE = shutil.which("node")
TESTS = Path(__file__).with_name("tune_numbers.test.mjs")


@pytest.mark.skipif(NODE is None, reason="needs node, version 20.10 or later")
def test_the_numbers_and_requests_of_the_page_are_right():
    words = [NODE, "--experimental-default-type=module", "--test", TESTS]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
