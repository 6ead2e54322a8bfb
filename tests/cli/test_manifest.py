"""`infer --manifest`: archives that follow no naming, with parts, --continue and `status`; the results are those of a folder run."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
from cli_helpers import AFFINE, FAST, GRID_SHAPE, files_in, infer, load_nifti, run_here, save_nifti

import crfrefine
from crfrefine.parameters.model import CrfParameters


@pytest.fixture
def manifest(folders, tmp_path):
    """The cases of the folders under names of their own, beside a manifest that is not in the current folder."""
    rows = [["case", "images", "logits", "output"]]
    for number, name in enumerate("abc"):
        images = []
        for modality, channel in enumerate(("t1", "flair")):
            path = tmp_path / "archive" / f"{channel} of {number}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes((folders.images / f"{name}_{modality:04d}.nii.gz").read_bytes())
            images.append(path.name)
        logits = tmp_path / "archive" / "net" / str(number) / "output.nii.gz"
        logits.parent.mkdir(parents=True)
        logits.write_bytes((folders.logits / f"{name}.nii.gz").read_bytes())
        rows.append([name, ";".join(images), f"net/{number}/output.nii.gz", "sub/second.nii.gz" if name == "b" else ""])
    with (tmp_path / "archive" / "cases.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return tmp_path / "archive" / "cases.csv"


def test_results_are_those_of_a_folder_run(folders, manifest, tmp_path):
    assert infer(folders).status == 0
    output = tmp_path / "by manifest"
    run_here("infer", "--manifest", manifest, "-o", output, "--save-logits", "--preview", *FAST, status=0)
    assert files_in(output) == [*(f"{name}{end}" for name in "ac" for end in (".nii.gz", "_logits.nii.gz", "_preview.png")), "sub"]
    assert files_in(output / "sub") == ["second.nii.gz", "second_logits.nii.gz", "second_preview.png"]
    for name, path in (("a", "a.nii.gz"), ("b", "sub/second.nii.gz"), ("c", "c.nii.gz")):
        assert (output / path).read_bytes() == (folders.output / f"{name}.nii.gz").read_bytes()


def test_parts_continue_and_status_work_with_it(manifest, tmp_path, monkeypatch):
    monkeypatch.chdir(manifest.parent)
    arguments = ("infer", "--manifest", "cases.csv", "-o", "../out", *FAST)
    for part_id in range(2):
        assert run_here(*arguments, "--num-parts", 2, "--part-id", part_id).status == 0
    assert run_here("status", "../out").status == 0
    (tmp_path / "out" / "sub" / "second.nii.gz").unlink()
    result = run_here("status", "../out", "--json", status=1)
    (folder,) = json.loads(result.stdout)["folders"]
    assert [case["state"] for case in folder["cases"]] == ["done", "missing", "done"]
    result = run_here(*arguments, "--continue", "--num-parts", 2, "--part-id", 1)
    assert [line.split("\t")[1] for line in result.stdout.splitlines()[1:]] == ["done"]
    assert run_here("status", "../out").status == 0


def add_column(manifest, name, value):
    """Of the first case; the others have nothing there."""
    head, first, *others = manifest.read_text().splitlines()
    manifest.write_text("\n".join([f"{head},{name}", f"{first},{value}", *(f"{line}," for line in others)]))


def test_spacing_and_mask_are_per_case_and_the_output_keeps_the_image_s_grid(manifest, folders, tmp_path):
    """Twice as thick slices as in the header: other distances, other results. Masks of the other cases are `-m nonzero`."""
    mask = np.zeros(GRID_SHAPE, np.uint8)
    mask[3:16, 2:13] = 1
    save_nifti(manifest.parent / "mask.nii.gz", mask)
    add_column(manifest, "spacing", "1;1.25;5")
    add_column(manifest, "mask", "mask.nii.gz")
    strong = (*FAST, "--set", "bilateral.weight=30", "--set", "bilateral.theta_alpha=3")
    arguments = ("-o", tmp_path / "out", "-m", "nonzero", "--summary", tmp_path / "s.json", *strong)
    run_here("infer", "--manifest", manifest, *arguments, status=0)
    first, second, _ = json.loads((tmp_path / "s.json").read_text())["cases"]
    assert (first["spacing"], second["spacing"]) == ([1.0, 1.25, 5.0], [1.0, 1.25, 2.5])
    assert "t1 of 0.nii.gz: spacing 1×1.25×5 mm as given, in place of 1×1.25×2.5 mm" in first["notes"]
    assert first["num_voxels_in_mask"] == mask.sum()
    assert second["num_voxels_in_mask"] == (folders.image("b") != 0).any(axis=0).sum()
    parameters = CrfParameters().replace(**{"mean_field.filter": "lattice", "bilateral.weight": 30, "bilateral.theta_alpha": 3})
    settings = {"parameters": parameters, "mask": mask.astype(bool)}
    arrays = folders.scores("a"), folders.image("a")
    by_spacing = [crfrefine.refine(*arrays, spacing=(1, 1.25, dz), **settings).label_map for dz in (5, 2.5)]
    assert (by_spacing[0] != by_spacing[1]).any(), "the spacing makes no difference here"
    np.testing.assert_array_equal(load_nifti(tmp_path / "out" / "a.nii.gz"), by_spacing[0])
    np.testing.assert_allclose(nib.load(tmp_path / "out" / "a.nii.gz").affine, AFFINE)


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("sub/../a.nii.gz", (), "out/a.nii.gz: an output of the case 'a' and of 'b'; choose another output for one of them"),
        ("a.mha", ("--preview",), "out/a_preview.png: an output of the case 'a' and of 'b'"),
        ("a.mha", ("--save-structures",), "out/a: an output of the case 'a' and of 'b'"),
        ("a_logits.nii.gz", ("--save-logits",), "out/a_logits.nii.gz: an output of the case 'a' and of 'b'"),
        ("{archive}/t1 of 0.nii.gz", (), "t1 of 0.nii.gz: would replace an input"),
        ("{archive}/../link/t1 of 0.nii.gz", (), "would replace an input"),
    ],
)
def test_cases_share_no_output_and_replace_no_input(manifest, tmp_path, output, options, message):
    """Those of other parts of a job array, too."""
    (tmp_path / "link").symlink_to("archive")
    manifest.write_text(manifest.read_text().replace("sub/second.nii.gz", output.format(archive=manifest.parent)))
    arguments = ("infer", "--manifest", manifest, "-o", tmp_path / "out", *options, "--num-parts", 2, "--part-id", 0)
    assert message in run_here(*arguments, status=1).stderr
    assert not (tmp_path / "out").exists()
