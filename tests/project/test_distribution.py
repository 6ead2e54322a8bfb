"""Files that name the package's version, parts or dependencies agree with it: citation and dependencies."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import crfrefine

ROOT = Path(__file__).resolve().parents[2]

if not (ROOT / ".github").is_dir():
    pytest.skip("not a checkout: a source distribution need not have these files", allow_module_level=True)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_citation_has_the_packages_version_and_the_papers_of_the_readme():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == crfrefine.__version__
    papers = {(paper["authors"][0]["family-names"], paper["year"]) for paper in citation["references"]}
    assert papers == {("Monteiro", 2018), ("Krähenbühl", 2011), ("Zheng", 2015), ("Adams", 2010)}
    listed = (ROOT / "README.md").read_text(encoding="utf-8").partition("## License and citation")[2]
    assert all(name in listed and str(year) in listed for name, year in papers)


def test_every_dependency_and_every_extra_has_a_row():
    page = (ROOT / "docs" / "reference" / "dependencies.md").read_text(encoding="utf-8")
    cells = [" ".join(re.findall(r"^\| (`[^|]+)", part, re.MULTILINE)) for part in page.split("## Extras")]
    found = [set(re.findall("`([^`]+)`", cell)) for cell in cells]
    wanted = {re.split(r"[<>=\[]", line)[0] for line in PROJECT["project"]["dependencies"]}
    assert found == [wanted, PROJECT["project"]["optional-dependencies"].keys() - {"all"}]
