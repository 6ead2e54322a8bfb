"""Each promise of docs/reference/guarantees.md names the tests that hold it, and those tests exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "guarantees.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows(text):
    return [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| promise", "| ---"))]


def missing(text):
    """Named tests that no file has, and rows that name none and do not say why."""
    found = []
    for row in rows(text):
        named = NAMED.findall(row)
        if not named and "not tested: " not in row:
            found.append(f"no test: {row[:60]}")
        for file, name in named:
            path = ROOT / file
            functions = (
                [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)] if path.exists() else []
            )
            if name not in functions:
                found.append(f"{file}::{name}")
    return found


def test_every_promise_has_tests_that_exist():
    text = PAGE.read_text()
    assert len(rows(text)) > 20
    assert missing(text) == []
