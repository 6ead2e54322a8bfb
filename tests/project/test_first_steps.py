"""The notebook for beginners runs, prints what it holds, and stays small. Its cells are run as Jupyter does, without Jupyter."""

import ast
import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from cli_helpers import run_here

pytestmark = pytest.mark.long

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "first_steps.ipynb"
CONTENT = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
CODE = [cell for cell in CONTENT["cells"] if cell["cell_type"] == "code"]


def run_cell(source, names):
    """Run a cell; return what it prints, and its last expression as text."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, NOTEBOOK.name, "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names)
    return printed.getvalue(), None if value is None else repr(value)


def stored(cell):
    """What a cell printed, and its value as text, when the notebook was executed."""
    printed = "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")
    values = ["".join(out["data"]["text/plain"]) for out in cell["outputs"] if out["output_type"] == "execute_result"]
    return printed, values[0] if values else None


def in_process(words, **_):
    """Run a command as the notebook does, but in this process, which has imported what it needs."""
    assert words[:3] == [sys.executable, "-m", "crfrefine"]
    done = run_here(*words[3:], *(("--processes", 1) if words[3] == "evaluate" else ("--threads", 1)))
    return subprocess.CompletedProcess(words, done.status, done.stdout, done.stderr)


def test_every_cell_gives_what_the_notebook_shows(tmp_path, monkeypatch):
    matplotlib.use("agg")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("subprocess.run", in_process)
    names = {"__name__": "__main__"}
    for number, cell in enumerate(CODE, start=1):
        assert cell["execution_count"] == number, "executed from top to bottom"
        printed, value = run_cell("".join(cell["source"]), names)
        shown_printed, shown = stored(cell)
        assert printed == shown_printed
        if shown is None:
            assert any("image/png" in out["data"] for out in cell["outputs"] if out["output_type"] == "display_data") or value is None
        else:
            # Jupyter breaks long lists into lines.
            assert value is not None
            assert value.split() == shown.split()
