"""Everything that users have been seen to hand in: one clear message, no traceback, nothing half-written, and the other cases are done."""

import gzip
import io
import os
import pickle
import resource
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from cli_helpers import (
    AFFINE,
    GRID_SHAPE,
    NUM_LABELS,
    Folders,
    command,
    files_in,
    load_nifti,
    run_here,
    run_process,
    save_nifti,
    write_folders,
)


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return write_folders(tmp_path, "bad", "good")


def with_value(path: Path, value: float) -> None:
    values = load_nifti(path).astype(np.float32)
    values[5, 6, 7] = value
    save_nifti(path, values)


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def truncate_inside(path: Path) -> None:
    """Whole as a gzip file, but with fewer voxels than the header promises."""
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[: len(content) // 2]))


def all_zero_probabilities(path: Path) -> None:
    values = np.full((*GRID_SHAPE, NUM_LABELS), 0.25, np.float32)
    values[3, 4, 5] = (0, 1e-5, 0, 0)
    save_nifti(path, values)


def sigmoid_channels(path: Path) -> None:
    save_nifti(path, np.random.default_rng(0).random((*GRID_SHAPE, NUM_LABELS), np.float32))


def other_shape(path: Path) -> None:
    save_nifti(path, load_nifti(path)[:-2])


def other_place(path: Path) -> None:
    affine = AFFINE.copy()
    affine[0, 3] += 3
    save_nifti(path, load_nifti(path), affine)


def npz_instead(**arrays: np.ndarray) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        np.savez(path.with_name(f"{path.name.removesuffix('.nii.gz')}.npz"), **arrays)

    return replace


def pickled_npz(path: Path) -> None:
    path.unlink()
    array = np.empty((NUM_LABELS, *GRID_SHAPE[::-1]), object)
    np.savez(path.with_name("bad.npz"), probabilities=array)


def bare_pickle(path: Path) -> None:
    path.unlink()
    path.with_name("bad.npz").write_bytes(pickle.dumps({"probabilities": np.zeros(3)}))


def text_as_image(path: Path) -> None:
    path.write_text("this is no image\n" * 100)


def compressed_text(path: Path) -> None:
    path.write_bytes(gzip.compress(b"this is no image\n" * 100))


def one_label(path: Path) -> None:
    save_nifti(path, load_nifti(path)[..., :1])


ZYX = GRID_SHAPE[::-1]
BAD_FILES = [
    pytest.param("logits", lambda path: with_value(path, np.nan), ["bad.nii.gz", "NaN", "(5, 6, 7)"], id="NaN logits"),
    pytest.param("logits", lambda path: with_value(path, np.inf), ["bad.nii.gz", "infinite"], id="infinite logits"),
    pytest.param("image", lambda path: with_value(path, np.nan), ["bad_0000.nii.gz", "NaN"], id="NaN image"),
    pytest.param("image", lambda path: with_value(path, -np.inf), ["bad_0000.nii.gz", "infinite"], id="infinite image"),
    pytest.param("logits", other_shape, ["different grids", "bad_0000.nii.gz", "18×15×11", "bad.nii.gz", "16×15×11"], id="shape differs"),
    pytest.param("logits", other_place, ["different grids", "bad_0000.nii.gz", "bad.nii.gz"], id="affine differs"),
    pytest.param("image", other_place, ["different grids", "bad_0000.nii.gz", "bad_0001.nii.gz"], id="modalities differ"),
    pytest.param("logits", truncate, ["bad.nii.gz", "cut off"], id="logits cut off"),
    pytest.param("logits", truncate_inside, ["bad.nii.gz", "cut off"], id="logits with too few voxels"),
    pytest.param("image", truncate, ["bad_0000.nii.gz", "cut off"], id="image cut off"),
    pytest.param("logits", lambda path: path.write_bytes(b""), ["bad.nii.gz", "empty"], id="empty logits"),
    pytest.param("image", lambda path: path.write_bytes(b""), ["bad_0000.nii.gz", "empty"], id="empty image"),
    pytest.param("image", text_as_image, ["bad_0000.nii.gz", "not compressed with gzip"], id="text as image"),
    pytest.param("image", compressed_text, ["bad_0000.nii.gz", "not a NIfTI file"], id="compressed text as image"),
    pytest.param("image", Path.unlink, ["'bad'", "0000", "found 0001"], id="missing modality"),
    pytest.param("logits", Path.unlink, ["'bad'", "no logits"], id="missing logits"),
    pytest.param("logits", one_label, ["bad.nii.gz", "one label only"], id="one label"),
    pytest.param("logits", all_zero_probabilities, ["bad.nii.gz", "zero at 1 of", "(3, 4, 5)"], id="all probabilities zero"),
    pytest.param("logits", sigmoid_channels, ["bad.nii.gz", "do not sum to 1"], id="sigmoid channels"),
    pytest.param("logits", npz_instead(softmax=np.zeros((4, *ZYX), np.float32)), ["bad.npz", "nnU-Net version 1"], id="nnU-Net v1"),
    pytest.param("logits", npz_instead(scores=np.zeros((4, *ZYX), np.float32)), ["bad.npz", "scores"], id="unknown array"),
    pytest.param(
        "logits", npz_instead(probabilities=np.full((4, *GRID_SHAPE), 0.25, np.float32)), ["bad.npz", "(label, z, y, x)"], id="npz x first"
    ),
    pytest.param("logits", pickled_npz, ["bad.npz", "pickle"], id="pickled npz"),
    pytest.param("logits", bare_pickle, ["bad.npz", "pickle"], id="a pickle named npz"),
]


@pytest.mark.parametrize(("which", "spoil", "expected"), BAD_FILES)
def test_a_bad_case_is_told_and_the_other_one_is_done(folders, which, spoil, expected):
    spoil(folders.logits / "bad.nii.gz" if which == "logits" else folders.images / "bad_0000.nii.gz")
    result = run_here("infer", *folders.arguments, "--save-probabilities", "--preview")
    assert result.status == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("crfrefine: error: ")]
    assert len(errors) == 1
    assert all(part in result.stderr for part in expected), result.stderr
    assert "'bad'" in errors[0]
    assert "Traceback" not in result.stderr
    assert files_in(folders.output) == ["good.nii.gz", "good_preview.png", "good_probabilities.nii.gz"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param(["--set", "bilateral.theta_gamma=1"], "bilateral.theta_gamma", id="unknown key"),
        pytest.param(["--set", "bilaterall.weight=1"], "bilaterall", id="unknown section"),
        pytest.param(["--set", "bilateral.theta_alpha=0"], "bilateral.theta_alpha", id="theta of zero"),
        pytest.param(["--set", "bilateral.theta_beta=-0.1"], "bilateral.theta_beta", id="negative theta"),
        pytest.param(["--set", "bilateral.weight=many"], "bilateral.weight", id="not a number"),
        pytest.param(["--set", "bilateral.weight"], "KEY=VALUE", id="no value"),
        pytest.param(["--set", "mean_field.filter=fast"], "mean_field.filter", id="unknown filter"),
        pytest.param(["--set", "compatibility.matrix=[[1.0, 1.0], [1.0, 0.0]]"], "compatibility.matrix", id="diagonal not zero"),
        pytest.param(["-c", "no_such_preset"], "no_such_preset", id="unknown preset"),
        pytest.param(["-c", "{broken}"], "broken.toml", id="broken file"),
        pytest.param(["-m", "no_such_folder"], "no_such_folder", id="masks that are not there"),
        pytest.param(["-i", "{images}"], "one folder of images", id="two folders of images"),
    ],
)
def test_bad_options_stop_before_anything_is_done(folders, tmp_path, options, expected):
    broken = tmp_path / "broken.toml"
    broken.write_text("[bilateral\nweight = 1")
    filled = [option.format(broken=broken, images=folders.images) for option in options]
    result = run_here("infer", *folders.arguments, *filled)
    assert result.status == 1
    assert result.stderr.startswith("crfrefine: error: ")
    assert expected in result.stderr
    assert result.stderr.count("crfrefine: error:") == 1
    assert not folders.output.exists()


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        pytest.param("bilateral.weight=[1, 2, 3]", "bilateral.weight", id="labels"),
        pytest.param("bilateral.theta_beta=[0.1, 0.1, 0.1]", "bilateral.theta_beta", id="modalities"),
        pytest.param("bilateral.theta_alpha=[1, 2]", "bilateral.theta_alpha", id="axes"),
    ],
)
def test_wrong_lengths_fail_each_case_by_the_name_of_the_key(folders, option, expected):
    result = run_here("infer", *folders.arguments, "--set", option)
    assert result.status == 1
    assert result.stderr.count("crfrefine: error:") == 2
    assert all(expected in line for line in result.stderr.splitlines() if line.startswith("crfrefine: error:"))
    assert files_in(folders.output) == []


def test_empty_masks(folders, tmp_path):
    for case_id, value in (("bad", 0), ("good", 1)):
        save_nifti(tmp_path / "masks" / f"{case_id}.nii.gz", np.full(GRID_SHAPE, value, np.uint8))
    result = run_here("infer", *folders.arguments, "-m", tmp_path / "masks")
    assert result.status == 1
    assert "the mask is empty" in result.stderr
    assert files_in(folders.output) == ["good.nii.gz"]
    save_nifti(folders.images / "bad_0000.nii.gz", np.zeros(GRID_SHAPE, np.int16))
    save_nifti(folders.images / "bad_0001.nii.gz", np.zeros(GRID_SHAPE, np.int16))
    result = run_here("infer", *folders.arguments, "-m", "nonzero")
    assert result.status == 1
    assert "empty" in result.stderr


def test_no_case_at_all(tmp_path):
    for name in ("images", "logits"):
        (tmp_path / name).mkdir()
    result = run_here("infer", "-i", tmp_path / "images", "-p", tmp_path / "logits", "-o", tmp_path / "out")
    assert result.status == 1
    assert "no case found" in result.stderr
    assert not (tmp_path / "out").exists()


def test_paths_that_are_not_there(folders, tmp_path):
    for options in (("-i", tmp_path / "nowhere", "-p", folders.logits), ("-i", folders.images, "-p", tmp_path / "nowhere")):
        result = run_here("infer", *options, "-o", folders.output)
        assert result.status == 1
        assert f"{tmp_path / 'nowhere'}: no such file or folder" in result.stderr


def test_a_file_name_as_output_of_a_folder_run(folders):
    result = run_here("infer", "-i", folders.images, "-p", folders.logits, "-o", folders.output / "all.nii.gz")
    assert result.status == 1
    assert "must be a folder" in result.stderr


def test_unknown_suffix_of_the_output(folders, tmp_path):
    options = ("-i", folders.images / "good_0000.nii.gz", "-p", folders.logits / "good.nii.gz")
    result = run_here("infer", *options, "-o", tmp_path / "refined.png")
    assert result.status == 1
    assert "unknown suffix" in result.stderr
    assert not (tmp_path / "refined.png").exists()


@pytest.mark.parametrize("option", ["-o", "--summary"])
def test_place_that_cannot_be_written_to(folders, tmp_path, option):
    """A file where a folder is needed: unlike the permissions of a folder, this stops the superuser too."""
    (tmp_path / "file").write_text("in the way")
    place = tmp_path / "file" / ("out" if option == "-o" else "summary.json")
    result = run_here("infer", *folders.arguments, option, place)
    assert result.status == 1
    assert ("cannot write" if option == "-o" else "summary.json: cannot be written") in result.stderr
    assert result.stderr.count("crfrefine: error:") == 1
    assert (tmp_path / "file").read_text() == "in the way"
    if option == "-o":
        assert not folders.output.exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_folder_without_permission(folders):
    folders.output.mkdir(mode=0o555)
    result = run_here("infer", *folders.arguments)
    assert result.status == 1
    assert "cannot write" in result.stderr


def test_full_disk_leaves_no_partial_file(folders, small_disk):
    options = ("-i", folders.images, "-p", folders.logits, "-o", small_disk)
    result = run_here("infer", *options, "--save-probabilities", "--save-logits")
    assert result.status == 1
    assert result.stderr.count("the disk is full") == 2
    for name in files_in(small_disk):
        assert not name.startswith(".")
        assert np.isfinite(load_nifti(small_disk / name)).all()
    assert not {"bad.nii.gz", "good.nii.gz"} & set(files_in(small_disk))
    for name in files_in(small_disk):
        (small_disk / name).unlink()
    assert run_here("infer", *options, "--continue").status == 0


def test_read_only_disk(folders, small_disk):
    """It stops the superuser too, and is found out before anything is computed."""
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    result = run_here("infer", "-i", folders.images, "-p", folders.logits, "-o", small_disk)
    assert result.status == 1
    assert result.stderr == f"crfrefine: error: {small_disk}: cannot write to this folder: Read-only file system\n"


def test_file_size_limit_leaves_no_partial_file(folders):
    """Where no small disk can be mounted: a limit on the size of a file makes writing fail in the same place."""

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(
        command("infer", *folders.arguments, "--save-probabilities"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=limit_file_size,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},  # Python before 3.12.8 keeps what it could write of a file
    )
    assert done.returncode == 1
    assert done.stderr.count("cannot be written") == 2
    assert "Traceback" not in done.stderr
    assert files_in(folders.output) == []


def test_the_process_says_it_in_one_line_too(folders):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    (folders.logits / "bad.nii.gz").write_bytes(buffer.getvalue())
    result = run_process("infer", *folders.arguments)
    assert result.status == 1
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("crfrefine: error")]
    assert len(errors) == 1
    assert errors[0].startswith(f"crfrefine: error: case 'bad': {folders.logits / 'bad.nii.gz'}: the file is not compressed with gzip")
    assert nib.load(folders.output / "good.nii.gz").shape == GRID_SHAPE


def test_a_summary_never_replaces_an_input(folders):
    victim = folders.images / "bad_0000.nii.gz"
    before = victim.read_bytes()
    result = run_here("infer", *folders.arguments, "--summary", victim)
    assert result.status == 1
    assert "the summary would replace a file of this run" in result.stderr
    assert victim.read_bytes() == before
    assert not folders.output.exists()


def test_a_file_of_parameters_is_never_replaced(folders, tmp_path):
    """Neither by the summary, nor by an output, whatever its name."""
    text = "[mean_field]\nnum_iterations = 2\n"
    own = tmp_path / "own.toml"
    own.write_text(text)
    result = run_here("infer", *folders.arguments, "-c", own, "--summary", own)
    assert result.status == 1
    assert "the summary would replace a file of this run" in result.stderr
    assert own.read_text() == text
    folders.output.mkdir()
    for name, options in (("good.nii.gz", ()), ("good_probabilities.nii.gz", ("--save-probabilities",))):
        odd = folders.output / name
        odd.write_text(text)
        result = run_here("infer", *folders.arguments, "-c", odd, *options)
        assert result.status == 1
        assert "would replace an input" in result.stderr
        assert odd.read_text() == text
        odd.unlink()


@pytest.mark.parametrize("end", [".mhd", ".nhdr"])
@pytest.mark.parametrize("target", ["other{end}", "A{end}"], ids=["other name", "capitals"])
def test_an_output_never_replaces_the_voxels_of_an_input(folders, tmp_path, end, target):
    """The header's name may differ from that of the voxels, also in upper and lower case."""
    voxels = tmp_path / ((target.format(end=end)).removesuffix(end) + {".mhd": ".zraw", ".nhdr": ".raw.gz"}[end])
    image = sitk.ReadImage(str(folders.images / "good_0000.nii.gz"))
    sitk.WriteImage(image, str(tmp_path / f"a{end}"), useCompression=True)
    written = tmp_path / {".mhd": "a.zraw", ".nhdr": "a.raw.gz"}[end]
    if written != voxels:
        written.rename(voxels)
        header = tmp_path / f"a{end}"
        header.write_text(header.read_text().replace(written.name, voxels.name))
    before = voxels.read_bytes()
    result = run_here("infer", "-i", tmp_path / f"a{end}", "-p", folders.logits / "good.nii.gz", "-o", tmp_path / target.format(end=end))
    assert result.status == 1
    assert "would replace an input" in result.stderr
    assert voxels.read_bytes() == before


def test_a_mask_of_several_channels_fails_its_case_alone(folders, tmp_path):
    save_nifti(tmp_path / "masks" / "good.nii.gz", np.ones(GRID_SHAPE, np.uint8))
    save_nifti(tmp_path / "masks" / "bad.nii.gz", np.ones((*GRID_SHAPE, 2), np.uint8))
    result = run_here("infer", *folders.arguments, "-m", tmp_path / "masks")
    assert result.status == 1
    assert "one value per voxel" in result.stderr
    assert files_in(folders.output) == ["good.nii.gz"]


def test_a_temperature_that_overflows_is_refused(folders):
    result = run_here("infer", *folders.arguments, "--set", "mean_field.temperature=1e-38")
    assert result.status == 1
    assert "mean_field.temperature" in result.stderr
    assert files_in(folders.output) == []


def test_names_that_are_too_long_are_one_line(folders, tmp_path):
    name = "n" * 300  # file systems take 255
    for arguments in (("infer", "-i", folders.images, "-p", folders.logits, "-o", tmp_path / name), ("info", f"{name}.nii")):
        result = run_process(*arguments)
        assert result.status == 1
        assert "crfrefine: error: " in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("closed", "status"), [(">&-", 0), ("2>&-", 0), (">/dev/full", 1)])
def test_streams_that_are_closed_or_full_leave_no_traceback(folders, closed, status):
    line = f"{shlex.join(command('infer', *folders.arguments))} {closed}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status
    assert "Traceback" not in done.stderr


def test_a_label_map_is_no_archive_and_nothing_is_read_to_say_so(folders, tmp_path):
    logits = folders.logits / "good.nii.gz"
    logits.write_bytes(b"not to be looked at")
    result = run_here("infer", "-i", folders.images / "good_0000.nii.gz", "-p", logits, "-o", tmp_path / "new" / "x.npz")
    assert result.status == 1
    assert "a label map cannot be written as .npz" in result.stderr
    assert "gzip" not in result.stderr
    assert not (tmp_path / "new").exists()


def test_cases_without_logits_leave_no_empty_folder(folders):
    for path in folders.logits.iterdir():
        path.unlink()
    result = run_here("infer", *folders.arguments)
    assert result.status == 1
    assert "no logits" in result.stderr
    assert not folders.output.exists()
