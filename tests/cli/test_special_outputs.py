"""Every command with a device, a pipe or a link where it writes: no regular file takes its place. And disks that take nothing."""

import stat
import subprocess

from cli_helpers import FAST, files_in, infer, run_here
from special_file_helpers import kind_of, make_pipe

CASES = ("one", "two")
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


def test_a_bad_place_is_one_case_s_failure_found_before_it_is_computed(folders):
    folders.output.mkdir()
    pipes = [make_pipe(folders.output / name) for name in ("one_preview.png", "two_logits.nii.gz")]
    result = infer(folders, "--preview", "--save-logits", "--continue", "-v", status=1)
    assert all(f"{pipe}: cannot be written: it is a device, pipe or socket" in result.stderr for pipe in pipes)
    assert [kind_of(pipe) for pipe in pipes] == [stat.S_IFIFO] * 2
    assert files_in(folders.output) == [pipe.name for pipe in pipes]


def test_a_label_map_is_written_through_a_link(folders, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (tmp_path / "refined.nii.gz").symlink_to(scratch / "refined.nii.gz")
    case = ("-i", folders.images / "one_0000.nii.gz", "-p", folders.logits / "one.nii.gz", *FAST)
    run_here("infer", *case, "-o", tmp_path / "refined.nii.gz", status=0)
    assert (tmp_path / "refined.nii.gz").is_symlink()
    assert files_in(scratch) == ["refined.nii.gz"]
    assert not (scratch / "refined.nii.gz").is_symlink()


def test_a_full_disk_keeps_the_old_summary(folders, small_disk):
    summary, converted = small_disk / "summary.json", small_disk / "logits.mhd"
    olds = (summary, converted, converted.with_suffix(".zraw"))
    for path in olds:
        path.write_text("old")
    (small_disk / "ballast").write_bytes(bytes(53_248))
    result = infer(folders, "--summary", summary, status=1)
    assert f"{summary}: cannot be written: the disk is full" in result.stderr
    result = run_here("convert", folders.logits / "one.nii.gz", converted, status=1)
    assert f"{converted}: cannot be written: the disk is full" in result.stderr
    assert [path.read_text() for path in olds] == ["old"] * 3
    assert files_in(small_disk) == ["ballast", "logits.mhd", "logits.zraw", "summary.json"]


def test_a_read_only_disk_is_named(folders, small_disk):
    """It stops the superuser too, and is found out before anything is computed."""
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    result = run_here("infer", "-i", folders.images, "-p", folders.logits, "-o", small_disk)
    assert (result.status, result.stderr) == (1, f"crfrefine: error: {small_disk}: cannot write to this folder: Read-only file system\n")
