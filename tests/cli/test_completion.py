"""Shells complete the names of commands, options and values: the scripts that `--show-completion` prints, in bash itself."""

import os
import shutil
import subprocess
import sys

import pytest
import typer.main
from cli_helpers import run_here

from crfrefine.cli.main import app
from crfrefine.cli.options import complete_config

BASH = shutil.which("bash")


@pytest.mark.skipif(BASH is None, reason="needs bash")
def test_bash_completes(tmp_path):
    program = tmp_path / "crfrefine"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m crfrefine "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    words = {"crfrefine infer --input-type l": ["labels", "logits"], "crfrefine info doc": []}
    script = """
        eval "$(crfrefine --show-completion bash)"
        while read -r line; do
          COMP_WORDS=($line); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _crfrefine_completion crfrefine; echo "${COMPREPLY[@]}"
        done
        complete -p crfrefine"""
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    given = {"input": "\n".join([*words, ""]), "env": environment, "capture_output": True, "text": True, "timeout": 120}
    run = subprocess.run([BASH, "--norc", "-c", script], check=False, **given)
    assert run.returncode == 0, run.stderr
    *offered, rule = run.stdout.splitlines()
    assert [sorted(line.split()) for line in offered] == list(words.values())
    assert "-o default" in rule


def test_presets_and_files_of_parameters_are_completed(tmp_path, monkeypatch):
    """A path is none of both, so that the shell completes it as a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.toml").touch()
    offered = complete_config("body-c") + complete_config("li")
    assert offered == [
        ("body-ct", "Organs and bones in CT in Hounsfield units, as many labels as there are"),
        ("lines.toml", "file of parameters"),
    ]
    assert complete_config("./li") == []
    for name in ("infer", "train-crf", "tune"):
        (option,) = (found for found in typer.main.get_command(app).commands[name].params if "--config" in found.opts)
        assert [item.value for item in option.shell_complete(None, "bra")] == ["brats"]


def test_completion_is_installed_for_the_shell_that_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for shell, place in (
        ("bash", ".bash_completions/crfrefine.sh"),
        ("zsh", ".zfunc/_crfrefine"),
        ("fish", ".config/fish/completions/crfrefine.fish"),
    ):
        done = run_here("--install-completion", shell, status=0)
        assert place in done.stdout
        assert "_CRFREFINE_COMPLETE" in (tmp_path / place).read_text(encoding="utf-8")
    unknown = run_here("--show-completion", "tcsh", status=2)
    assert "tcsh: expected one of bash, zsh, fish" in unknown.stderr
