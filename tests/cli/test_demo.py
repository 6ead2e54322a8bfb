"""`crfrefine demo`: writes a phantom in nnU-Net's naming, refines it, and tells what that did."""

import nibabel as nib
import pytest
from cli_helpers import files_in, load_nifti, run_here, run_process

from crfrefine.runs.infer.store import RECORD_FOLDER


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_process("demo", "-o", folder)


def test_files_are_named_as_nnunet_names_them(made):
    folder, result = made
    assert result.status == 0, result.stderr
    assert files_in(folder) == ["images", "labels", "logits", "refined"]
    assert files_in(folder / "images") == ["phantom_0000.nii.gz", "phantom_0001.nii.gz"]
    assert files_in(folder / "labels") == files_in(folder / "logits") == ["phantom.nii.gz"]
    assert files_in(folder / "refined") == ["phantom.nii.gz", "phantom_preview.png"]
    shapes = {nib.load(folder / kind / "phantom.nii.gz").shape[:3] for kind in ("labels", "logits", "refined")}
    assert shapes == {nib.load(folder / "images" / "phantom_0000.nii.gz").shape}


def test_table_has_the_dice_of_what_was_written(made):
    folder, result = made
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert rows[0][:3] == ["label", "Dice before", "Dice after"]
    truth = load_nifti(folder / "labels" / "phantom.nii.gz")
    before = load_nifti(folder / "logits" / "phantom.nii.gz").argmax(axis=-1)
    after = load_nifti(folder / "refined" / "phantom.nii.gz")
    for label in (1, 2, 3):
        for labels, shown in ((before, rows[label][1]), (after, rows[label][2])):
            found, wanted = labels == label, truth == label
            assert shown == f"{2 * (found & wanted).sum() / (found.sum() + wanted.sum()):.4f}"
        assert float(rows[label][2]) > float(rows[label][1])
        assert int(rows[label][5]) < int(rows[label][4])
    assert str(folder / "refined" / "phantom.nii.gz") in result.stdout
    assert "not evidence" in result.stdout


def test_the_seed_decides_the_bytes(made, tmp_path):
    folder, _ = made
    assert run_here("demo", "-o", tmp_path / "same").status == 0
    for path in sorted(path for path in folder.rglob("*.*") if RECORD_FOLDER not in path.parts):
        assert (tmp_path / "same" / path.relative_to(folder)).read_bytes() == path.read_bytes(), path
    assert run_here("demo", "-o", tmp_path / "other", "--seed", "1", "--threads", "1").status == 0
    assert (load_nifti(tmp_path / "other" / "labels" / "phantom.nii.gz") != load_nifti(folder / "labels" / "phantom.nii.gz")).any()
