"""Every command with a device, a pipe or a link where it writes: no regular file takes its place. And disks that take nothing."""

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import NUM_LABELS, command, files_in, load_nifti, run_here, run_process, write_folders
from evaluation_helpers import write_study
from special_file_helpers import Reader, kind_of, make_pipe

from crfrefine.parameters.model import CrfParameters

PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


@pytest.fixture
def folders(tmp_path):
    return write_folders(tmp_path, "one", "two")


@pytest.fixture
def case(folders):
    """Options that name one case."""
    return ("-i", folders.images / "one_0000.nii.gz", "-i", folders.images / "one_0001.nii.gz", "-p", folders.logits / "one.nii.gz")


def test_the_summary_goes_through_a_pipe(folders, tmp_path):
    pipe = make_pipe(tmp_path / "summary")
    reader = Reader(pipe)
    result = run_here("infer", *folders.arguments, "--summary", pipe)
    assert result.status == 0, result.stderr
    assert json.loads(reader.result())["num_done"] == 2
    assert kind_of(pipe) == stat.S_IFIFO


def test_nobody_reads_the_summary(folders, tmp_path):
    """The cases are written all the same."""
    pipe = make_pipe(tmp_path / "summary")
    result = run_here("infer", *folders.arguments, "--summary", pipe)
    assert result.status == 1
    assert f"crfrefine: error: {pipe}: cannot be written: it has no reader" in result.stderr
    assert files_in(folders.output) == ["one.nii.gz", "two.nii.gz"]
    assert kind_of(pipe) == stat.S_IFIFO


def test_the_summary_may_be_thrown_away(folders, tmp_path):
    link = tmp_path / "summary.json"
    link.symlink_to("/dev/null")
    result = run_here("infer", *folders.arguments, "--summary", link)
    assert result.status == 0, result.stderr
    assert link.readlink() == Path("/dev/null")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
def test_a_summary_that_is_not_taken_is_an_error(folders, tmp_path):
    (tmp_path / "summary.json").symlink_to("/dev/full")
    result = run_here("infer", *folders.arguments, "--summary", tmp_path / "summary.json")
    assert result.status == 1
    assert "summary.json: cannot be written: No space left on device" in result.stderr


def test_the_summary_on_standard_output(folders, tmp_path):
    """It goes to a file, in which table and summary must both be found."""
    (tmp_path / "stream").symlink_to("/dev/stdout")
    with (tmp_path / "log").open("wb") as log:
        subprocess.run(command("infer", *folders.arguments, "--summary", tmp_path / "stream"), stdout=log, timeout=120, check=True)
    text = (tmp_path / "log").read_text()
    summary, end = json.JSONDecoder().raw_decode(text)
    assert summary["num_done"] == 2
    assert text[end:].lstrip().startswith("case\tstatus")
    assert (tmp_path / "stream").is_symlink()


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
def test_a_label_map_is_not_written_into_a_pipe(suffix, case, tmp_path):
    pipe = make_pipe(tmp_path / f"refined{suffix}")
    result = run_here("infer", *case, "-o", pipe)
    assert result.status == 1
    assert f"{pipe}: cannot be written: it is a named pipe, which is not replaced by a file" in result.stderr
    assert kind_of(pipe) == stat.S_IFIFO


@pytest.mark.parametrize(("option", "name"), [("--save-probabilities", "one_probabilities.nii.gz"), ("--save-logits", "one_logits.nii.gz")])
def test_a_bad_place_is_one_case_s_failure_found_before_it_is_computed(option, name, folders):
    folders.output.mkdir()
    pipe = make_pipe(folders.output / name)
    result = run_here("infer", *folders.arguments, option, "--continue", "-v")
    assert result.status == 1
    assert f"{name}: cannot be written: it is a named pipe" in result.stderr
    assert kind_of(pipe) == stat.S_IFIFO
    assert "one.nii.gz" not in files_in(folders.output)
    assert load_nifti(folders.output / "two.nii.gz").max() < NUM_LABELS


def test_voxels_beside_a_header_are_not_written_into_a_pipe(case, tmp_path):
    pipe = make_pipe(tmp_path / "refined.zraw")
    result = run_here("infer", *case, "-o", tmp_path / "refined.mhd")
    assert result.status == 1
    assert f"{pipe}: cannot be written: it is a named pipe" in result.stderr
    assert kind_of(pipe) == stat.S_IFIFO
    assert not (tmp_path / "refined.mhd").exists()


def test_a_preview_goes_through_a_pipe(folders):
    folders.output.mkdir()
    pipe = make_pipe(folders.output / "one_preview.png")
    reader = Reader(pipe)
    result = run_here("infer", *folders.arguments, "--preview")
    assert result.status == 0, result.stderr
    picture = reader.result()
    assert picture.startswith(PNG_START)
    assert picture.endswith(PNG_END)
    assert kind_of(pipe) == stat.S_IFIFO


def test_a_label_map_is_written_through_a_link(case, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (tmp_path / "refined.nii.gz").symlink_to(scratch / "refined.nii.gz")
    result = run_here("infer", *case, "-o", tmp_path / "refined.nii.gz")
    assert result.status == 0, result.stderr
    assert (tmp_path / "refined.nii.gz").is_symlink()
    assert files_in(scratch) == ["refined.nii.gz"]
    assert not (scratch / "refined.nii.gz").is_symlink()


def test_a_circle_of_links_is_an_error(folders, tmp_path):
    (tmp_path / "summary.json").symlink_to("summary.json")
    result = run_here("infer", *folders.arguments, "--summary", tmp_path / "summary.json")
    assert result.status == 1
    assert "summary.json: cannot be written: Too many levels of symbolic links" in result.stderr


def test_the_output_folder_is_a_device(folders):
    result = run_here("infer", "-i", folders.images, "-p", folders.logits, "-o", "/dev/null")
    assert result.status == 1
    assert result.stderr == "crfrefine: error: /dev/null: expected a folder, this is a file\n"


@pytest.mark.parametrize("name", ["labels.nii.gz", "labels.mha"])
def test_convert_does_not_replace_a_pipe(name, folders, tmp_path):
    pipe = make_pipe(tmp_path / name)
    result = run_here("convert", folders.logits / "one.nii.gz", pipe, "--to", "labels")
    assert result.status == 1
    assert f"{pipe}: cannot be written: it is a named pipe" in result.stderr
    assert kind_of(pipe) == stat.S_IFIFO


@pytest.mark.parametrize("name", ["images/phantom_0000.nii.gz", "labels/phantom.nii.gz", "logits/phantom.nii.gz", "refined/phantom.nii.gz"])
def test_the_demo_does_not_replace_a_pipe(name, tmp_path):
    pipe = tmp_path / "demo" / name
    pipe.parent.mkdir(parents=True)
    make_pipe(pipe)
    result = run_here("demo", "-o", tmp_path / "demo")
    assert result.status == 1
    assert f"{pipe}: cannot be written: it is a named pipe" in result.stderr
    assert kind_of(pipe) == stat.S_IFIFO


def test_tables_and_report_go_through_pipes(tmp_path):
    study = write_study(tmp_path)
    study.output.mkdir()
    readers = {name: Reader(make_pipe(study.output / name)) for name in ("metrics.csv", "summary.json", "report.html")}
    result = run_here(*(argument for argument in study.arguments if argument != "--no-report"))
    assert result.status == 0, result.stderr
    assert readers["metrics.csv"].result().startswith(b"case,label,metric,value,method\n")
    assert json.loads(readers["summary.json"].result())["num_cases"] == 3
    assert readers["report.html"].result().rstrip().endswith(b"</html>")
    assert all(kind_of(study.output / name) == stat.S_IFIFO for name in readers)


@pytest.mark.parametrize("options", [(), ("--continue",)])
def test_the_values_of_a_case_are_not_kept_in_a_pipe(options, tmp_path):
    """Reading them back would wait for ever."""
    study = write_study(tmp_path)
    (study.output / "cases").mkdir(parents=True)
    pipe = make_pipe(study.output / "cases" / "case1.json")
    result = run_process(*study.arguments, *options, timeout=60)
    assert result.status == 1
    assert f"{pipe}: cannot be written: it is a named pipe" in result.stderr
    assert kind_of(pipe) == stat.S_IFIFO


def test_a_full_disk_keeps_the_old_summary(folders, small_disk):
    summary = small_disk / "summary.json"
    summary.write_text("old")
    (small_disk / "ballast").write_bytes(bytes(61_440))
    result = run_here("infer", *folders.arguments, "--summary", summary)
    assert result.status == 1
    assert f"{summary}: cannot be written: the disk is full" in result.stderr
    assert summary.read_text() == "old"
    assert files_in(small_disk) == ["ballast", "summary.json"]


def test_a_full_disk_keeps_the_old_parameters_and_the_old_conversion(folders, small_disk):
    parameters, converted = small_disk / "params.toml", small_disk / "logits.mhd"
    CrfParameters().save(parameters)
    for path in (converted, converted.with_suffix(".zraw")):
        path.write_text("old")
    before = parameters.read_bytes()
    (small_disk / "ballast").write_bytes(bytes(49_152))
    with pytest.raises(Exception, match=r"params\.toml: cannot be written: the disk is full"):
        CrfParameters().save(parameters, "a long comment\n" * 2000)
    result = run_here("convert", folders.logits / "one.nii.gz", converted)
    assert result.status == 1
    assert f"{converted}: cannot be written: the disk is full" in result.stderr
    assert parameters.read_bytes() == before
    assert converted.read_text() == converted.with_suffix(".zraw").read_text() == "old"
    assert files_in(small_disk) == ["ballast", "logits.mhd", "logits.zraw", "params.toml"]


def test_a_read_only_disk_is_named(folders, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    result = run_here("infer", *folders.arguments, "--summary", small_disk / "summary.json")
    assert result.status == 1
    assert f"{small_disk}: cannot write to this folder: Read-only file system" in result.stderr
    result = run_here("convert", folders.logits / "one.nii.gz", small_disk / "one.mha")
    assert result.status == 1
    assert f"{small_disk / 'one.mha'}: cannot be written: the folder {small_disk} cannot be written to" in result.stderr
    with pytest.raises(Exception, match=r"params\.toml: cannot be written: the folder .* cannot be written to"):
        CrfParameters().save(small_disk / "params.toml")


ORDINARY_USER = """
import os, sys
from pathlib import Path
from crfrefine.io.atomic import check_small_output

if os.geteuid() == 0:
    os.setuid(65534)
check_small_output(Path("/dev/null"))
"""


def test_a_device_needs_no_folder_to_write_to():
    """Nobody but the superuser may create files in /dev."""
    done = subprocess.run([sys.executable, "-c", ORDINARY_USER], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
