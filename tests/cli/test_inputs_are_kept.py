"""No command replaces one of its inputs: not by its own name, nor through a symbolic link, nor by a hard link."""

import json
import os
import socket
from functools import partial

import pytest
from cli_helpers import infer, run_here, write_folders
from evaluation_helpers import write_study
from training_helpers import phantom

from crfrefine.apps.demo.phantom import write_phantom


def contents(root):
    """The bytes of all files that are no links, by their paths."""
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and not path.is_symlink()}


def lead(name, target, how):
    """Make a name lead to a file."""
    name.parent.mkdir(parents=True, exist_ok=True)
    if how == "hard link":
        os.link(target, name)
    elif how == "symbolic link":
        name.symlink_to(target)
    else:
        folder = name.parent / "folder"
        folder.unlink(missing_ok=True)
        folder.symlink_to(target.parent)
        name.symlink_to(folder / target.name)


HOW = ("symbolic link", "hard link", "through a folder")


def refused(root, run, name, target, how):
    """Run a command whose output leads to an input: it says so, and no file of the inputs changes."""
    lead(name, target, how)
    before = contents(root)
    result = run()
    assert result.status == 1
    assert f"{name}: would replace an input" in result.stderr
    assert contents(root).items() >= before.items()
    name.unlink()


@pytest.fixture
def folders(tmp_path):
    folders = write_folders(tmp_path, "a", "b")
    (folders.logits / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "x": 1, "y": 2, "z": 3}}))
    return folders


@pytest.mark.parametrize("how", HOW)
def test_infer(folders, tmp_path, how):
    image, logits = folders.images / "b_0000.nii.gz", folders.logits / "b.nii.gz"
    described = folders.logits / "dataset.json"
    for name, target, options in (
        ("a.nii.gz", image, ()),
        ("a.nii.gz", logits, ("--num-parts", 2, "--part-id", 0)),  # an input of the other part
        ("a_probabilities.nii.gz", logits, ("--save-probabilities",)),
        ("a_logits.nii.gz", logits, ("--save-logits",)),
        ("a_preview.png", described, ("--preview",)),
        ("a/x.nii.gz", logits, ("--save-structures",)),
        ("summary.json", described, ("--summary", folders.output / "summary.json")),
    ):
        refused(tmp_path, partial(infer, folders, *options), folders.output / name, target, how)
    recorded = infer(folders, status=0) and next((folders.output / ".crfrefine").iterdir())
    recorded.unlink()
    refused(tmp_path, partial(infer, folders), recorded, described, how)


def test_files_that_describe_cases_are_inputs(folders, tmp_path):
    """Also those that a run with these options does not need, and those beside the folder of the cases."""
    beside = tmp_path / "dataset.json"
    ignored = folders.logits / "without_image.nii.gz"
    ignored.write_bytes((folders.logits / "a.nii.gz").read_bytes())
    own = tmp_path / "own.toml"
    own.write_text("[mean_field]\nnum_iterations = 2\n")
    described = folders.logits / "dataset.json"
    for options in (
        ("--summary", described),
        ("--summary", described, "--input-type", "logits", "--regions", "x=1", "--regions", "y=2", "--regions", "z=3"),
        ("--summary", described, "--continue"),
        ("--summary", own, "-c", own),
        ("--summary", ignored.with_name("link.json")),
    ):
        if options[1].name == "link.json":
            options[1].symlink_to(ignored)
        before = contents(tmp_path)
        assert f"{options[1]}: would replace an input" in infer(folders, *options, status=1).stderr
        assert contents(tmp_path) == before
    described.rename(beside)
    result = run_here("infer", *folders.arguments, "--preview", "--summary", beside, status=1)
    assert f"{beside}: would replace an input" in result.stderr


@pytest.mark.parametrize("how", HOW)
def test_evaluate(tmp_path, how):
    study = write_study(tmp_path, 2)
    reference, baseline = study.labels / "case1.nii.gz", tmp_path / "before" / "case0.nii.gz"
    for name, target in (
        ("metrics.csv", reference),
        ("summary.json", baseline),
        ("report.html", study.labels / "case0.nii.gz"),
    ):
        refused(
            tmp_path,
            partial(run_here, *(word for word in study.arguments if word != "--no-report")),
            study.output / name,
            target,
            how,
        )


@pytest.mark.parametrize("how", HOW)
def test_train_crf(tmp_path, how):
    """Both ways of it, and before anything is computed."""
    for seed in range(2):
        write_phantom(phantom(seed), tmp_path, f"case{seed}")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "shell": 1, "core": 2, "cyst": 3}}))
    label, logits = tmp_path / "labels" / "case1.nii.gz", tmp_path / "logits" / "case0.nii.gz"
    output = tmp_path / "out" / "params.toml"
    for options in ((), ("--unlabeled",)):
        for name, target in (
            ("params.toml", label),
            ("params.report.json", tmp_path / "dataset.json"),
            *([("params.fold2.json", logits)] if not options else []),
        ):
            refused(
                tmp_path,
                lambda options=options: run_here("train-crf", *options, tmp_path, "-o", output),
                output.with_name(name),
                target,
                how,
            )


@pytest.mark.parametrize("how", HOW)
def test_convert(folders, tmp_path, how):
    logits, image = folders.logits / "a.nii.gz", folders.images / "a_0000.nii.gz"
    for name, target in (("out.mhd", logits), ("out.zraw", image), ("out.nii.gz", folders.logits / "dataset.json")):
        written = tmp_path / "out" / ("out.mhd" if name == "out.zraw" else name)
        refused(
            tmp_path, lambda written=written: run_here("convert", logits, written, "--like", image), tmp_path / "out" / name, target, how
        )


def test_tune_does_not_save_over_the_parameters_that_it_began_with(folders, tmp_path):
    pytest.importorskip("uvicorn")
    own = tmp_path / "own.toml"
    own.write_text("[mean_field]\nnum_iterations = 2\n")
    link = tmp_path / "link.toml"
    with socket.create_server(("127.0.0.1", 0)) as taken:  # A page would wait for ever; here it ends in an error.
        end = ("--no-browser", "--port", taken.getsockname()[1])
        for target, options in ((own, ("-c", own)), (folders.logits / "b.nii.gz", ())):
            run = partial(run_here, "tune", *folders.arguments[:4], "-o", link, *options, *end)
            refused(tmp_path, run, link, target, "symbolic link")


def test_outputs_of_earlier_runs_are_no_inputs(folders, tmp_path):
    """They are replaced in the same folder, also through links, and another run may read them."""
    kept = tmp_path / "elsewhere" / "a.nii.gz"
    kept.parent.mkdir()
    lead(folders.output / "a.nii.gz", kept, "symbolic link")
    for options in (("--summary", folders.output / "s.json"), ("--continue", "--summary", folders.output / "s.json"), ()):
        infer(folders, *options, status=0)
    again = folders.output.with_name("again")
    run_here("infer", "-i", folders.images, "-p", folders.output, "-o", again, "--input-type", "labels", status=0)
    infer(folders, status=0)
    assert kept.is_file()
    assert (folders.output / "a.nii.gz").is_symlink()
