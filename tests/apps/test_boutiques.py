"""The descriptors for Boutiques are valid, and the command lines that `bosh` makes of them run."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import load_nifti, refined, run_here, write_folders

import crfrefine
from crfrefine.cli.describe import Described, command_of

BOSH = shutil.which("bosh", path=str(Path(sys.executable).parent))
needs_bosh = pytest.mark.skipif(BOSH is None, reason="boutiques, which has the command bosh, is not installed")


def descriptor_file(folder, command):
    done = run_here("describe", "boutiques", command, status=0)
    file = folder / f"{command}.json"
    file.write_text(done.stdout, encoding="utf-8")
    return file


def bosh(*arguments):
    done = subprocess.run([BOSH, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
@needs_bosh
def test_the_descriptors_are_valid_and_a_command_line_of_bosh_refines(tmp_path):
    for command in Described:
        assert "OK" in bosh("validate", descriptor_file(tmp_path, command.value))
    folders = write_folders(tmp_path, "a case")
    values = {
        "images": [str(folders.images / f"a case_000{modality}.nii.gz") for modality in range(2)],
        "logits": [str(folders.logits / "a case.nii.gz")],
        "output": str(tmp_path / "out.nii.gz"),
        "overrides": ["bilateral.theta_alpha=3", "mean_field.num_iterations=2", "mean_field.filter=lattice"],
        "input_type": "logits",
        "threads": 1,
        "preview": True,
    }
    invocation = tmp_path / "invocation.json"
    invocation.write_text(json.dumps(values), encoding="utf-8")
    shown = bosh("exec", "simulate", "-i", invocation, tmp_path / "infer.json")
    line = next(line for line in shown.splitlines() if "crfrefine infer" in line)
    run_here(*shlex.split(line[line.index("crfrefine infer") :])[1:], status=0)
    assert (tmp_path / "out_preview.png").is_file()
    wanted = refined(folders, "a case", **{"bilateral.theta_alpha": 3.0, "mean_field.num_iterations": 2})
    np.testing.assert_array_equal(load_nifti(tmp_path / "out.nii.gz"), wanted)


@pytest.mark.parametrize("command", list(Described))
def test_every_option_is_described(tmp_path, command):
    """Of the running command, as Typer sees it."""
    descriptor = json.loads(descriptor_file(tmp_path, command.value).read_text(encoding="utf-8"))
    assert descriptor["tool-version"] == crfrefine.__version__
    shown = {entry.get("command-line-flag", "") for entry in descriptor["inputs"]} - {""}
    text = run_here(command.value, "--help").stdout.replace("/--", " --")
    lines = [line.split()[:3] for line in text.splitlines() if line.lstrip().startswith("-")]
    # Another name of an option, behind a comma, is no other input.
    named = [[word for word in words if word.startswith("--")] for words in lines]
    wanted = {word.strip(",") for words in named for word in (words[:1] if words and words[0].endswith(",") else words)}
    assert shown == wanted - {"--help"}


def test_paths_switches_and_numbers_have_their_kinds():
    kinds = {option.name: option.kind for name in Described for option in command_of(name.value).options}
    assert kinds["images"] == kinds["source"] == kinds["folder"] == kinds["like"] == "input"
    assert kinds["output"] == kinds["target"] == kinds["summary"] == "output"
    assert (kinds["preview"], kinds["no_structures"], kinds["threads"], kinds["tolerance"], kinds["config"]) == (
        *("flag", "flag", "integer", "number", "text"),
    )
    threads = next(option for option in command_of("infer").options if option.name == "threads")
    assert (threads.minimum, threads.maximum, threads.is_required, threads.is_repeatable) == (1, 1024, False, False)
    images = next(option for option in command_of("infer").options if option.name == "images")
    assert images.is_repeatable
