"""The site of the documentation, without the tools that build it: public names, what it loads. `make docs` checks the rest."""

import re
from pathlib import Path

import yaml

import crfrefine

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
API = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "reference" / "api").glob("*.md")))
SHOWN = re.findall(r"^::: ([\w.]+)$", API, re.MULTILINE)
PROMISED = {f"crfrefine.{name}" for name in crfrefine._MODULE_OF} | {"crfrefine.monai.CrfRefine", "crfrefine.monai.CrfRefined"}


def test_every_public_name_is_on_a_page_of_the_api_once():
    assert sorted(set(SHOWN)) == sorted(SHOWN)
    assert set(SHOWN) >= PROMISED


def test_the_site_loads_nothing_from_elsewhere_and_its_pictures_are_small():
    """Readers sit inside hospitals: no fonts, scripts or styles of other hosts, and no counters of visits."""
    assert CONFIG["theme"]["font"] is False
    assert "extra_javascript" not in CONFIG
    assert "analytics" not in CONFIG["extra"]
    assert not any("://" in address for address in CONFIG["extra_css"])
    assert "url(http" not in (DOCS / "theme" / "site.css").read_text(encoding="utf-8")
    # Material loads the program for these diagrams from elsewhere.
    assert not [page for page in DOCS.rglob("*.md") if "```mermaid" in page.read_text(encoding="utf-8")]
    scripts = "".join(script.read_text(encoding="utf-8") for script in (DOCS / "figures").glob("*.py"))
    names = re.findall(r'PICTURES / "(\w+\.png)"', scripts)
    assert names
    assert all((DOCS / "pictures" / name).stat().st_size <= 100_000 for name in names)
