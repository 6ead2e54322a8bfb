"""Help, version, wrong usage, and what the command does not import."""

import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import typer
from cli_helpers import (
    GRID_SHAPE,
    errors,
    files_in,
    infer,
    load_nifti,
    run_here,
    run_process,
    save_nifti,
    statuses,
    write_folders,
)
from evaluation_helpers import label_map, read_metrics, save_map, write_study

from crfrefine.base.option import PANELS
from crfrefine.cli.failures import GONE, GONE_FROM
from crfrefine.cli.main import COMMANDS, app
from crfrefine.evaluate.contents import metrics_csv
from crfrefine.statistics.comparison import Measurement, ResultTable


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_panels_and_every_option_in_one_and_nothing_is_cut(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = run_here(name, "--help").stdout
    panels = re.findall(r"^╭─ (\w.*?) ─", text, re.MULTILINE)
    assert panels == sorted(set(panels), key=PANELS.index)
    assert "…" not in text, "a word is too long for its column"
    assert max(map(len, text.splitlines())) <= 80
    shown = re.findall(r"^│ [*]? *(--[a-z-]+)", text, re.MULTILINE)
    group = typer.main.get_command(app)
    options = [
        parameter
        for parameter in group.get_command(None, name).params
        if parameter.param_type_name == "option"
    ]
    for option in options:
        assert any(option_name in shown for option_name in option.opts), option.name


def test_help_says_what_is_required_and_without_what(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    text = " ".join(run_here("infer", "--help", status=0).stdout.split())
    assert text.count("[required without --nnunet or --manifest]") == 2, "-i and -p"
    assert text.count("[required]") == 1, "-o"
    assert "required" not in run_here("info", "--help", status=0).stdout


def test_a_bare_resample_is_linear(tmp_path):
    folders = write_folders(tmp_path, "a")
    for options in (["--resample"], ["--resample", "cubic"], []):
        summary = tmp_path / "s.json"
        infer(folders, *options, "--summary", summary, status=0)
        expected = {0: None, 1: "linear", 2: "cubic"}[len(options)]
        assert json.loads(summary.read_text())["resample"] == expected
    # What follows it is another argument.
    assert "such as -o params.toml" in run_here("train-crf", "--resample", "data", status=2).stderr


def test_completion_is_installed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for shell, start, script in (
        ("bash", ".bashrc", ".bash_completions/crfrefine.sh"),
        ("zsh", ".zshrc", ".zfunc/_crfrefine"),
        ("fish", None, ".config/fish/completions/crfrefine.fish"),
    ):
        if start is not None:
            (tmp_path / start).write_text("alias ll='ls -l'\n", encoding="utf-8")
        for _ in range(2):
            run_here("--install-completion", shell, status=0)
        assert "_CRFREFINE_COMPLETE" in (tmp_path / script).read_text(encoding="utf-8")
        if start is not None:
            alias, *lines = (tmp_path / start).read_text(encoding="utf-8").splitlines()
            assert alias == "alias ll='ls -l'"
            assert sum(".zfunc" in line or script in line for line in lines) == 1
    assert "'tcsh'" in run_here("--install-completion", "tcsh", status=2).stderr
    assert "#compdef crfrefine" in run_here("--show-completion", "zsh", status=0).stdout


def test_a_bare_option_for_completion_takes_the_shell_that_runs_the_command(tmp_path):
    program = f"{shlex.quote(sys.executable)} -m crfrefine --show-completion; true"
    options = {"capture_output": True, "text": True, "timeout": 120, "check": True}
    done = subprocess.run(["bash", "--norc", "-c", program], **options)
    assert "complete -o default -F _crfrefine_completion crfrefine" in done.stdout


WRONG = (
    *(
        "refine",
        "infer",
        "infer --frobnicate",
        "status",
        "convert only_one.nii.gz",
        "convert a.nii.gz b.nii.gz --to colors",
        "demo --seed -3",
    ),
    *("info ''", "convert a.nii.gz ''"),
    *(f"infer {{case}} {option} ''" for option in ("-i", "-p", "-o", "-m", "-c", "--summary")),
    *(
        "infer {case} --input-type votes",
        "infer {case} --threads 1025",
        "infer {case} --threads many",
        "infer {case} --max-memory 8X",
    ),
    *("infer {case} --num-parts 2", "infer {case} --num-parts 2 --part-id 2", "infer {case} -v -q"),
)


def test_an_option_at_the_end_without_its_value_is_wrong_usage():
    for option in ("-i", "-o", "--set", "--threads"):
        message = f"crfrefine: error: Option '{option}' requires an argument.\n"
        assert run_here("infer", "-p", "logits", option) == (2, "", message)


def test_wrong_usage_exits_with_2(tmp_path, monkeypatch):
    """An empty path is not the current folder."""
    folders = write_folders(tmp_path, "a")
    monkeypatch.chdir(tmp_path)
    before = files_in(tmp_path)
    for line in WRONG:
        result = run_here(*shlex.split(line.format(case=shlex.join(map(str, folders.arguments)))))
        assert (result.status, result.stdout) == (2, ""), line
        assert result.stderr.startswith("Usage:")
        assert result.stderr.splitlines()[-1].startswith("crfrefine: error: "), (
            "as all other errors"
        )
        assert ("the value is empty" in result.stderr) == ("''" in line)
    assert files_in(tmp_path) == before


def test_a_command_or_option_that_is_gone_says_what_does_its_job():
    for name, instead in GONE.items():
        command = GONE_FROM.get(name, "evaluate")
        words = (command, name) if name.startswith("--") else (name,)
        assert instead in run_here(*words, status=2).stderr.splitlines()[-1]
    assert GONE["--workers"] in run_here("infer", "--workers=3", status=2).stderr
    for command in ("convert", "tune", "info", "demo", "status"):
        for name in GONE_FROM:
            said = run_here(command, name, status=2).stderr
            assert f"\ncrfrefine: error: No such option: {name}" in said
    for device in ("cuda:all", "cuda:0,1"):
        assert (
            f"got '{device}'"
            in run_here(
                "infer", "-i", "a", "-p", "b", "-o", "c", "--device", device, status=1
            ).stderr
        )


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        ("--help", "numpy nibabel SimpleITK scipy matplotlib torch cupy"),
        # Presets with a volume term need scipy.ndimage.
        (
            "infer {case} --set mean_field.filter=lattice",
            "torch cupy SimpleITK matplotlib pydicom scipy.ndimage",
        ),
        (
            "info {image}",
            "rich SimpleITK scipy.ndimage matplotlib pydicom crfrefine.parameters.model",
        ),
    ],
)
def test_start_up_imports_no_more_than_it_needs(arguments, unwanted, tmp_path):
    """Each of these takes from 40 ms to a second to import, and a loop over cases starts the
    command once for each.
    """
    folders = write_folders(tmp_path, "a")
    words = arguments.format(
        case=shlex.join(map(str, folders.arguments)), image=folders.images / "a_0000.nii.gz"
    ).split()
    assert not set(unwanted.split()) & imported_by(*words, status=0)


def imported_by(*words, status):
    """The modules that a command has imported when it ends."""
    line = (
        "import sys, atexit, runpy; "
        "atexit.register(lambda: print(*filter(sys.modules.get, sys.modules), file=sys.stderr)); "
    )
    line += "runpy.run_module('crfrefine', run_name='__main__', alter_sys=True)"
    done = subprocess.run(
        [sys.executable, "-c", line, *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == status, done.stderr
    return set(done.stderr.splitlines()[-1].split())


def test_the_collector_of_garbage_works_as_usual_after_its_first_look():
    code = """
import gc
usual = gc.get_threshold()
import crfrefine.cli.main
assert gc.get_threshold() > usual, "its looks cost a twentieth of a short run"
gc.collect()
assert gc.get_threshold() == usual
assert not gc.callbacks, "an interrupt that comes while they are called is lost"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_errors_of_usage_import_no_numpy(command, tmp_path):
    """A third of a second, where the answer depends on the options alone."""
    heavy = {"numpy", "scipy", "nibabel", "torch"}
    assert not heavy & imported_by(command, "--help", status=0)  # The help is rich's.
    heavy.add("rich")
    folder = str(tmp_path)  # of no images: the look for DICOM comes after the usage
    assert not heavy & imported_by(command, "--unknown", "-i", folder, status=2)


@pytest.mark.parametrize(
    "options", ["--threads x", "--num-parts 2", "--input-type x", "--jobs 0", "--map a"]
)
def test_a_wrong_value_is_refused_without_numpy(options):
    words = ["infer", "-i", "a.nii", "-p", "b.nii", "-o", "c", *options.split()]
    assert "numpy" not in imported_by(*words, status=2)


def test_signs_that_a_terminal_lacks_are_escaped(tmp_path):
    image = (write_folders(tmp_path, "a").images / "a_0000.nii.gz").rename(tmp_path / "σ.nii.gz")
    done = run_process("info", image, env={**os.environ, "PYTHONIOENCODING": "ascii"}, status=0)
    assert "\\u03c3" in done.stdout


# ---- Completion, by the script that `--show-completion` prints, in bash itself


def test_bash_completes(tmp_path):
    program = tmp_path / "crfrefine"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m crfrefine "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    words = {"crfrefine infer --input-type l": ["labels", "logits"], "crfrefine info doc": []}
    words |= {
        "crfrefine --version in": ["infer", "info"],
        "crfrefine infer -c body-c": ["body-ct"],
        "crfrefine infer -c li": ["lines.toml"],
        "crfrefine tune -c ./li": [],
        "crfrefine infer --set volume.": ["volume.match_input=", "volume.weight="],
        "crfrefine train-crf --learn weights,te": ["weights,temperature"],
    }
    (tmp_path / "lines.toml").touch()
    script = """
        eval "$(crfrefine --show-completion bash)"
        while read -r line; do
          COMP_WORDS=($line); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
          COMPREPLY=(); _crfrefine_completion crfrefine 2>/dev/null; echo "${COMPREPLY[@]}"
        done
        complete -p crfrefine"""
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    options = {
        "input": "\n".join([*words, ""]),
        "env": environment,
        "capture_output": True,
        "text": True,
        "timeout": 120,
    }
    run = subprocess.run(["bash", "--norc", "-c", script], check=True, cwd=tmp_path, **options)
    *offered, rule = run.stdout.splitlines()
    assert [sorted(line.split()) for line in offered] == list(words.values())
    assert "-o default" in rule, "the shell completes names of files"


CASES = ("c0", "c1", "c2")


def test_one_cause_is_told_once_and_the_other_cases_named(folders):
    """By the message without names and numbers; another cause is told apart."""
    first, *others = (folders.logits / f"{case_id}.nii.gz" for case_id in CASES)
    first.write_bytes(b"")
    for number, path in enumerate(others):
        save_nifti(path, load_nifti(path)[: -2 - number])
    result = infer(folders, "-q", status=1)
    other, first, second = errors(result.stderr)
    assert "case 'c0': " in other
    assert first == "crfrefine: error: case 'c1': logits and image are on different grids"
    assert second == "crfrefine: error: 1 more case failed like 'c1': c2"
    assert result.stderr.count("--resample") == 1
    assert len(errors(infer(folders, "-v").stderr)) == 3, "verbose tells each"


def test_exchanged_inputs_are_named(folders, tmp_path):
    """Numbered images; archives, which are no images at all; files of one name."""
    save_nifti(
        tmp_path / "c0.nii.gz",
        (load_nifti(folders.images / "c0_0000.nii.gz") * 0.37).astype(np.float32),
    )
    np.savez(tmp_path / "c0.npz", logits=load_nifti(folders.logits / "c0.nii.gz").transpose())
    for images, logits in (
        (folders.logits, folders.images),
        (tmp_path / "c0.npz", folders.images / "c0_0000.nii.gz"),
        (folders.logits / "c0.nii.gz", tmp_path / "c0.nii.gz"),
    ):
        output = folders.output if images.is_dir() else tmp_path / "out.nii.gz"
        assert (
            "-i and -p seem to be exchanged"
            in run_here("infer", "-i", images, "-p", logits, "-o", output, status=1).stderr
        )


def test_the_layout_of_totalsegmentators_data_sets_is_found(tmp_path):
    data = tmp_path / "data"
    for seed, case_id in enumerate(("s0001", "s0002")):
        save_nifti(
            data / case_id / "ct.nii.gz",
            np.random.default_rng(seed).normal(0, 90, GRID_SHAPE).astype(np.int16),
        )
        for number, name in enumerate(("aorta", "liver", "spleen")):
            mask = np.zeros(GRID_SHAPE, np.uint8)
            mask[4 * number : 4 * number + 3, 3:11, 2:9] = 1
            save_nifti(data / case_id / "segmentations" / f"{name}.nii.gz", mask)
    (data / "meta.csv").write_text("image_id;age\n")
    arguments = (
        "infer",
        "-i",
        data,
        "-p",
        data,
        "-o",
        tmp_path / "out",
        "--set",
        "bilateral.weight=0",
    )
    (error,) = errors(run_here(*arguments, status=1).stderr)
    assert "--input-type labels" in error
    result = run_here(*arguments, "--input-type", "labels", status=0)
    assert "such as s0001/ct.nii.gz" in result.stderr
    assert load_nifti(tmp_path / "out" / "s0002.nii.gz").max() == 3
    judged = run_here(
        "evaluate",
        tmp_path / "out",
        data,
        "-o",
        tmp_path / "report",
        "--processes",
        1,
        "--no-report",
        "-i",
        data,
        status=0,
    )
    assert "liver" in judged.stdout
    shown = run_here("info", data).stdout
    assert "s0001  3 structures" in shown
    assert f"-p {data} and -i {data} and --input-type labels" in shown


def test_many_files_after_one_option_are_told_to_be_a_folder(folders):
    """As the shell makes of `-i images/*.nii.gz`; or as files of several cases with the option
    each.
    """
    first, second, third = (folders.images / f"{case}_0000.nii.gz" for case in CASES)
    result = run_here(
        "infer", "-i", first, second, third, "-p", folders.logits, "-o", folders.output, status=2
    )
    assert (
        "An option takes one path: give the folder of many cases, or repeat the option for the "
        "files of one case." in result.stderr
    )
    result = run_here(
        "infer", "-i", first, "-i", second, "-p", folders.logits, "-o", folders.output, status=1
    )
    assert errors(result.stderr) == [
        f"crfrefine: error: {first}: files of 2 cases, c0, c1; give the folder of the images"
    ]


def test_evaluate_is_over_the_cases_that_every_method_has(tmp_path):
    """Of six cases, case 1 lacks its prediction, case 2 its baseline, case 3 its reference."""
    study = write_study(tmp_path, 6)
    for path in (
        study.after / "case1.nii.gz",
        study.before / "case2.nii.gz",
        study.labels / "case3.nii.gz",
    ):
        path.unlink()
    whats = (("prediction", study.after), ("prediction", study.before), ("label map", study.labels))
    reasons = {
        f"case{number}": f"no {what} in {folder}" for number, (what, folder) in enumerate(whats, 1)
    }
    result = run_here(*study.arguments, "--strict", status=1)
    assert (
        "crfrefine: error: 3 of 6 cases are incomplete, which --strict refuses:\n" in result.stderr
    )
    assert not study.output.exists()
    (study.after / "case4.nii.gz").write_bytes(b"not an image")
    result = run_here(*study.with_report, status=1)
    assert result.stderr.splitlines()[-1] == "failed: case4 (1 of 3 cases)"
    said = "3 of 6 cases are left out: " + "; ".join(
        f"{reason} (1): {case}" for case, reason in reasons.items()
    )
    assert f"note: {said}\n" in result.stderr
    assert f"<li>{said}" in (study.output / "report.html").read_text()
    assert {case for case, _, _, name in read_metrics(study.output) if name == "prediction"} == {
        "case0",
        "case5",
    }
    summary = study.summary()
    assert summary["left_out"] == [
        {"case": case, "reasons": [reason]} for case, reason in reasons.items()
    ]
    assert (summary["num_cases"], summary["num_failed"], summary["num_left_out"]) == (3, 1, 3)
    assert [failure["case"] for failure in summary["failures"]] == ["case4"]
    comparison = summary["verdict"]["comparison"]
    assert (
        comparison["num_pairs"],
        comparison["num_only_baseline"],
        comparison["num_only_method"],
    ) == (2, 0, 0)


DIGITS = "9" * 5000
LONG = "x" * 100_000
HOSTILE = "a\tb\n\x1b[31mc\u202ed"
SHOWN = r"a\tb\n\x1b[31mc\u202ed"


@pytest.fixture(scope="module")
def one_case(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("absurd"), "a")


def require_short(result, status):
    assert result.status == status, result.stderr[:500]
    assert "Traceback" not in result.stderr
    lines = (result.stderr + result.stdout).split("\n")
    assert max(map(len, lines)) < 800
    assert all(line.replace("\t", "").isprintable() for line in lines)


def test_options(one_case, tmp_path):
    paths = [tmp_path / f"{name}.toml" for name in ("deep", "digits", "name", "large")]
    for path, text in zip(
        paths, (f"a = {'[' * 9000}", f"schema = {DIGITS}", '"a\\tb\\u001b" = 1', ""), strict=True
    ):
        path.write_text(text)
    os.truncate(paths[-1], 1 << 30)
    for options, status, words in (
        (
            ("--set", "mean_field.num_iterations=2147483648"),
            1,
            "must be at least 1 and at most 1000000, got 2147483648",
        ),
        (("--set", f"mean_field.num_iterations={DIGITS}"), 1, "too many digits in a number"),
        (
            ("--set", f"bilateral.weight=0x{'f' * 9000}"),
            1,
            "bilateral.weight: expected a finite number, got a value of type int",
        ),
        (("--set", f"bilateral.weight={'[' * 9000}"), 1, "too many nested lists"),
        (
            ("--set", f"bilateral.{DIGITS}.weight=1"),
            1,
            "expected the number of a kernel from 0 to 0",
        ),
        (("--set", f"{LONG}=1"), 1, "unknown key; known: intensity"),
        (("--set", f"bilateral.weight={LONG}"), 1, "bilateral.weight: expected a number, got 'xxx"),
        (("--set", f"{HOSTILE}=1"), 1, rf"{SHOWN}: unknown key"),
        (("-c", paths[0]), 1, f"error: {paths[0]}: not valid TOML: "),
        (("-c", paths[1]), 1, f"error: {paths[1]}: not valid TOML: too many digits in a number"),
        (("-c", paths[2]), 1, rf"error: {paths[2]}: a\tb\x1b: unknown key"),
        (("-c", paths[3]), 1, f"error: {paths[3]}: too large for a parameter file"),
        (
            ("--device", f"cuda:{DIGITS}"),
            1,
            "expected one of auto, cpu, cuda, cuda:N, torch, torch:cuda, torch:cuda:N; got "
            "'cuda:999",
        ),
        (("--threads", DIGITS), 2, "--threads"),
        (("--num-parts", "2", "--part-id", "2147483648"), 2, "--part-id"),
        (("-c", LONG), 2, "expected a path of at most 4096 characters, without NUL; found 100000"),
        (("-c", "x" * 1000), 1, "cannot be read as a parameter file: File name too long"),
        (("-c", "/dev/zero"), 1, "/dev/zero: is not a regular file"),
        (("-i", "a\0b"), 2, r"a\x00b: expected a path of at most 4096 characters, without NUL"),
        (("--summary", LONG), 2, "expected a path of at most 4096 characters"),
    ):
        result = run_here("infer", *one_case.arguments, *options)
        require_short(result, status)
        assert words in result.stderr
    for arguments in (
        (LONG,),
        (f"--{LONG}",),
        ("info", LONG),
        ("convert", "a\0b", "c.nii"),
        ("evaluate", "a", "b", "-b", f"{LONG}=x"),
    ):
        require_short(run_here(*arguments), 2)


def test_a_name_that_breaks_tables_is_escaped_in_every_output(tmp_path):
    """A file may be called so; its output is written all the same, under its own name."""
    folders = write_folders(tmp_path, "good", HOSTILE, f"{HOSTILE}3")
    (folders.logits / f"{HOSTILE}3.nii.gz").write_bytes(b"no volume")
    result = infer(folders, "-v", "--preview", "--summary", tmp_path / "s.json", status=1)
    assert {line.count("\t") for line in result.stdout.splitlines()} == {5}
    assert statuses(result) == [(SHOWN, "done"), (SHOWN + "3", "failed"), ("good", "done")]
    assert all(line.isprintable() for line in result.stderr.split("\n"))
    assert (folders.output / f"{HOSTILE}.nii.gz").exists()
    assert json.loads((tmp_path / "s.json").read_text())["cases"][0]["case_id"] == HOSTILE
    study = write_study(tmp_path / "study", 1)
    for folder in (study.labels, study.after, study.before):
        save_map(folder / f"{HOSTILE}.nii.gz", label_map(7))
    result = run_here(*study.arguments, "-v", "--name", "\x1b[31mred", "-r", "\x1b[2J=1", status=0)
    assert all(
        line.replace("\t", "").isprintable() for line in (result.stdout + result.stderr).split("\n")
    )
    assert len({len(line.split("\t")) for line in result.stdout.splitlines() if "\t" in line}) == 1
    assert SHOWN in {case for case, *_ in read_metrics(study.output)}
    result = run_here(
        "info", study.labels, study.labels / f"{HOSTILE}.nii.gz", tmp_path / "b\x1b[31m.nii"
    )
    assert all(line.isprintable() for line in (result.stdout + result.stderr).split("\n"))
    assert f"  {SHOWN} " in result.stdout


def test_no_name_is_a_formula_or_an_escape_sequence():
    """Names are those of files: whoever sends a file may choose one, and a spreadsheet computes
    what begins like this.
    """
    for name in ("=1+1", "+a", "-a", "@a", '=HYPERLINK("x")'):
        table = ResultTable(
            [
                Measurement(name, name, "dice", -0.5, name),
                Measurement("a=b, 'c' -1", name, "dice", 0.25, name),
            ]
        )
        _, *rows = csv.reader(io.StringIO(metrics_csv(table), newline=""))
        assert rows == [
            [case, f"'{name}", "dice", value, f"'{name}"]
            for case, value in ((f"'{name}", "-0.5"), ("a=b, 'c' -1", "0.25"))
        ]
    for name in ("\ta", "a\r\n=1", "\x1b[2J\x9b1m\u202e", "\udce9"):
        table = ResultTable([Measurement(name, name, "dice", 0.5, name)])
        shown = name.encode("unicode_escape").decode()
        assert metrics_csv(table).splitlines()[1:] == [f"{shown},{shown},dice,0.5,{shown}"]
