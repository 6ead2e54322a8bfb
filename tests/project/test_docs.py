"""The documentation agrees with the tree: links, anchors and paths lead somewhere, and options,
keys and examples are those of the code.
"""

import dataclasses
import doctest
import importlib
import pydoc
import re
import runpy
import tomllib
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

import crfrefine
from crfrefine.cli.main import COMMANDS, app
from crfrefine.parameters.sections import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "configs", "crfrefine", "docs", "examples", "kernels", "tests")
"""Top-level folders; whatever a text names in one of them must exist."""

SUFFIXES = {".md", ".py", ".toml", ".h", ".cpp", ".cu", ".html", ".css", ".js", ".sh"}
TEXTS = sorted(
    path
    for path in [
        *ROOT.glob("*.*"),
        ROOT / "Makefile",
        *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*")),
    ]
    if path.name == "Makefile" or path.suffix in SUFFIXES
)
PAGES = [path for path in TEXTS if path.suffix == ".md"]

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_DOCUMENT = re.compile(r"(?<![\w/.-])(docs/[\w./-]+\.(?:md|json|png))(#[\w-]+)?")
_PATH = re.compile(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w./-]+\.\w+)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_OPTION = re.compile(r"(?<![\w-])(--?[a-z][a-z-]*)")


def without_code(text):
    return _FENCE.sub("", text)


def anchors(page):
    """The anchors that GitHub gives to headings: lower case, without punctuation, hyphens for
    spaces, numbered when repeated.
    """
    found = {}
    for title in re.findall(
        r"^#+ +(.+)$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE
    ):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "").strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        found[anchor] = found.get(anchor, -1) + 1
    return {
        f"{anchor}-{number}" if number else anchor
        for anchor, last in found.items()
        for number in range(last + 1)
    }


def broken_target(page, target):
    """What is wrong with a link, or None."""
    file, _, anchor = target.partition("#")
    aim = (page.parent / file).resolve() if file else page
    if not aim.exists():
        return f"{target}: no such file"
    if anchor and (aim.suffix != ".md" or anchor not in anchors(aim)):
        return f"{target}: no such heading"
    return None


def broken_documents(text):
    """Pages that a text names by their path from the root of the repository, and that do not exist
    or lack the heading.
    """
    return [
        broken_target(ROOT / "README.md", path + anchor) for path, anchor in _DOCUMENT.findall(text)
    ]


def broken_links(page, text):
    """Links, and paths from the root, that lead nowhere; those in capitals, such as
    configs/NAME.toml, are placeholders.
    """
    links = [
        broken_target(page, target)
        for target in _LINK.findall(without_code(text))
        if "://" not in target
    ]
    paths = {path for path in _PATH.findall(text) if not re.search(r"[A-Z]{4,}\.", path)}
    return links + [path for path in paths if not (ROOT / path).exists()] + broken_documents(text)


def of_each(paths, problems):
    """What is wrong with each of some files, by name: one test for all, since a test per file took
    longer than its check.
    """
    found = {
        str(path.relative_to(ROOT)): set(problems(path, path.read_text(encoding="utf-8"))) - {None}
        for path in paths
    }
    return {name: wrong for name, wrong in found.items() if wrong}


def test_every_link_and_path_leads_somewhere():
    assert of_each(PAGES, broken_links) == {}
    others = (path for path in TEXTS if path.suffix != ".md" and path != Path(__file__))
    assert of_each(others, lambda _, text: broken_documents(text)) == {}


def test_every_promise_has_tests_that_exist():
    """Each row of the guarantees names them."""
    text = (ROOT / "docs" / "reference" / "guarantees.md").read_text(encoding="utf-8")
    rows = [
        line
        for line in text.splitlines()
        if line.startswith("| ") and not line.startswith(("| promise", "| ---"))
    ]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named or "not tested: " in row, row
        for file, name in named:
            assert (ROOT / file).is_file(), file
            assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


# ---- Commands


def options_of(command):
    parameters = typer.main.get_command(app).get_command(None, command).params
    options = [parameter for parameter in parameters if parameter.param_type_name == "option"]
    return {name for option in options for name in (*option.opts, *option.secondary_opts)} - {
        "--help",
        "-h",
    }


def test_the_tables_of_options_are_those_of_the_commands():
    page = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert all(f"<!-- options of {command} -->" in page for command in COMMANDS)
    made = runpy.run_path(str(ROOT / "docs" / "options.py"))["with_tables"](page)
    assert made == page, "run python docs/options.py"


def unknown_options(_, text):
    blocks = "\n".join(
        block for language, block in _FENCE.findall(text) if language == "sh"
    ).replace("\\\n", " ")
    for command, words in re.findall(r"^\s*crfrefine ([a-z-]+)([^|;&#\n]*)", blocks, re.MULTILINE):
        yield from (
            f"{command} {option}" for option in set(_OPTION.findall(words)) - options_of(command)
        )


def test_the_commands_of_examples_exist():
    assert of_each(PAGES, unknown_options) == {}


# ---- Parameters


def test_every_key_is_in_the_reference_with_its_default():
    text = (ROOT / "docs" / "reference" / "parameters.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    documented = {row[0].strip("`"): row[1].strip("`") for row in rows}
    defaults = {
        f"{table}.{entry.name}": entry.default
        for table, kind in SECTIONS.items()
        for entry in dataclasses.fields(kind)
    }
    assert documented.keys() == defaults.keys() | {"schema", "modalities", "trained_on"}
    for key, default in defaults.items():
        shown = (
            None
            if documented[key] == "not set"
            else tomllib.loads(f"value = {documented[key]}")["value"]
        )
        assert (tuple(shown) if isinstance(shown, list) else shown) == default, key


# ---- Examples in docstrings

MODULES = {
    "refinement.case": "refine",
    "parameters.model": "CrfParameters",
    "layer.loss": "crf_loss",
    "layer.module": "CrfRnn",
}


@pytest.mark.parametrize(("module", "name"), MODULES.items())
def test_every_public_name_that_does_something_has_an_example_that_runs(module, name):
    if module.startswith("layer"):
        pytest.importorskip(
            "torch", reason="the layer needs PyTorch: pip install 'crfrefine[train]'"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = doctest.testmod(importlib.import_module(f"crfrefine.{module}"))
    assert found.attempted > 0 == found.failed
    assert ">>> " in getattr(crfrefine, name).__doc__


# ---- The site


def test_every_public_name_is_on_a_page_of_the_api_once():
    pages = [
        page.read_text(encoding="utf-8")
        for page in sorted((ROOT / "docs" / "reference" / "api").glob("*.md"))
    ]
    shown = re.findall(r"^::: ([\w.]+)$", "\n".join(pages), re.MULTILINE)
    assert len(set(shown)) == len(shown)
    promised = {f"crfrefine.{name}" for name in crfrefine._MODULE_OF}
    assert set(shown) >= promised | {"crfrefine.monai.CrfRefine", "crfrefine.monai.CrfRefined"}
    page = (ROOT / "docs" / "reference" / "public.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"`(crfrefine(?:\.\w+)+)`", page)) == sorted(shown)
    needs = {
        name: "torch"
        if re.search("CrfRnn|crf_loss|layer", name)
        else "monai"
        if "monai" in name
        else "numpy"
        for name in shown
    }
    assert [
        name for name in shown if find_spec(needs[name]) is not None and pydoc.locate(name) is None
    ] == []
    assert {*COMMANDS, *SECTIONS} <= set(re.findall(r"`([a-z_-]+)`", page))
