"""`infer --strokes`: files of drawn voxels, of one case or of a folder."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from cli_helpers import AFFINE, FAST, GRID_SHAPE, SPACING, files_in, infer, load_nifti, run_here, save_nifti, statuses, write_folders

import crfrefine
from crfrefine.parameters.model import CrfParameters
from crfrefine.runs.cases import case as cases

STROKE = (slice(6, 10), 7, 5)


def draw(value=2, where=STROKE, shape=GRID_SHAPE):
    drawn = np.zeros(shape, np.uint8)
    drawn[where] = value
    return drawn


@pytest.fixture
def two_cases(tmp_path):
    return write_folders(tmp_path, "a", "b")


def expected(two_cases, drawn, **options):
    parameters = crfrefine.CrfParameters().replace(**{"mean_field.filter": "lattice"})
    return crfrefine.refine(
        two_cases.scores("a"), two_cases.image("a"), spacing=SPACING, parameters=parameters, strokes=drawn, **options
    ).label_map


def test_a_folder_has_strokes_of_some_cases(two_cases):
    save_nifti(two_cases.output.parent / "strokes" / "a.nii.gz", draw())
    result = infer(two_cases, "--strokes", two_cases.output.parent / "strokes", status=0)
    assert "strokes of 1 of 2 cases" in result.stderr
    np.testing.assert_array_equal(load_nifti(two_cases.output / "a.nii.gz"), expected(two_cases, draw()))
    assert (load_nifti(two_cases.output / "a.nii.gz")[STROKE] == 2).all()
    summary = json.loads((two_cases.output / ".crfrefine" / "record.jsonl").read_text().splitlines()[1])
    assert any("4 voxels of label 2" in note for note in summary["notes"])


def test_a_case_with_new_strokes_is_refined_again(two_cases):
    strokes = two_cases.output.parent / "strokes" / "a.nii.gz"
    save_nifti(strokes, draw())
    options = ("--strokes", strokes.parent)
    infer(two_cases, *options, status=0)
    assert dict(statuses(infer(two_cases, *options, "--continue", status=0))) == {"a": "skipped", "b": "skipped"}
    save_nifti(strokes, draw(1))
    again = infer(two_cases, *options, "--continue", status=0)
    assert dict(statuses(again)) == {"a": "done", "b": "skipped"}
    assert "other strokes" in again.stderr
    np.testing.assert_array_equal(load_nifti(two_cases.output / "a.nii.gz"), expected(two_cases, draw(1)))


def arguments(two_cases, *strokes):
    images = [word for path in sorted(two_cases.images.glob("a_*")) for word in ("-i", path)]
    options = [word for path in strokes for word in ("--strokes", path)]
    return ("infer", *images, "-p", two_cases.logits / "a.nii.gz", "-o", two_cases.output.parent / "a.nii.gz", *FAST, *options)


def test_files_of_a_case_are_united_unless_they_contradict_each_other(two_cases, tmp_path):
    other = draw(255, (3, slice(4, 8), 2))
    paths = [save_nifti(tmp_path / name, drawn) for name, drawn in (("one.nii.gz", draw()), ("two.nii.gz", other))]
    run_here(*arguments(two_cases, *paths), status=0)
    np.testing.assert_array_equal(load_nifti(tmp_path / "a.nii.gz"), expected(two_cases, draw() + other))
    save_nifti(paths[1], draw(1, (slice(8, 12), 7, 5)))
    failed = run_here(*arguments(two_cases, *paths), status=1)
    assert "contradict each other at 2 voxels, such as (8, 7, 5), (9, 7, 5)" in failed.stderr


def test_nrrd_as_other_programs_write_it(two_cases, tmp_path):
    drawn = draw()
    nifti = sitk.ReadImage(str(two_cases.images / "a_0000.nii.gz"))
    image = sitk.GetImageFromArray(drawn.transpose(2, 1, 0))
    image.CopyInformation(nifti)
    sitk.WriteImage(sitk.DICOMOrient(image, "LPS"), str(tmp_path / "drawn.nrrd"))
    run_here(*arguments(two_cases, tmp_path / "drawn.nrrd"), status=0)
    np.testing.assert_array_equal(load_nifti(tmp_path / "a.nii.gz"), expected(two_cases, drawn))


@pytest.mark.parametrize("on_coarse_grid", [False, True])
def test_streamed_logits_give_what_logits_in_memory_give(two_cases, tmp_path, monkeypatch, on_coarse_grid):
    options = ["--set", "mean_field.filter=truncated", "--device", "cpu"]
    drawn = save_nifti(tmp_path / "drawn.nii.gz", draw(3) + draw(255, (3, slice(4, 8), 2)))
    if on_coarse_grid:
        scores = np.moveaxis(two_cases.scores("a"), 0, -1)[::2, ::2]
        affine = AFFINE @ np.diag([2.0, 2.0, 1.0, 1.0])
        save_nifti(two_cases.logits / "a.nii.gz", scores, affine)
        options.append("--resample")
    run_here(*arguments(two_cases, drawn), *options, status=0)
    in_memory = load_nifti(tmp_path / "a.nii.gz")
    for name in ("MAX_IN_MEMORY", "MIN_STREAMED"):
        monkeypatch.setattr(cases, name, 1)
    streamed = run_here(*arguments(two_cases, drawn), *options, "-v", status=0)
    assert "are taken as logits" in streamed.stderr or "is taken as logits" in streamed.stderr
    differing = (load_nifti(tmp_path / "a.nii.gz") != in_memory).mean()
    assert differing == 0.0
    assert (in_memory == 3).sum() > 4


def test_strokes_of_another_grid_are_refused(two_cases, tmp_path):
    path = save_nifti(tmp_path / "drawn.nii.gz", draw()[::2], AFFINE @ np.diag([2.0, 1.0, 1.0, 1.0]))
    for option in ((), ("--resample",)):
        assert "strokes are not resampled" in run_here(*arguments(two_cases, path), *option, status=1).stderr


def test_strokes_need_a_network_and_a_case(two_cases, tmp_path):
    path = save_nifti(tmp_path / "strokes" / "c.nii.gz", draw())
    assert (
        "strokes of no case; expected names such as a.nii.gz; the cases are a, b"
        in infer(two_cases, "--strokes", path.parent, status=1).stderr
    )
    save_nifti(path.parent / "a.nii.gz", draw())
    assert "c: strokes of no case" in infer(two_cases, "--strokes", path.parent, status=1).stderr
    images = ("-i", two_cases.images, "-o", two_cases.output)
    assert "--logits" in run_here("infer", *images, "--strokes", path.parent, status=2).stderr


def test_a_convention_of_its_own(two_cases, tmp_path):
    scribbles = np.where(draw() == 0, 4, draw())
    scribbles[3, 4:8, 2] = 0
    path = save_nifti(tmp_path / "drawn.nii.gz", scribbles)
    run_here(*arguments(two_cases, path), "--strokes-ignore", 4, status=0)
    drawn = draw() + draw(255, (3, slice(4, 8), 2))
    np.testing.assert_array_equal(load_nifti(tmp_path / "a.nii.gz"), expected(two_cases, drawn))
    assert "--strokes-ignore" in run_here(*arguments(two_cases, path), status=1).stderr


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
