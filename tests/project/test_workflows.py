"""The workflows of the examples run where their engines are installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import load_nifti, run_here
from tune_helpers import write_labeled

pytestmark = pytest.mark.long

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "workflows"
CASES = ("a", "b c")  # one name has a blank


@pytest.mark.parametrize("engine", ["snakemake", "nextflow"])
def test_a_workflow_refines_and_evaluates(engine, tmp_path):
    if (found := shutil.which(engine, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")) is None:
        pytest.skip(f"{engine} is not installed")
    folders, labels = write_labeled(tmp_path, *CASES)
    command = f"{sys.executable} -m crfrefine"
    options = {"images": folders.images, "logits": folders.logits, "labels": labels, "output": "out", "command": command}
    words = ["run", EXAMPLES / "main.nf", *(word for name, value in options.items() for word in (f"--{name}", value))]
    if engine == "snakemake":
        words = ["-s", EXAMPLES / "Snakefile", "--cores", 1, "--config", *(f"{name}={value}" for name, value in options.items())]
    done = subprocess.run([found, *map(str, words)], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert run_here("infer", *folders.arguments, "-q").status == 0
    for name in CASES:
        refined, wanted = (load_nifti(folder / f"{name}.nii.gz") for folder in (tmp_path / "out" / "refined", folders.output))
        np.testing.assert_array_equal(refined, wanted)
    assert (tmp_path / "out" / "report" / "report.html").is_file()
