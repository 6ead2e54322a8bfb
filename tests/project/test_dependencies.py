"""The page of dependencies has every package and every extra that an installation may bring, and no other."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGE = (ROOT / "docs" / "reference" / "dependencies.md").read_text(encoding="utf-8")


def first_cells(text: str) -> set[str]:
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for cell in rows for name in re.findall(r"`([^`]+)`", cell)}


def test_every_dependency_has_a_row():
    packages, _, _ = PAGE.partition("## Extras")
    assert first_cells(packages) == {re.split(r"[<>=\[]", line)[0] for line in PROJECT["dependencies"]}


def test_every_extra_has_a_row():
    _, _, extras = PAGE.partition("## Extras")
    assert first_cells(extras) == PROJECT["optional-dependencies"].keys() - {"all"}
