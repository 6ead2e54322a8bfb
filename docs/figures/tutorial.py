"""The preview of the tutorial's first case, with fewer pixels and colors than `infer` writes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from scene import PICTURES

from crfrefine.demo.phantom import make_phantom, write_phantom

WIDTH = 800
COLORS = 40


def draw() -> None:
    """Refine the case and shrink its preview."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_phantom(
            make_phantom(0, grid_shape=(64, 56, 24), spacing=(1.35, 1.35, 3.3)),
            folder,
            case_id="case_0",
        )
        command = [
            sys.executable,
            "-m",
            "crfrefine",
            "infer",
            "-i",
            folder / "images",
            "-p",
            folder / "logits",
            "-o",
            folder / "refined",
            "--preview",
            "-q",
        ]
        subprocess.run(command, check=True)
        picture = Image.open(folder / "refined" / "case_0_preview.png").convert("RGB")
    height = round(picture.height * WIDTH / picture.width)
    small = picture.resize((WIDTH, height), Image.Resampling.LANCZOS).quantize(
        COLORS, dither=Image.Dither.NONE
    )
    small.save(PICTURES / "tutorial_preview.png", optimize=True)


if __name__ == "__main__":
    draw()
