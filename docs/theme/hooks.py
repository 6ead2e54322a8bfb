"""What MkDocs does on its way from docs/ to the site.

Formulas as MathML, pages for linked files outside of docs/, anchors as on GitHub.

The pages are written for GitHub, which shows them as they are; this file makes the same text work
as a site.
"""

from __future__ import annotations

import ast
import html
import importlib.util
import json
import logging
import os
import posixpath
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, InclusionLevel
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[2]
ALWAYS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
"""Pages of the site's navigation that lie outside of docs/."""

LANGUAGES = {
    ".toml": "toml",
    ".py": "python",
    ".sh": "sh",
    ".h": "cpp",
    ".cpp": "cpp",
    ".cu": "cpp",
    ".m": "matlab",
    ".yaml": "yaml",
}

# Warnings of this logger end a strict build.
LOG = logging.getLogger("mkdocs.hooks.crfrefine")

_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_DISPLAY = re.compile(r"^(\$\$.*?\$\$)$", re.MULTILINE | re.DOTALL)
_TAG = re.compile(r"(<[^>]*>)")
_DOCUMENT = re.compile(r"(?<![\w/.-])(docs/[\w./-]+\.md)(#[\w-]+)?")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: Any) -> Any:
    """Give headings the anchors that GitHub gives them.

    Show the selector of versions where `mike` publishes several.
    """
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    if "MIKE_DOCS_VERSION" in os.environ:
        config.extra["version"] = {"provider": "mike"}
    return config


# ---- Linked files outside of docs/


def shown_at(path: str) -> str:
    """Return where the site has a file or folder of the repository: a page below docs/."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"source/{path}/README.md"
    if path.endswith(".md"):
        return f"source/{path}"
    return f"source/{path}.md"


def repository_path(page: str) -> str:
    """The file of the repository that a page of the site shows."""
    path = page.removeprefix("source/") if page.startswith("source/") else f"docs/{page}"
    if (ROOT / path).exists():
        return path
    return path.removesuffix(".md").removesuffix("/README")


def targets(text: str, path: str) -> list[str]:
    """The files and folders of the repository that a page at `path` links to."""
    links = (
        match[2].partition("#")[0]
        for match in _LINK.finditer(_FENCE.sub("", text))
        if "://" not in match[2]
    )
    return [
        posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for link in links if link
    ]


def page_of(path: str) -> str:
    """The Markdown of the page for a file or folder outside of docs/."""
    file = ROOT / path
    if file.is_dir() and not (file / "README.md").exists():
        rows = [
            f"| `{module.name}` | {first_sentence(module)} |"
            for module in sorted(file.glob("*.py"))
        ]
        return "\n".join([f"# {path}", "", "| file | purpose |", "| --- | --- |", *rows, ""])
    if file.is_dir():
        file = file / "README.md"
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return text
    if file.suffix == ".ipynb":
        return "\n\n".join(shown_cell(cell) for cell in json.loads(text)["cells"])
    head = f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n"
    return f"{head}````{LANGUAGES.get(file.suffix, '')}\n{text}\n````\n"


def shown_cell(cell: dict[str, Any]) -> str:
    """The Markdown of a notebook's cell, without its outputs."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    return f"```python\n{source}\n```"


def first_sentence(module: Path) -> str:
    """The first line of a module's docstring."""
    return html.escape(
        (ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    ).replace("|", "\\|")


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each file outside of docs/ that a page links to, and for those behind them."""
    pages = [file for file in files.documentation_pages() if file.inclusion.is_included()]
    waiting = [
        target for file in pages for target in targets(file.content_string, f"docs/{file.src_uri}")
    ] + list(ALWAYS)
    while waiting:
        path = waiting.pop()
        if (
            path.startswith("docs/")
            or files.get_file_from_path(shown_at(path))
            or not (ROOT / path).exists()
        ):
            continue
        text = page_of(path)
        files.append(
            File.generated(
                config, shown_at(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV
            )
        )
        if path.endswith(".md") or (ROOT / path).is_dir():
            waiting += targets(text, repository_path(shown_at(path)))
    # The style sheet names this font, so that formulas look the same whatever fonts the reader has
    # (SIL Open Font License).
    found = importlib.util.find_spec("ziamath")
    assert found is not None
    assert found.origin is not None
    font = Path(found.origin).parent / "fonts" / "STIXTwoMath-Regular.ttf"
    files.append(File.generated(config, f"theme/{font.name}", content=font.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to files outside of docs/ lead to their pages.

    Set formulas on lines of their own apart.
    """
    here = page.file.src_uri
    path = repository_path(here)

    def relinked(match: re.Match[str]) -> str:
        link, _, anchor = match[2].partition("#")
        if "://" in link or not link:
            return match[0]
        aim = shown_at(posixpath.normpath(posixpath.join(posixpath.dirname(path), link)))
        address = posixpath.relpath(aim, posixpath.dirname(here) or ".")
        if anchor:
            address += f"#{anchor}"
        return f"{match[1]}{address}{match[3]}"

    def changed(text: str) -> str:
        return _DISPLAY.sub(r"\n\1\n", _LINK.sub(relinked, text))

    parts = []
    last = 0
    for fence in _FENCE.finditer(markdown):
        parts += [changed(markdown[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join([*parts, changed(markdown[last:])])


def with_links(content: str, here: Any, files: Any) -> str:
    """Make links of paths such as docs/reference/math.md in running text.

    Docstrings and messages name pages in this way.

    Args:
        content: HTML.
        here: the file of the page.
        files: those of the site.
    """

    def linked(match: re.Match[str]) -> str:
        aim = files.get_file_from_path(match[1].removeprefix("docs/"))
        if aim:
            return f'<a href="{aim.url_relative_to(here)}{match[2] or ""}">{match[0]}</a>'
        return match[0]

    parts = []
    inside = 0
    for part in _TAG.split(content):
        if tag := re.match(r"<(/?)(?:a|code|pre|h\d)\b", part):
            inside += -1 if tag[1] else 1
        parts.append(part if inside or part.startswith("<") else _DOCUMENT.sub(linked, part))
    return "".join(parts)


# ---- Formulas

LONG = 60
"""Characters of a formula in a line from which on it scrolls where the page is narrow."""

PLAINER = (
    (re.compile(r"\\mathrel\{(.)\}"), r"\1"),
    (re.compile(r"\\(mathbb|mathbf) +(\w)"), r"\\\1{\2}"),
)
"""What the converter takes in another form only."""

BETTER = (
    ("<mover>", '<mover accent="true">'),
    ("<mo>&#x0002B;</mo><mo>&#x0003D;</mo>", "<mo>+=</mo>"),
    ("<mo>&#x02212;</mo><mo>&#x0003D;</mo>", "<mo>−=</mo>"),
    ('<mn mathvariant="bold">1</mn>', "<mn>\U0001d7cf</mn>"),
)
"""What browsers show better in another form."""


def on_page_content(content: str, page: Any, files: Any, **_: Any) -> str:
    """Turn the formulas of a page into MathML, which browsers show by themselves.

    Let paths of pages in its text be links.
    """

    def as_mathml(match: re.Match[str]) -> str:
        formula = html.unescape(match[2])
        display, kind = (
            ("block", "formula")
            if match[1] == "div"
            else ("inline", "formula long" if len(formula) > LONG else "formula")
        )
        return (
            f'<{match[1]} class="{kind}">{mathml(formula, display, page.file.src_uri)}</{match[1]}>'
        )

    return with_links(_FORMULA.sub(as_mathml, content), page.file, files)


def mathml(formula: str, display: str, where: str) -> str:
    """One formula as MathML; what cannot be converted ends a strict build."""
    for pattern, plainer in PLAINER:
        formula = pattern.sub(plainer, formula)
    try:
        result = convert(formula, display=display)
        unknown = [text for text in ET.fromstring(result).itertext() if "\\" in text]
    except Exception as error:  # The converter raises many kinds.
        LOG.warning("%s: the formula %r cannot be converted: %r", where, formula, error)
        return html.escape(formula)
    if unknown:
        LOG.warning(
            "%s: the formula %r has commands that are not known: %s",
            where,
            formula,
            ", ".join(unknown),
        )
    for less, better in BETTER:
        result = result.replace(less, better)
    return result
