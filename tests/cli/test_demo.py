"""`crfrefine demo`: writes a phantom in nnU-Net's naming, refines it, and tells what that did."""

from cli_helpers import files_in, load_nifti, run_here, run_process

from crfrefine.runs.store import RECORD_FOLDER


def test_files_are_named_as_nnunet_names_them_and_the_table_has_their_dice(tmp_path):
    folder = tmp_path / "demo"
    result = run_process("demo", "-o", folder, status=0)
    assert files_in(folder) == ["images", "labels", "logits", "refined"]
    assert files_in(folder / "images") == ["phantom_0000.nii.gz", "phantom_0001.nii.gz"]
    assert files_in(folder / "labels") == files_in(folder / "logits") == ["phantom.nii.gz"]
    assert files_in(folder / "refined") == ["phantom.nii.gz", "phantom_preview.png"]
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
    assert "not evidence" in result.stdout
    run_here("demo", "-o", tmp_path / "same", status=0)
    for path in sorted(path for path in folder.rglob("*.*") if RECORD_FOLDER not in path.parts):
        assert (tmp_path / "same" / path.relative_to(folder)).read_bytes() == path.read_bytes(), path
    run_here("demo", "-o", tmp_path / "other", "--seed", "1", status=0)
    assert (load_nifti(tmp_path / "other" / "labels" / "phantom.nii.gz") != truth).any()
