"""Everything that users have been seen to hand in: one clear message, no traceback, nothing
half-written, and the other cases are done.
"""

import gzip
import json
import re
import shlex
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import (
    AFFINE,
    FAST,
    GRID_SHAPE,
    NUM_LABELS,
    command,
    errors,
    files_in,
    infer,
    load_nifti,
    run_here,
    save_nifti,
    statuses,
    write_folders,
)

import crfrefine.infer.case_work
import crfrefine.io.nifti
from crfrefine.io import reading

CASES = ("bad", "good")


def with_value(value, path):
    values = load_nifti(path).astype(np.float32)
    values[5, 6, 7] = value
    save_nifti(path, values)


def all_zero_probabilities(path):
    values = np.full((*GRID_SHAPE, NUM_LABELS), 0.25, np.float32)
    values[3, 4, 5] = (0, 1e-5, 0, 0)
    save_nifti(path, values)


def no_background(path):
    """One-hot channels, in which each label would be taken for the one before."""
    save_nifti(path, np.eye(NUM_LABELS, dtype=np.uint8)[load_nifti(path).argmax(axis=-1)][..., 1:])


def other_place(path):
    affine = AFFINE.copy()
    affine[0, 3] += 3
    save_nifti(path, load_nifti(path), affine)


def turned_archive(path):
    path.unlink()
    np.savez(
        path.with_name(path.name.replace(".nii.gz", ".npz")),
        probabilities=np.full((4, *GRID_SHAPE), 0.25, np.float32),
    )


BAD_LOGITS = {
    "nan": (partial(with_value, np.nan), ["NaN", "(5, 6, 7)"]),
    "shape": (
        lambda path: save_nifti(path, load_nifti(path)[:-2]),
        ["different grids", "shape_0000.nii.gz", "18×15×11", "16×15×11"],
    ),
    "place": (other_place, ["different grids"]),
    "half": (lambda path: path.write_bytes(path.read_bytes()[:9999]), ["half.nii.gz", "cut off"]),
    "few": (
        lambda path: path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:9999])),
        ["few.nii.gz", "cut off"],
    ),
    "missing": (Path.unlink, ["no logits"]),
    "single": (
        lambda path: save_nifti(path, load_nifti(path)[..., :1]),
        ["single.nii.gz", "logits need one value per label"],
    ),
    "blank": (
        lambda path: save_nifti(path, np.zeros_like(load_nifti(path))),
        ["all labels have the same value"],
    ),
    "one_hot": (
        no_background,
        ["voxels have no label. If background has no channel, put one before the others"],
    ),
    "zeros": (
        all_zero_probabilities,
        ["zeros.nii.gz", "do not sum to 1 over the labels at 1 of", "(3, 4, 5)"],
    ),
    "sigmoid": (
        lambda path: save_nifti(
            path, np.random.default_rng(0).random((*GRID_SHAPE, 4), np.float32)
        ),
        ["do not sum to 1"],
    ),
    "turned": (turned_archive, ["turned.npz", "(label, z, y, x)"]),
}
BAD_IMAGES = {
    "infinite": (partial(with_value, -np.inf), ["infinite_0000.nii.gz", "infinite"]),
    "moved": (other_place, ["different grids", "moved_0001.nii.gz"]),
    "empty": (lambda path: path.write_bytes(b""), ["empty_0000.nii.gz", "empty"]),
    "text": (
        lambda path: path.write_bytes(gzip.compress(b"this is no image\n" * 100)),
        ["text_0000.nii.gz", "not a NIfTI file"],
    ),
    "modality": (Path.unlink, ["0000", "found 0001"]),
}


def test_a_bad_case_is_told_and_the_other_one_is_done(tmp_path):
    bad = BAD_LOGITS | BAD_IMAGES
    folders = write_folders(tmp_path, *bad, "good")
    for case_id, (spoil, _) in bad.items():
        spoil(
            folders.logits / f"{case_id}.nii.gz"
            if case_id in BAD_LOGITS
            else folders.images / f"{case_id}_0000.nii.gz"
        )
    result = infer(folders, "--save-probabilities", "--preview", "-v", status=1)
    assert "Traceback" not in result.stderr
    told = {part.split("'")[1]: part for part in result.stderr.split("crfrefine: error: case ")[1:]}
    assert told.keys() == bad.keys()
    for case_id, (_, expected) in bad.items():
        assert all(part in told[case_id] for part in expected), told[case_id]
    assert files_in(folders.output) == [
        "good.nii.gz",
        "good_preview.png",
        "good_probabilities.nii.gz",
    ]
    assert result.stderr.splitlines()[-1] == f"failed: {', '.join(sorted(bad))}"


IMPOSSIBLE = {
    "--set bilateral.theta_gamma=1": "bilateral.theta_gamma",
    "--set bilateral.theta_alpha=0": "bilateral.theta_alpha",
    "--set bilateral.weight": "KEY=VALUE",
    "--set bilateral.weight=3e38": "bilateral.weight",
    "-c no_such_preset": "no_such_preset",
    "-c {root}/broken.toml": "broken.toml",
    "-m no_such_folder": "no_such_folder",
    "-i {root}/images -i {root}/images": "one folder of images",
    "-i {root}/nowhere": "nowhere",
    "-p {root}/nowhere": "nowhere: no such file or folder",
    "-i {root}/void -p {root}/void": "no case found",
    "-o {root}/out/all.nii.gz": "must be a folder",
    "-i {one} -p {logits} -o {root}/out/refined.png": "a label map cannot be written as .png",
    "-i {one} -p {root}/broken.nii -o {root}/out/x.npz": "a label map cannot be written as .npz",
    "-o {root}/broken.toml/out": "cannot write",
    "-o /dev/null": "/dev/null: expected a folder, this is a file",
    "-o {root}/" + 300 * "n": "File name too long",
    "-o {root}/circle": "circle: expected a folder, this is a file",
    "--summary {root}/broken.toml/s.json": "s.json: cannot be written",
    "--summary {one}": "would replace an input",
    "-c {root}/own.toml --summary {root}/own.toml": "would replace an input",
    "--device cuda:99": "NVIDIA GPU",
}


def test_what_cannot_be_stops_before_anything_is_done(folders, tmp_path):
    """A file where a folder is needed stops the superuser, too; permissions would not."""
    (tmp_path / "void").mkdir()
    (tmp_path / "circle").symlink_to("circle")
    texts = {
        "broken.toml": "[bilateral\nweight = 1",
        "broken.nii": "not read",
        "own.toml": "[mean_field]\nnum_iterations = 2\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    kept = {"-i": folders.images, "-p": folders.logits, "-o": folders.output}
    for options, words in IMPOSSIBLE.items():
        filled = options.format(
            root=tmp_path,
            one=folders.images / "bad_0000.nii.gz",
            logits=folders.logits / "bad.nii.gz",
        ).split()
        result = run_here(
            "infer",
            *(part for pair in kept.items() if pair[0] not in filled for part in pair),
            *filled,
            status=1,
        )
        (line,) = errors(result.stderr)
        assert result.stderr.startswith(line)
        assert words in result.stderr, options
        assert not folders.output.exists()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_values_and_masks_that_cannot_be_used_fail_their_cases(tmp_path):
    folders = write_folders(tmp_path, "empty", "good", "two")
    for case_id, shape, value in (
        ("empty", GRID_SHAPE, 0),
        ("good", GRID_SHAPE, 1),
        ("two", (*GRID_SHAPE, 2), 1),
    ):
        save_nifti(tmp_path / "masks" / f"{case_id}.nii.gz", np.full(shape, value, np.uint8))
    result = infer(folders, "--set", "bilateral.theta_beta=[0.1, 0.1, 0.1]", "-v", status=1)
    assert ["bilateral.theta_beta" in line for line in errors(result.stderr)] == [True] * 3
    result = infer(folders, "-m", tmp_path / "masks", status=1)
    first, second = errors(result.stderr)
    assert "the mask is empty" in first
    assert "one value per voxel" in second
    assert files_in(folders.output) == ["good.nii.gz"]


def test_a_full_disk_ends_the_run_and_the_table_is_printed(tmp_path, small_disk):
    """One case finds no room; the others are not computed for nothing."""
    folders = write_folders(tmp_path, *"abcdefgh")
    (small_disk / "out").mkdir()
    infer(folders, status=0)
    kept = sum(
        path.stat().st_size // 4096 * 4096 + 4096
        for path in folders.output.rglob("*")
        if path.is_file()
    )
    (small_disk / "ballast").write_bytes(bytes(65_536 - kept // 2))
    folders = folders._replace(output=small_disk / "out")
    result = infer(folders, status=1)
    assert result.stdout.splitlines()[0].split("\t")[:2] == ["case", "status"]
    states = [status for _, status in statuses(result)]
    num_done = states.count("done")
    left = 8 - len(states)
    assert num_done >= 1
    assert left >= 2
    assert states == ["done"] * num_done + ["failed"]
    assert f"{num_done} done, 1 failed, {left} not started" in result.stderr
    assert (
        f"{left} cases not begun, since nothing more can be written; run again with --continue "
        "when it can" in result.stderr
    )
    assert "the disk is full" in errors(result.stderr)[0]
    assert files_in(small_disk / "out") == [
        f"{case_id}.nii.gz" for case_id in "abcdefgh"[:num_done]
    ]
    (small_disk / "ballast").unlink()
    result = infer(folders, "--continue", status=0)
    assert [status for _, status in statuses(result)] == ["skipped"] * num_done + ["done"] * (
        8 - num_done
    )


def test_streams_that_are_closed_or_full_leave_no_traceback(folders):
    for closed, status in ((">&- 2>&-", 0), (">/dev/full", 1)):
        line = f"{shlex.join(command('infer', *folders.arguments, *FAST))} {closed}"
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, timeout=120, check=False
        )
        assert (done.returncode, "Traceback" in done.stderr) == (status, False)


def test_an_error_of_the_system_without_a_file_is_told_as_what_it_is(tmp_path):
    for number in range(8):
        save_nifti(tmp_path / f"labels/{number}.nii.gz", np.ones(GRID_SHAPE, np.uint8))
    evaluated = command("evaluate", *2 * [tmp_path / "labels"], "-o", tmp_path / "out")
    too_many = f"ulimit -n 12; {shlex.join(evaluated)} --no-report --processes 8"
    full = f"{shlex.join(command('info'))} >/dev/full"
    for line, said in (
        (too_many, "Too many open files; try fewer --processes"),
        (full, "standard output: No space left on device"),
    ):
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.stderr.splitlines()[-1] == f"crfrefine: error: {said}"
        assert done.returncode == 1


def test_a_current_folder_that_was_removed_is_named(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    words = ["sh", "-c", 'rmdir ../gone; exec "$@"', "sh", *command("infer", "-i", "a", "-p", "b")]
    done = subprocess.run(
        [*words, "-o", "c"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.stderr == "crfrefine: error: the current folder: No such file or directory\n"
    assert done.returncode == 1


def test_a_name_without_room_for_an_ending_is_refined_again_and_again(tmp_path):
    """The second run looks for files of options that are not given, whose names would be longer."""
    folders = write_folders(tmp_path, 240 * "n")
    for options in ((), (), ("--continue",)):
        infer(folders, *options, status=0)
    result = infer(folders, "--save-probabilities", status=1)
    assert "File name too long" in errors(result.stderr)[0]
    assert statuses(result) == [(240 * "n", "failed")]


def test_a_link_to_nothing_fails_its_case_and_is_not_passed_over(folders, tmp_path):
    """As to data that git-annex or DVC have not fetched."""
    for case in CASES:
        save_nifti(tmp_path / "masks" / f"{case}.nii.gz", np.ones(GRID_SHAPE, np.uint8))
    for place in (
        folders.images / "bad_0001.nii.gz",
        tmp_path / "masks" / "bad.nii.gz",
        folders.logits / "bad.nii.gz",
    ):
        content = place.read_bytes()
        place.unlink()
        place.symlink_to(tmp_path / "nowhere.nii.gz")
        result = infer(folders, "-m", tmp_path / "masks", status=1)
        assert errors(result.stderr) == [
            f"crfrefine: error: case 'bad': {place}: is a link to a file that is not there"
        ]
        assert statuses(result) == [("bad", "failed"), ("good", "done")]
        place.unlink()
        place.write_bytes(content)


def test_a_full_disk_keeps_the_old_summary(folders, small_disk):
    summary = small_disk / "summary.json"
    converted = small_disk / "logits.mhd"
    olds = (summary, converted, converted.with_suffix(".zraw"))
    for path in olds:
        path.write_text("old")
    (small_disk / "ballast").write_bytes(bytes(53_248))
    result = infer(folders, "--summary", summary, status=1)
    assert f"{summary}: cannot be written: the disk is full" in result.stderr
    result = run_here("convert", folders.logits / "bad.nii.gz", converted, status=1)
    assert f"{converted}: cannot be written: the disk is full" in result.stderr
    assert [path.read_text() for path in olds] == ["old"] * 3
    assert files_in(small_disk) == ["ballast", "logits.mhd", "logits.zraw", "summary.json"]


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha", ".npz"])
def test_a_disk_that_is_full_in_the_middle_of_a_large_file_ends_the_command(
    tmp_path, small_disk, suffix
):
    """The libraries that compress write on while they end: their error is raised twice."""
    volume = np.random.default_rng(0).normal(size=(40, 50, 30, 4)).astype(np.float32)
    large = save_nifti(tmp_path / "large.nii.gz", volume)
    target = small_disk / f"large{suffix}"
    words = command("convert", large, target)
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        f"crfrefine: error: {target}: cannot be written: the disk is full; free some space "
        "and run again\n",
    )
    assert files_in(small_disk) == []


def test_a_disk_that_is_full_in_the_middle_of_probabilities_ends_the_run(tmp_path, small_disk):
    folders = write_folders(tmp_path, "a", "b", "c")
    for case_id in "abc":
        scores = np.random.default_rng(0).normal(size=(*GRID_SHAPE, 40))
        save_nifti(folders.logits / f"{case_id}.nii.gz", scores.astype(np.float32))
    folders = folders._replace(output=small_disk / "out")
    words = command("infer", *folders.arguments, *FAST, "--save-probabilities")
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "the disk is full" in done.stderr
    assert "1 failed, 2 not started" in done.stderr


# ---- Errors that nobody foresaw

BUG = KeyError("There is no item named 'logits.npy'")
QUICK = (
    "--set",
    "mean_field.num_iterations=1",
    "--set",
    "mean_field.filter=truncated",
    "--threads",
    1,
)


def break_first(monkeypatch, error, module=reading, name="open_bytes"):
    """Let the first call, for the bad case, raise: no file makes the reader raise other errors.

    Files are written while the next case is refined: there the name tells which case it is.
    """
    whole = getattr(module, name)
    errors_left = [error]

    def broken(*arguments, **options):
        is_bad = name != "write" or arguments[0].path.name.startswith("bad")
        if errors_left and is_bad:
            raise errors_left.pop()
        return whole(*arguments, **options)

    monkeypatch.setattr(module, name, broken)


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (BUG, ()),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), ()),
        (AssertionError(), ()),
        (ZeroDivisionError("a bug"), (crfrefine.infer.case_work, "refine_network")),
        (ZeroDivisionError("a bug"), (crfrefine.io.nifti, "write")),
    ],
)
def test_infer_goes_on_after_whatever_is_raised(folders, monkeypatch, error, place):
    break_first(monkeypatch, error, *place)
    summary = folders.output.with_name("summary.json")
    options = (*QUICK, "--jobs", 1, "--summary", summary, "-v")
    result = run_here("infer", *folders.arguments, *options, status=1)
    assert files_in(folders.output) == ["good.nii.gz"]
    (line,) = errors(result.stderr)
    assert line.startswith(f"crfrefine: error: case 'bad': {folders.images.parent}")
    assert re.search(rf"^\d\d:\d\d:\d\d {re.escape(line)}$", result.stderr, re.MULTILINE)
    reason = f" ({error})" if str(error) else ""
    assert f"unexpected {type(error).__name__}{reason}: a bug, please report it" in line
    assert "\n  Traceback (most recent call last):\n" in result.stderr
    assert ", in broken\n" in result.stderr
    record = json.loads(summary.read_text())["cases"][0]
    assert record["error_kind"] == (type(error).__name__ if place else "UnexpectedError")
    assert "in broken" in record["error_traceback"]


def test_a_traceback_is_shown_on_request_alone_and_not_of_too_little_memory(folders, monkeypatch):
    break_first(monkeypatch, MemoryError())
    result = run_here("infer", *folders.arguments, *QUICK, "-v", status=1)
    (line,) = errors(result.stderr)
    assert "there is not enough memory" in line
    assert "report" not in line
    assert "Traceback" not in result.stderr
    break_first(monkeypatch, BUG)
    result = run_here("infer", *folders.arguments, *QUICK, "--fail-fast", status=1)
    assert "not started" in result.stderr
    assert "Traceback" not in result.stderr
