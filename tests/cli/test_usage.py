"""Help, version, wrong usage, and what the command does not import."""

import os
import re
import subprocess
import sys

import pytest
import typer.main
from cli_helpers import command, files_in, run_here, run_process, write_folders

import crfrefine
from crfrefine.cli.help_panels import PANELS
from crfrefine.cli.main import app


def test_help_lists_the_commands():
    result = run_process("--help")
    assert result.status == 0
    assert all(name in result.stdout for name in ("infer", "convert", "info", "demo"))
    assert "Traceback" not in result.stderr


def test_the_command_alone_shows_its_help():
    result = run_here()
    assert result.status == 2
    assert "\\n" not in result.stderr
    assert "\nCommands:\n" in result.stderr


def test_help_describes_each_command_to_the_end_of_the_sentence(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = run_here("--help").stdout.partition("Commands:\n")[2].splitlines()
    assert len(lines) == 11
    assert all(line.endswith(".") and not line.endswith("...") for line in lines), lines


def test_help_of_infer_has_every_option_of_the_interface():
    text = run_here("infer", "--help").stdout
    for option in (
        *("-i", "--images", "-p", "--logits", "-o", "--output", "-m", "--masks", "-c", "--config", "--set", "--input-type"),
        *("--device", "--threads", "--save-probabilities", "--save-logits", "--preview", "--continue", "--num-parts", "--part-id"),
        *("--fail-fast", "--summary", "--manifest", "-v", "-q"),
    ):
        assert option in text


@pytest.mark.parametrize("name", ["infer", "train-crf", "evaluate", "tune", "bids"])
def test_help_has_panels_and_every_option_in_one(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = run_here(name, "--help").stdout
    panels = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    order = ["Arguments", *PANELS]
    assert panels == sorted(set(panels), key=order.index)
    assert {"Input", "Output", "Model", "Resources", "Messages"} - ({"Model"} if name == "evaluate" else set()) <= set(panels)
    assert "More options" not in panels, "name the new option in cli/help_panels.py"
    shown = re.findall(r"^  .*?(--[a-z-]+)", text, re.MULTILINE)
    options = [parameter for parameter in typer.main.get_command(app).commands[name].params if parameter.param_type_name == "option"]
    assert {max(option.opts, key=len) for option in options} <= set(shown)


def test_help_of_infer_begins_with_what_is_needed():
    text = run_here("infer", "--help").stdout
    places = [text.index(f"\n  {option}") for option in ("-i, --images", "-p, --logits", "-o, --output", "-c, --config", "--fail-fast")]
    assert places == sorted(places)
    assert text.index("Rarely needed:") < places[-1]


def test_version():
    assert run_here("--version").stdout == f"crfrefine {crfrefine.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["refine"], id="unknown command"),
        pytest.param(["infer"], id="nothing given"),
        pytest.param(["infer", "--frobnicate"], id="unknown option"),
        pytest.param(["infer", "{case}", "--input-type", "votes"], id="unknown input type"),
        pytest.param(["infer", "{case}", "--threads", "0"], id="no threads"),
        pytest.param(["infer", "{case}", "--threads", "-2"], id="negative threads"),
        pytest.param(["infer", "{case}", "--threads", "1025"], id="too many threads"),
        pytest.param(["demo", "--threads", "1025"], id="too many threads for the demo"),
        pytest.param(["infer", "{case}", "--threads", "many"], id="threads not a number"),
        pytest.param(["infer", "{case}", "--num-parts", "0", "--part-id", "0"], id="no parts"),
        pytest.param(["infer", "{case}", "--num-parts", "2"], id="part not named"),
        pytest.param(["infer", "{case}", "--num-parts", "2", "--part-id", "2"], id="part counted from 1"),
        pytest.param(["infer", "{case}", "--part-id", "-1"], id="negative part"),
        pytest.param(["infer", "{case}", "-v", "-q"], id="verbose and quiet"),
        pytest.param(["convert", "only_one.nii.gz"], id="convert without a target"),
        pytest.param(["convert", "a.nii.gz", "b.nii.gz", "--to", "colors"], id="unknown kind"),
        pytest.param(["info"], id="info of nothing"),
        pytest.param(["demo", "--seed", "-3"], id="negative seed"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, tmp_path):
    folders = write_folders(tmp_path, "a")
    filled = [part for argument in arguments for part in (folders.arguments if argument == "{case}" else [argument])]
    result = run_here(*filled)
    assert result.status == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Usage:")
    assert result.stderr.splitlines()[-1].startswith("crfrefine: error: "), "as all other errors"
    assert not folders.output.exists()


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        (["--help"], {"numpy", "rich", "nibabel", "SimpleITK", "scipy", "matplotlib", "pydantic"}),
        (["info", "{image}"], {"rich", "SimpleITK", "scipy.ndimage", "matplotlib", "pydantic", "pydicom", "crfrefine.parameters.model"}),
        (["infer", "{case}"], {"torch", "cupy", "SimpleITK", "matplotlib", "pydicom"}),
        (["doctor"], {"torch", "cupy", "SimpleITK", "matplotlib", "monai", "rich"}),
    ],
    ids=["help", "info", "infer", "doctor"],
)
def test_start_up_imports_no_more_than_it_needs(arguments, unwanted, tmp_path):
    """Each of these takes from 40 ms to a second to import, and a loop over cases starts the command once for each."""
    folders = write_folders(tmp_path, "a")
    fill = {"{case}": folders.arguments, "{image}": [folders.images / "a_0000.nii.gz"]}
    filled = [part for argument in arguments for part in fill.get(argument, [argument])]
    line = "import sys, atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "
    line += "import runpy; runpy.run_module('crfrefine', run_name='__main__', alter_sys=True)"
    done = subprocess.run([sys.executable, "-c", line, *map(str, filled)], capture_output=True, text=True, timeout=120, check=True)
    assert not unwanted & set(done.stderr.splitlines()[-1].split())


def test_a_closed_pipe_is_no_traceback(tmp_path):
    """As in `crfrefine info FOLDER | head -1`."""
    folders = write_folders(tmp_path, *(f"case_{number:03d}" for number in range(40)))
    with subprocess.Popen(
        command("info", *sorted(folders.images.iterdir()) * 40), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        process.stderr.close()
        process.wait(timeout=60)


@pytest.mark.parametrize(
    "arguments",
    [
        *(["infer", "{case}", option, ""] for option in ("-i", "-p", "-o", "-m", "-c", "--summary")),
        *(["info", ""], ["info", "{image}", ""], ["convert", "", "b.nii.gz"], ["convert", "a.nii.gz", ""], ["demo", "-o", ""]),
        ["convert", "a.nii.gz", "b.nii.gz", "--like", ""],
    ],
    ids=" ".join,
)
def test_an_empty_path_is_wrong_usage_and_not_the_current_folder(arguments, tmp_path, monkeypatch):
    folders = write_folders(tmp_path, "a")
    monkeypatch.chdir(tmp_path)
    before = files_in(tmp_path)
    fill = {"{case}": folders.arguments, "{image}": [folders.images / "a_0000.nii.gz"]}
    result = run_here(*(part for argument in arguments for part in fill.get(argument, [argument])))
    assert result.status == 2
    assert "the path is empty" in result.stderr
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(("encoding", "sign"), [("utf-8", "×"), ("cp1252", "×"), ("ascii", "x")])
def test_signs_that_a_terminal_lacks_are_spelled(encoding, sign, tmp_path):
    """Windows' code page has × and no →, and neither has a name in Greek."""
    folders = write_folders(tmp_path, "a")
    image = (folders.images / "a_0000.nii.gz").rename(tmp_path / "σ.nii.gz")
    done = subprocess.run(
        command("info", image), env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, timeout=60, check=True
    )
    shown = done.stdout.decode(encoding)
    assert re.search(rf"[0-9]{sign}[0-9]", shown)
    assert ("σ" if encoding == "utf-8" else "\\u03c3") in shown


def test_an_arrow_is_spelled_too():
    code = "from crfrefine.cli.terminal_text import spell_what_terminals_lack as spell; spell(); print('a → b ≤ σ…σ→')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=60, check=True
    )
    assert done.stdout.decode() == "a -> b <= \\u03c3...\\u03c3->" + os.linesep


def test_one_word_for_one_thing_in_all_commands(tmp_path):
    folders = write_folders(tmp_path, "a")
    for _ in range(2):
        result = run_here("infer", *folders.arguments, "--resume")
        assert result.status == 0
    assert result.stdout.splitlines()[1].startswith("a\tskipped")
    labels = folders.output
    for options in (("--threads", "1"), ("--processes", "1", "--resume"), ("--threads", "1", "--continue")):
        result = run_here("evaluate", folders.output, labels, "-o", tmp_path / "report", "--no-report", *options)
        assert result.status == 0, result.stderr
    for name in ("--resume", "--continue"):
        result = run_here("train-crf", name, "-o", tmp_path / "p.toml")
        assert "name the folder of the data" in " ".join(result.stderr.split()), "the option itself is known"
