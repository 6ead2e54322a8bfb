"""What the scripts share that needs nothing but the standard library."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / ".bench"
DATA = Path(os.environ.get("CRFREFINE_DATA", "../shared/data")).absolute()  # real cases


def new_parser(text: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with a script's docstring, in its own lines."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=text, formatter_class=raw)


def case_names(folder: Path) -> list[str]:
    """The names of the cases that a folder has labels of."""
    files = sorted((folder / "labels").glob("*.nii.gz"))
    return [file.name.removesuffix(".nii.gz") for file in files]


def spread(option: str, values: object) -> list[str]:
    """An option before each of its values, as a command takes them."""
    words = []
    for value in values:
        words += [option, str(value)]
    return words
