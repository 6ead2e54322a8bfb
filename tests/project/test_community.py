"""Files for whoever cites, reports or contributes: they parse, they agree with the package, and what they name exists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import crfrefine

ROOT = Path(__file__).resolve().parents[2]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))

if not (ROOT / ".github").is_dir():
    pytest.skip("not a checkout: a source distribution has no templates", allow_module_level=True)


def read(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def test_the_citation_has_the_packages_version():
    citation = read(ROOT / "CITATION.cff")
    assert str(citation["version"]) == crfrefine.__version__
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"] == [{"name": "The crfrefine developers"}]


def test_the_citation_names_the_papers_of_the_readme():
    papers = {(paper["authors"][0]["family-names"], paper["year"]) for paper in read(ROOT / "CITATION.cff")["references"]}
    assert papers == {("Monteiro", 2018), ("Krähenbühl", 2011), ("Zheng", 2015), ("Adams", 2010)}
    listed = (ROOT / "README.md").read_text(encoding="utf-8").partition("## License and citation")[2]
    assert all(name in listed and str(year) in listed for name, year in papers)


def test_there_is_a_form_for_each_reason_to_write():
    assert {path.stem for path in FORMS} == {"bug", "feature", "question"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_is_what_github_takes(path):
    form = read(path)
    assert form["name"]
    assert form["description"]
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    names = [field["id"] for field in fields]
    assert len(set(names)) == len(names)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_a_report_of_a_fault_comes_with_the_machine():
    fields = {part.get("id"): part for part in read(ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml")["body"]}
    assert "crfrefine doctor --json" in fields["doctor"]["attributes"]["label"]
    assert fields["doctor"]["validations"]["required"] is True
