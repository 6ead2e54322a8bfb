"""Help, version, wrong usage, and what the command does not import."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import typer.main
from cli_helpers import files_in, run_here, run_process, write_folders

from crfrefine.cli.commands import COMMANDS, PANELS
from crfrefine.cli.main import app
from crfrefine.cli.options import GONE

BASH = shutil.which("bash")


@pytest.mark.parametrize("name", ["infer", "train-crf", "evaluate", "tune"])
def test_help_has_panels_and_every_option_in_one(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = run_here(name, "--help").stdout
    panels = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    assert panels == sorted(set(panels), key=["Arguments", *PANELS].index)
    assert "More options" not in panels, "name the new option in cli/options.py"
    shown = re.findall(r"^  .*?(--[a-z-]+)", text, re.MULTILINE)
    options = [parameter for parameter in typer.main.get_command(app).commands[name].params if parameter.param_type_name == "option"]
    assert {max(option.opts, key=len) for option in options} <= set(shown)


WRONG = (
    *("refine", "infer", "infer --frobnicate", "convert only_one.nii.gz", "convert a.nii.gz b.nii.gz --to colors", "demo --seed -3"),
    *("info ''", "convert a.nii.gz ''"),
    *(f"infer {{case}} {option} ''" for option in ("-i", "-p", "-o", "-m", "-c", "--summary")),
    *("infer {case} --input-type votes", "infer {case} --threads 1025", "infer {case} --threads many", "infer {case} --max-memory 8X"),
    *("infer {case} --num-parts 2", "infer {case} --num-parts 2 --part-id 2", "infer {case} -v -q"),
)


def test_wrong_usage_exits_with_2(tmp_path, monkeypatch):
    """An empty path is not the current folder."""
    folders = write_folders(tmp_path, "a")
    monkeypatch.chdir(tmp_path)
    before = files_in(tmp_path)
    for line in WRONG:
        result = run_here(*shlex.split(line.format(case=shlex.join(map(str, folders.arguments)))))
        assert (result.status, result.stdout) == (2, ""), line
        assert result.stderr.startswith("Usage:")
        assert result.stderr.splitlines()[-1].startswith("crfrefine: error: "), "as all other errors"
        assert ("the value is empty" in result.stderr) == ("''" in line)
    assert files_in(tmp_path) == before


def test_a_command_or_option_that_is_gone_says_what_does_its_job():
    for name, instead in GONE.items():
        command = "evaluate" if "evaluate" in instead else "infer"
        words = (command, name) if name.startswith("--") else (name,)
        assert instead in run_here(*words, status=2).stderr.splitlines()[-1]
    assert GONE["--workers"] in run_here("infer", "--workers=3", status=2).stderr
    for device in ("cuda:all", "cuda:0,1"):
        result = run_here("infer", "-i", "a", "-p", "b", "-o", "c", "--device", device, status=2)
        assert "run one `infer --device cuda:N` per GPU" in " ".join(result.stderr.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_values_are_converted_as_typer_converts_them(name):
    """Each option of each command, with what may be given: the same value, or the same words about it."""
    made = typer.main.get_command(app).commands[name]
    context = typer.Context(made, info_name=name)

    def outcome(convert, *arguments):
        try:
            return convert(*arguments)
        except (typer.BadParameter, typer.Exit) as error:
            return type(error), str(error)

    for parameter in made.get_params(context):
        if parameter.callback is None:
            for text in (None, "", "0", "3", "+3", "x", "auto", "a.nii", "1e3", "8GiB", parameter.default):
                value = [text, text] if parameter.multiple or parameter.nargs == -1 else text
                own = outcome(parameter.process_value, context, value)
                typers = outcome(type(parameter).process_value, parameter, context, value)
                assert (own, type(own)) == (typers, type(typers)), (parameter.name, value)


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        ("--help", "numpy rich nibabel SimpleITK scipy matplotlib pydantic torch cupy"),
        # Presets with a volume term need scipy.ndimage.
        ("infer {case} --set mean_field.filter=lattice", "torch cupy SimpleITK matplotlib pydicom scipy.ndimage pydantic"),
        ("info {image}", "rich SimpleITK scipy.ndimage matplotlib pydantic pydicom crfrefine.parameters.model"),
    ],
)
def test_start_up_imports_no_more_than_it_needs(arguments, unwanted, tmp_path):
    """Each of these takes from 40 ms to a second to import, and a loop over cases starts the command once for each."""
    folders = write_folders(tmp_path, "a")
    words = arguments.format(case=shlex.join(map(str, folders.arguments)), image=folders.images / "a_0000.nii.gz").split()
    line = "import sys, atexit; atexit.register(lambda: print(*filter(sys.modules.get, sys.modules), file=sys.stderr)); "
    line += "import runpy; runpy.run_module('crfrefine', run_name='__main__', alter_sys=True)"
    done = subprocess.run([sys.executable, "-c", line, *words], capture_output=True, text=True, timeout=120, check=True)
    assert not set(unwanted.split()) & set(done.stderr.splitlines()[-1].split())


def test_signs_that_a_terminal_lacks_are_spelled(tmp_path):
    image = (write_folders(tmp_path, "a").images / "a_0000.nii.gz").rename(tmp_path / "σ.nii.gz")
    done = run_process("info", image, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert re.search("[0-9]x[0-9]", done.stdout)
    assert "\\u03c3" in done.stdout


# ---- Completion, by the script that `--show-completion` prints, in bash itself


@pytest.mark.skipif(BASH is None, reason="needs bash")
def test_bash_completes(tmp_path):
    program = tmp_path / "crfrefine"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m crfrefine "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    words = {"crfrefine infer --input-type l": ["labels", "logits"], "crfrefine info doc": []}
    words |= {"crfrefine infer -c body-c": ["body-ct"], "crfrefine infer -c li": ["lines.toml"], "crfrefine tune -c ./li": []}
    (tmp_path / "lines.toml").touch()
    script = """
        eval "$(crfrefine --show-completion bash)"
        while read -r line; do
          COMP_WORDS=($line); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _crfrefine_completion crfrefine; echo "${COMPREPLY[@]}"
        done
        complete -p crfrefine"""
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    given = {"input": "\n".join([*words, ""]), "env": environment, "capture_output": True, "text": True, "timeout": 120, "cwd": tmp_path}
    run = subprocess.run([BASH, "--norc", "-c", script], check=False, **given)
    assert run.returncode == 0, run.stderr
    *offered, rule = run.stdout.splitlines()
    assert [sorted(line.split()) for line in offered] == list(words.values())
    assert "-o default" in rule
