"""No command replaces one of its inputs: not by its own name, nor through a symbolic link, nor by a
hard link.
"""

import json
import socket
from functools import partial

import pytest
from cli_helpers import infer, run_here, write_folders
from evaluation_helpers import write_study
from training_helpers import phantom

from crfrefine.demo.phantom import write_phantom


def contents(root):
    """The bytes of all files that are no links, by their paths."""
    return {
        path: path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def refused(root, run, name, target, how="symbolic link"):
    """Run a command whose output leads to an input: it says so, and no input changes."""
    name.parent.mkdir(parents=True, exist_ok=True)
    if how == "through a folder":
        folder = name.parent / "folder"
        folder.symlink_to(target.parent)
        target = folder / target.name
    (name.hardlink_to if how == "hard link" else name.symlink_to)(target)
    before = contents(root)
    result = run()
    assert result.status == 1
    assert f"{name}: would replace an input" in result.stderr
    assert contents(root).items() >= before.items()
    name.unlink()


@pytest.fixture
def folders(tmp_path):
    folders = write_folders(tmp_path, "a", "b")
    (folders.logits / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "x": 1, "y": 2, "z": 3}})
    )
    return folders


def test_infer(folders, tmp_path):
    image = folders.images / "b_0000.nii.gz"
    logits = folders.logits / "b.nii.gz"
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
        for how in (
            ("hard link", "symbolic link", "through a folder")
            if options == ()
            else ("symbolic link",)
        ):
            refused(tmp_path, partial(infer, folders, *options), folders.output / name, target, how)
    infer(folders, status=0)
    recorded = next((folders.output / ".crfrefine").iterdir())
    recorded.unlink()
    refused(tmp_path, partial(infer, folders), recorded, described)


def test_files_that_describe_cases_are_inputs(folders, tmp_path):
    """Also those that a run with these options does not need, and those beside the folder of the
    cases.
    """
    beside = tmp_path / "dataset.json"
    ignored = folders.logits / "without_image.nii.gz"
    ignored.write_bytes((folders.logits / "a.nii.gz").read_bytes())
    own = tmp_path / "own.toml"
    own.write_text("[mean_field]\nnum_iterations = 2\n")
    described = folders.logits / "dataset.json"
    regions = ["--regions", "x=1", "--regions", "y=2", "--regions", "z=3"]
    of_logits = ("--input-type", "logits", *regions)
    for target, options in (
        (described, ()),
        (described, of_logits),
        (described, ("--continue",)),
        (own, ("-c", own)),
        (ignored, ()),
    ):
        before = contents(tmp_path)
        assert (
            f"{target}: would replace an input"
            in infer(folders, "--summary", target, *options, status=1).stderr
        )
        assert contents(tmp_path) == before
    described.rename(beside)
    result = run_here("infer", *folders.arguments, "--preview", "--summary", beside, status=1)
    assert f"{beside}: would replace an input" in result.stderr


def test_evaluate(tmp_path):
    study = write_study(tmp_path, 2)
    run = partial(run_here, *study.with_report)
    refused(tmp_path, run, study.output / "metrics.csv", study.labels / "case1.nii.gz")
    refused(
        tmp_path, run, study.output / "summary.json", study.before / "case0.nii.gz", "hard link"
    )
    refused(tmp_path, run, study.output / "report.html", study.labels / "case0.nii.gz")


def test_train_crf(tmp_path):
    """Both ways of it, and before anything is computed."""
    for seed in range(2):
        write_phantom(phantom(seed), tmp_path, f"case{seed}")
    label = tmp_path / "labels" / "case1.nii.gz"
    logits = tmp_path / "logits" / "case0.nii.gz"
    output = tmp_path / "out"
    run = partial(run_here, "train-crf", tmp_path, "-o", output / "params.toml")
    for name, target in (("params.toml", label), ("params.fold2.json", logits)):
        refused(tmp_path, run, output / name, target, "hard link")
    refused(tmp_path, partial(run, "--unlabeled"), output / "params.report.json", logits)


def test_convert(folders, tmp_path):
    logits = folders.logits / "a.nii.gz"
    image = folders.images / "a_0000.nii.gz"
    run = partial(run_here, "convert", logits, tmp_path / "out" / "out.mhd", "--like", image)
    refused(tmp_path, run, tmp_path / "out" / "out.mhd", logits)
    refused(tmp_path, run, tmp_path / "out" / "out.zraw", image, "hard link")


def test_tune_does_not_save_over_the_parameters_that_it_began_with(folders, tmp_path):
    pytest.importorskip("uvicorn")
    own = tmp_path / "own.toml"
    own.write_text("[mean_field]\nnum_iterations = 2\n")
    link = tmp_path / "link.toml"
    with socket.create_server(
        ("127.0.0.1", 0)
    ) as taken:  # A page would wait for ever; here it ends in an error.
        end = ("--no-browser", "--port", taken.getsockname()[1])
        for target, options in ((own, ("-c", own)), (folders.logits / "b.nii.gz", ())):
            refused(
                tmp_path,
                partial(run_here, "tune", *folders.arguments[:4], "-o", link, *options, *end),
                link,
                target,
            )


def test_outputs_of_earlier_runs_are_no_inputs(folders, tmp_path):
    """They are replaced in the same folder, also through links, and another run may read them."""
    kept = tmp_path / "elsewhere" / "a.nii.gz"
    for folder in (kept.parent, folders.output):
        folder.mkdir()
    (folders.output / "a.nii.gz").symlink_to(kept)
    for options in (
        ("--summary", folders.output / "s.json"),
        ("--continue", "--summary", folders.output / "s.json"),
        (),
    ):
        infer(folders, *options, status=0)
    again = folders.output.with_name("again")
    run_here(
        "infer",
        "-i",
        folders.images,
        "-p",
        folders.output,
        "-o",
        again,
        "--input-type",
        "labels",
        status=0,
    )
    infer(folders, status=0)
    assert kept.is_file()
    assert (folders.output / "a.nii.gz").is_symlink()
