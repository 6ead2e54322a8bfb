"""Help, version, wrong usage, and what the command does not import."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import typer.main
from cli_helpers import command, files_in, infer, run_here, run_process, statuses, write_folders

import crfrefine
from crfrefine.cli.commands import COMMANDS, PANELS
from crfrefine.cli.main import app
from crfrefine.cli.refusals import GONE


def test_help_describes_each_command_to_the_end_of_the_sentence(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    alone = run_here(status=2)
    assert "\\n" not in alone.stderr
    lines = run_here("--help").stdout.partition("Commands:\n")[2].splitlines()
    assert alone.stderr.partition("\nCommands:\n")[2].splitlines() == lines
    assert lines
    assert all(line.endswith(".") and not line.endswith("...") for line in lines), lines


@pytest.mark.parametrize("name", ["infer", "train-crf", "evaluate", "tune"])
def test_help_has_panels_and_every_option_in_one(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = run_here(name, "--help").stdout
    panels = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    order = ["Arguments", *PANELS]
    assert panels == sorted(set(panels), key=order.index)
    assert {"Input", "Output", "Model", "Resources", "Messages"} - ({"Model"} if name == "evaluate" else set()) <= set(panels)
    assert "More options" not in panels, "name the new option in cli/options.py"
    shown = re.findall(r"^  .*?(--[a-z-]+)", text, re.MULTILINE)
    options = [parameter for parameter in typer.main.get_command(app).commands[name].params if parameter.param_type_name == "option"]
    assert {max(option.opts, key=len) for option in options} <= set(shown)
    if name == "infer":
        needed = ("-i, --images", "-p, --logits", "-o, --output", "-c, --config", "Rarely needed:", "--fail-fast")
        places = [text.index(word) for word in needed]
        assert places == sorted(places)


def test_version():
    assert run_here("--version").stdout == f"crfrefine {crfrefine.__version__}\n"


WRONG = """\
refine
infer
infer --frobnicate
infer {case} --input-type votes
infer {case} --threads 0
infer {case} --threads 1025
demo --threads 1025
infer {case} --threads many
infer {case} --num-parts 0 --part-id 0
infer {case} --num-parts 2
infer {case} --num-parts 2 --part-id 2
infer {case} --part-id -1
infer {case} --max-memory 8X
infer {case} -v -q
convert only_one.nii.gz
convert a.nii.gz b.nii.gz --to colors
demo --seed -3
infer {case} -i ''
infer {case} -p ''
infer {case} -o ''
infer {case} -m ''
infer {case} -c ''
infer {case} --summary ''
info ''
convert '' b.nii.gz
convert a.nii.gz ''
demo -o ''
convert a.nii.gz b.nii.gz --like ''
"""


@pytest.mark.parametrize("line", WRONG.splitlines())
def test_wrong_usage_exits_with_2(line, tmp_path, monkeypatch):
    """An empty path is not the current folder."""
    folders = write_folders(tmp_path, "a")
    monkeypatch.chdir(tmp_path)
    before = files_in(tmp_path)
    result = run_here(*shlex.split(line.format(case=shlex.join(map(str, folders.arguments)))))
    assert (result.status, result.stdout) == (2, "")
    assert result.stderr.startswith("Usage:")
    assert result.stderr.splitlines()[-1].startswith("crfrefine: error: "), "as all other errors"
    assert ("the value is empty" in result.stderr) == ("''" in line)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("name", GONE)
def test_a_command_or_option_that_is_gone_says_what_does_its_job(name):
    command = "evaluate" if "evaluate" in GONE[name] else "infer"
    result = run_here(*[command, name][not name.startswith("--") :], status=2)
    assert GONE[name] in result.stderr.splitlines()[-1]
    assert name not in COMMANDS


def test_an_option_that_is_gone_says_so_with_a_value_too(monkeypatch):
    monkeypatch.setitem(GONE, "--turbo", "`--turbo` is gone: every run is fast")
    for words in (("--turbo", "3"), ("--turbo=3",)):
        assert run_here("infer", *words, status=2).stderr.endswith("crfrefine: error: `--turbo` is gone: every run is fast\n")


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
        (
            "infer {case} --set mean_field.filter=lattice",  # Presets with a volume term need scipy.ndimage.
            "torch cupy SimpleITK matplotlib pydicom scipy.ndimage numpy.ma pydantic",
        ),
        pytest.param(
            "info {image}", "rich SimpleITK scipy.ndimage matplotlib pydantic pydicom crfrefine.parameters.model", marks=pytest.mark.long
        ),
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


def test_a_closed_pipe_is_no_traceback(tmp_path):
    """As in `crfrefine info FOLDER | head -1`."""
    folders = write_folders(tmp_path, *(f"case_{number:03d}" for number in range(4)))
    with subprocess.Popen(
        command("info", *sorted(folders.images.iterdir()) * 400), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        process.stderr.close()
        process.wait(timeout=60)


def test_signs_that_a_terminal_lacks_are_spelled(tmp_path):
    image = (write_folders(tmp_path, "a").images / "a_0000.nii.gz").rename(tmp_path / "σ.nii.gz")
    done = run_process("info", image, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert re.search("[0-9]x[0-9]", done.stdout)
    assert "\\u03c3" in done.stdout


def test_one_word_for_one_thing_in_all_commands(tmp_path):
    folders = write_folders(tmp_path, "a")
    for status in ("done", "skipped"):
        assert statuses(infer(folders, "--resume")) == [("a", status)]
    for options in (("--threads", "1"), ("--processes", "1")):
        result = run_here("evaluate", folders.output, folders.output, "-o", tmp_path / "report", "--no-report", *options, status=0)
    for name in ("--resume", "--continue"):
        result = run_here("train-crf", name, "-o", tmp_path / "p.toml")
        assert "name the folder of the data" in " ".join(result.stderr.split()), "the option itself is known"


def test_options_that_are_gone_name_what_does_their_job(tmp_path):
    for name, inputs, option, reason in (
        (
            "infer",
            ("-i", tmp_path, "-p", tmp_path),
            ("--workers", "2"),
            "start a Dask scheduler and workers and give its address with --dask",
        ),
        ("infer", ("-i", tmp_path, "-p", tmp_path), ("--case-timeout", "9"), "`--case-timeout` is gone"),
        ("infer", ("-i", tmp_path, "-p", tmp_path), ("--device", "cuda:all"), "run one `infer --device cuda:N` per GPU"),
        ("infer", ("-i", tmp_path, "-p", tmp_path), ("--device", "cuda:0,1"), "run one `infer --device cuda:N` per GPU"),
        ("evaluate", (tmp_path, tmp_path), ("--dask", "tcp://a:1"), "only infer takes it"),
        ("train-crf", (tmp_path,), ("--workers", "2"), "`--workers` is gone"),
    ):
        result = run_here(name, *inputs, "-o", tmp_path / "out", *option, status=2)
        assert reason in " ".join(result.stderr.split())
