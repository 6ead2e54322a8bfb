"""Everything that users have been seen to hand in: one clear message, no traceback, nothing half-written, and the other cases are done."""

import gzip
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
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

CASES = ("bad", "good")


def with_value(value):
    def change(path):
        values = load_nifti(path).astype(np.float32)
        values[5, 6, 7] = value
        save_nifti(path, values)

    return change


def all_zero_probabilities(path):
    values = np.full((*GRID_SHAPE, NUM_LABELS), 0.25, np.float32)
    values[3, 4, 5] = (0, 1e-5, 0, 0)
    save_nifti(path, values)


def other_place(path):
    affine = AFFINE.copy()
    affine[0, 3] += 3
    save_nifti(path, load_nifti(path), affine)


def turned_archive(path):
    path.unlink()
    np.savez(path.with_name(path.name.replace(".nii.gz", ".npz")), probabilities=np.full((4, *GRID_SHAPE), 0.25, np.float32))


BAD_LOGITS = {
    "nan": (with_value(np.nan), ["NaN", "(5, 6, 7)"]),
    "shape": (lambda path: save_nifti(path, load_nifti(path)[:-2]), ["different grids", "shape_0000.nii.gz", "18×15×11", "16×15×11"]),
    "place": (other_place, ["different grids"]),
    "half": (lambda path: path.write_bytes(path.read_bytes()[:9999]), ["half.nii.gz", "cut off"]),
    "few": (lambda path: path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:9999])), ["few.nii.gz", "cut off"]),
    "missing": (Path.unlink, ["no logits"]),
    "single": (lambda path: save_nifti(path, load_nifti(path)[..., :1]), ["single.nii.gz", "one label only"]),
    "zeros": (all_zero_probabilities, ["zeros.nii.gz", "zero at 1 of", "(3, 4, 5)"]),
    "sigmoid": (lambda path: save_nifti(path, np.random.default_rng(0).random((*GRID_SHAPE, 4), np.float32)), ["do not sum to 1"]),
    "turned": (turned_archive, ["turned.npz", "(label, z, y, x)"]),
}
BAD_IMAGES = {
    "infinite": (with_value(-np.inf), ["infinite_0000.nii.gz", "infinite"]),
    "moved": (other_place, ["different grids", "moved_0001.nii.gz"]),
    "empty": (lambda path: path.write_bytes(b""), ["empty_0000.nii.gz", "empty"]),
    "text": (lambda path: path.write_bytes(gzip.compress(b"this is no image\n" * 100)), ["text_0000.nii.gz", "not a NIfTI file"]),
    "modality": (Path.unlink, ["0000", "found 0001"]),
}


def test_a_bad_case_is_told_and_the_other_one_is_done(tmp_path):
    bad = BAD_LOGITS | BAD_IMAGES
    folders = write_folders(tmp_path, *bad, "good")
    for case_id, (spoil, _) in bad.items():
        spoil(folders.logits / f"{case_id}.nii.gz" if case_id in BAD_LOGITS else folders.images / f"{case_id}_0000.nii.gz")
    result = infer(folders, "--save-probabilities", "--preview", "-v", status=1)
    assert "Traceback" not in result.stderr
    told = {part.split("'")[1]: part for part in result.stderr.split("crfrefine: error: case ")[1:]}
    assert told.keys() == bad.keys()
    for case_id, (_, expected) in bad.items():
        assert all(part in told[case_id] for part in expected), told[case_id]
    assert files_in(folders.output) == ["good.nii.gz", "good_preview.png", "good_probabilities.nii.gz"]
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
    "-i {one} -p {logits} -o {root}/out/refined.png": "unknown suffix",
    "-i {one} -p {root}/broken.nii -o {root}/out/x.npz": "a label map cannot be written as .npz",
    "-o {root}/broken.toml/out": "cannot write",
    "-o /dev/null": "/dev/null: expected a folder, this is a file",
    "-o {root}/" + 300 * "n": "File name too long",
    "--summary {root}/broken.toml/s.json": "s.json: cannot be written",
    "--summary {one}": "would replace an input",
    "-c {root}/own.toml --summary {root}/own.toml": "would replace an input",
    "--device cuda:99": "NVIDIA GPU",
}


@pytest.mark.parametrize("options", IMPOSSIBLE, ids=lambda text: text[:50])
def test_what_cannot_be_stops_before_anything_is_done(folders, tmp_path, options):
    """A file where a folder is needed stops the superuser too, unlike the permissions of a folder."""
    (tmp_path / "void").mkdir()
    (tmp_path / "broken.toml").write_text("[bilateral\nweight = 1")
    (tmp_path / "broken.nii").write_text("not to be looked at")
    (tmp_path / "own.toml").write_text("[mean_field]\nnum_iterations = 2\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    filled = options.format(root=tmp_path, one=folders.images / "bad_0000.nii.gz", logits=folders.logits / "bad.nii.gz").split()
    kept = {"-i": folders.images, "-p": folders.logits, "-o": folders.output}
    result = run_here("infer", *(part for pair in kept.items() if pair[0] not in filled for part in pair), *filled, status=1)
    assert result.stderr.startswith("crfrefine: error: ")
    assert IMPOSSIBLE[options] in result.stderr
    assert len(errors(result.stderr)) == 1
    assert not folders.output.exists()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_wrong_lengths_and_overflow_fail_each_case_by_the_name_of_the_key(folders):
    for key, value in (("bilateral.theta_beta", "[0.1, 0.1, 0.1]"), ("mean_field.temperature", "1e-38")):
        result = infer(folders, "--set", f"{key}={value}", "-v", status=1)
        assert [key in line for line in errors(result.stderr)] == [True] * 2
        assert files_in(folders.output) == []


def test_masks_that_cannot_be_used_fail_their_case_alone(tmp_path):
    folders = write_folders(tmp_path, "empty", "good", "two")
    for case_id, shape, value in (("empty", GRID_SHAPE, 0), ("good", GRID_SHAPE, 1), ("two", (*GRID_SHAPE, 2), 1)):
        save_nifti(tmp_path / "masks" / f"{case_id}.nii.gz", np.full(shape, value, np.uint8))
    result = infer(folders, "-m", tmp_path / "masks", status=1)
    first, second = errors(result.stderr)
    assert "the mask is empty" in first
    assert "one value per voxel" in second
    assert files_in(folders.output) == ["good.nii.gz"]


def test_full_disk_leaves_no_partial_file(folders, small_disk):
    options = ("-i", folders.images, "-p", folders.logits, "-o", small_disk, *FAST)
    result = run_here("infer", *options, "--save-probabilities", "--save-logits", status=1)
    assert result.stderr.count("the disk is full") == 1
    assert not {"bad.nii.gz", "good.nii.gz"} & set(files_in(small_disk))
    for name in files_in(small_disk):
        assert not name.startswith(".")
        assert np.isfinite(load_nifti(small_disk / name)).all()
        (small_disk / name).unlink()
    assert run_here("infer", *options, "--continue").status == 0


def test_a_full_disk_ends_the_run_and_the_table_is_printed(tmp_path, small_disk):
    """One case finds no room; the others are not computed for nothing."""
    folders = write_folders(tmp_path, *"abcdefgh")
    (small_disk / "out").mkdir()
    options = ("-i", folders.images, "-p", folders.logits, "-o", small_disk / "out", *FAST)
    run_here("infer", *options[:4], "-o", tmp_path / "whole", *FAST, status=0)
    kept = sum(path.stat().st_size // 4096 * 4096 + 4096 for path in (tmp_path / "whole").rglob("*") if path.is_file())
    (small_disk / "ballast").write_bytes(bytes(65_536 - kept // 2))
    result = run_here("infer", *options, status=1)
    table = [line.split("\t") for line in result.stdout.splitlines()]
    assert table[0][:2] == ["case", "status"]
    states = [row[1] for row in table[1:]]
    num_done, num_failed = states.count("done"), states.count("failed")
    assert num_done >= 1
    assert num_failed == 1
    assert states == ["done"] * num_done + ["failed"] * num_failed
    left = 8 - len(states)
    assert left >= 2
    assert f"{num_done} done, {num_failed} failed, {left} not started" in result.stderr
    assert f"{left} cases not begun, since nothing more can be written; run again with --continue when it can" in result.stderr
    assert "the disk is full" in errors(result.stderr)[0]
    assert files_in(small_disk / "out") == [f"{case_id}.nii.gz" for case_id in "abcdefgh"[:num_done]]
    (small_disk / "ballast").unlink()
    result = run_here("infer", *options, "--continue", status=0)
    assert [row.split("\t")[1] for row in result.stdout.splitlines()[1:]] == ["skipped"] * num_done + ["done"] * (8 - num_done)


def test_the_table_is_printed_if_no_record_can_be_written(folders, small_disk):
    (small_disk / "ballast").write_bytes(bytes(65_536))
    result = infer(folders, "--summary", small_disk / "summary.json", status=1)
    assert "summary.json: cannot be written: the disk is full" in result.stderr
    assert [row.split("\t")[:2] for row in result.stdout.splitlines()] == [["case", "status"], ["bad", "done"], ["good", "done"]]


def test_a_file_of_parameters_is_never_replaced(folders):
    folders.output.mkdir()
    for name, options in (("good.nii.gz", ()), ("good_probabilities.nii.gz", ("--save-probabilities",))):
        odd = folders.output / name
        odd.write_text("[mean_field]\nnum_iterations = 2\n")
        result = infer(folders, "-c", odd, *options, status=1)
        assert "would replace an input" in result.stderr
        assert odd.read_text() == "[mean_field]\nnum_iterations = 2\n"
        odd.unlink()


@pytest.mark.parametrize(("name", "end", "voxels"), [("other", ".mhd", ".zraw"), ("A", ".nhdr", ".raw.gz")])
def test_an_output_never_replaces_the_voxels_of_an_input(folders, tmp_path, name, end, voxels):
    """The header's name may differ from that of the voxels, also in upper and lower case."""
    header, kept = tmp_path / f"a{end}", tmp_path / f"{name}{voxels}"
    sitk.WriteImage(sitk.ReadImage(str(folders.images / "good_0000.nii.gz")), str(header), useCompression=True)
    (tmp_path / f"a{voxels}").rename(kept)
    header.write_text(header.read_text().replace(f"a{voxels}", kept.name))
    before = kept.read_bytes()
    result = run_here("infer", "-i", header, "-p", folders.logits / "good.nii.gz", "-o", tmp_path / f"{name}{end}", status=1)
    assert "would replace an input" in result.stderr
    assert kept.read_bytes() == before


@pytest.mark.parametrize(("closed", "status"), [(">&- 2>&-", 0), (">/dev/full", 1)])
def test_streams_that_are_closed_or_full_leave_no_traceback(tmp_path, closed, status):
    line = f"{shlex.join(command('infer', *write_folders(tmp_path, 'a').arguments, *FAST))} {closed}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["image", "logits", "mask", "label map"])
def test_a_link_to_nothing_fails_its_case_and_is_not_passed_over(kind, tmp_path):
    """As to data that git-annex or DVC have not fetched."""
    folders = write_folders(tmp_path, *CASES)
    masks = tmp_path / "masks"
    options = ("-m", masks)
    for case in CASES:
        save_nifti(masks / f"{case}.nii.gz", np.ones(GRID_SHAPE, np.uint8))
    if kind == "label map":
        options = ("--input-type", "labels")
        for case in CASES:
            save_nifti(folders.logits / f"{case}.nii.gz", (np.indices(GRID_SHAPE)[0] // 9).astype(np.uint8))
    place = {"image": folders.images / "bad_0001.nii.gz", "mask": masks / "bad.nii.gz"}.get(kind, folders.logits / "bad.nii.gz")
    place.unlink()
    place.symlink_to(tmp_path / "nowhere.nii.gz")
    result = infer(folders, *options, status=1)
    assert errors(result.stderr) == [f"crfrefine: error: case 'bad': {place}: is a link to a file that is not there"]
    assert statuses(result) == [("bad", "failed"), ("good", "done")]
    assert "ignored" not in result.stderr
    assert files_in(folders.output) == ["good.nii.gz"]
