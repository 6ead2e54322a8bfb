"""The planted faults keep up with the sources."""

import ast
from pathlib import Path

from script_imports import importing_from

PLANTED = Path(__file__).resolve().parents[1] / "planted"


def test_every_fault_has_its_place():
    with importing_from(PLANTED) as load:
        faults = load("run").read_faults()
        problems = [load("run").problem_of(fault) for fault in faults]
    assert [problem for problem in problems if problem] == []
    assert len(faults) >= 120
    for fault in faults:
        if fault.file.endswith(".py"):  # One that no module survives would say nothing about the tests.
            ast.parse((PLANTED.parents[1] / fault.file).read_text("utf-8").replace(fault.old, fault.new))
