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


def test_the_citation_has_the_packages_version_and_names_the_papers_of_the_readme():
    citation = read(ROOT / "CITATION.cff")
    assert (str(citation["version"]), citation["cff-version"]) == (crfrefine.__version__, "1.2.0")
    assert citation["authors"] == [{"name": "The crfrefine developers"}]
    papers = {(paper["authors"][0]["family-names"], paper["year"]) for paper in citation["references"]}
    assert papers == {("Monteiro", 2018), ("Krähenbühl", 2011), ("Zheng", 2015), ("Adams", 2010)}
    listed = (ROOT / "README.md").read_text(encoding="utf-8").partition("## License and citation")[2]
    assert all(name in listed and str(year) in listed for name, year in papers)


def test_there_is_a_form_for_each_reason_to_write_and_a_report_of_a_fault_comes_with_the_machine():
    assert {path.stem for path in FORMS} == {"bug", "feature", "question"}
    for path in FORMS:
        form = read(path)
        assert form["name"]
        assert form["description"]
        fields = {field["id"]: field for field in form["body"] if field["type"] != "markdown"}
        assert len(fields) == sum(part["type"] != "markdown" for part in form["body"]), "no name twice"
        assert all(field["attributes"]["label"] for field in fields.values())
        assert any(field.get("validations", {}).get("required") for field in fields.values())
        if path.stem == "bug":
            assert "crfrefine doctor --json" in fields["doctor"]["attributes"]["label"]
            assert fields["doctor"]["validations"]["required"] is True
