"""`infer --strokes`: files of drawn voxels, of one case or of a folder."""

import json
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from cli_helpers import (
    AFFINE,
    FAST,
    GRID_SHAPE,
    files_in,
    infer,
    load_nifti,
    refined,
    run_here,
    save_nifti,
    set_streaming,
    statuses,
)

STROKE = (slice(6, 10), 7, 5)


def draw(value=2, where=STROKE):
    drawn = np.zeros(GRID_SHAPE, np.uint8)
    drawn[where] = value
    return drawn


OTHER = draw(255, (3, slice(4, 8), 2))


def test_a_folder_has_strokes_of_some_cases(folders, tmp_path):
    save_nifti(tmp_path / "strokes" / "a.nii.gz", draw())
    result = infer(folders, "--strokes", tmp_path / "strokes", status=0)
    assert "strokes of 1 of 3 cases" in result.stderr
    np.testing.assert_array_equal(
        load_nifti(folders.output / "a.nii.gz"), refined(folders, "a", strokes=draw())
    )
    assert (load_nifti(folders.output / "a.nii.gz")[STROKE] == 2).all()
    summary = json.loads(
        (folders.output / ".crfrefine" / "record.jsonl").read_text().splitlines()[1]
    )
    assert any("4 voxels of label 2" in note["text"] for note in summary["notes"])


def test_a_case_with_new_strokes_is_refined_again(folders, tmp_path):
    strokes = save_nifti(tmp_path / "strokes" / "a.nii.gz", draw())
    options = ("--strokes", strokes.parent, "--continue")
    infer(folders, *options, status=0)
    assert dict(statuses(infer(folders, *options, status=0))) == dict.fromkeys("abc", "skipped")
    save_nifti(strokes, draw(1))
    again = infer(folders, *options, status=0)
    assert dict(statuses(again)) == {"a": "done", "b": "skipped", "c": "skipped"}
    assert "other strokes" in again.stderr
    np.testing.assert_array_equal(
        load_nifti(folders.output / "a.nii.gz"), refined(folders, "a", strokes=draw(1))
    )


def refine_a(folders, *strokes, options=(), status=0):
    """Refine the first case into `a.nii.gz` beside the folders."""
    inputs = []
    for path in sorted(folders.images.glob("a_*")):
        inputs += ["-i", path]
    for path in strokes:
        inputs += ["--strokes", path]
    arguments = (
        "infer",
        *inputs,
        "-p",
        folders.logits / "a.nii.gz",
        "-o",
        folders.output.parent / "a.nii.gz",
        *FAST,
    )
    return run_here(*arguments, *options, status=status)


def test_a_single_file_is_refined_again_with_newer_strokes(folders, tmp_path):
    strokes = save_nifti(tmp_path / "drawn.nii.gz", draw())
    for value, status in ((2, "done"), (2, "skipped"), (1, "done")):
        if value == 1:
            save_nifti(strokes, draw(value))
        assert statuses(refine_a(folders, strokes, options=["--continue"])) == [("a", status)]
    np.testing.assert_array_equal(
        load_nifti(tmp_path / "a.nii.gz"), refined(folders, "a", strokes=draw(1))
    )


def test_files_of_a_case_are_united_unless_they_contradict_each_other(folders, tmp_path):
    paths = [
        save_nifti(tmp_path / name, drawn)
        for name, drawn in (("one.nii.gz", draw()), ("two.nii.gz", OTHER))
    ]
    refine_a(folders, *paths)
    np.testing.assert_array_equal(
        load_nifti(tmp_path / "a.nii.gz"), refined(folders, "a", strokes=draw() + OTHER)
    )
    empty = save_nifti(tmp_path / "empty.nii.gz", draw(0))
    assert "a: strokes: no voxel is drawn" in refine_a(folders, empty).stderr
    save_nifti(paths[1], draw(1, (slice(8, 12), 7, 5)))
    assert (
        "contradict each other at 2 voxels, such as (8, 7, 5), (9, 7, 5)"
        in refine_a(folders, *paths, status=1).stderr
    )


def test_nrrd_as_other_programs_write_it(folders, tmp_path):
    image = sitk.GetImageFromArray(draw().transpose(2, 1, 0))
    image.CopyInformation(sitk.ReadImage(str(folders.images / "a_0000.nii.gz")))
    sitk.WriteImage(sitk.DICOMOrient(image, "LPS"), str(tmp_path / "drawn.nrrd"))
    refine_a(folders, tmp_path / "drawn.nrrd")
    np.testing.assert_array_equal(
        load_nifti(tmp_path / "a.nii.gz"), refined(folders, "a", strokes=draw())
    )


@pytest.mark.parametrize("on_coarse_grid", [False, True])
def test_streamed_logits_give_what_logits_in_memory_give(
    folders, tmp_path, monkeypatch, on_coarse_grid
):
    options = [
        "--set",
        "mean_field.filter=truncated",
        "--device",
        "cpu",
        *(["--resample"] if on_coarse_grid else []),
    ]
    drawn = save_nifti(tmp_path / "drawn.nii.gz", draw(3) + OTHER)
    if on_coarse_grid:
        scores = np.moveaxis(folders.scores("a"), 0, -1)[::2, ::2]
        save_nifti(folders.logits / "a.nii.gz", scores, AFFINE @ np.diag([2.0, 2.0, 1.0, 1.0]))
    refine_a(folders, drawn, options=options)
    in_memory = load_nifti(tmp_path / "a.nii.gz")
    set_streaming(monkeypatch)
    streamed = refine_a(folders, drawn, options=[*options, "-v"])
    assert re.search("(are|is) taken as logits", streamed.stderr)
    np.testing.assert_array_equal(load_nifti(tmp_path / "a.nii.gz"), in_memory)
    assert (in_memory == 3).sum() > 4


def test_strokes_of_another_grid_are_refused(folders, tmp_path):
    path = save_nifti(
        tmp_path / "drawn.nii.gz", draw()[::2], AFFINE @ np.diag([2.0, 1.0, 1.0, 1.0])
    )
    for options in ((), ("--resample",)):
        assert (
            "strokes are not resampled" in refine_a(folders, path, options=options, status=1).stderr
        )


def test_strokes_need_a_network_and_a_case(folders, tmp_path):
    path = save_nifti(tmp_path / "strokes" / "d.nii.gz", draw())
    expected = "strokes of no case; expected names such as a.nii.gz; the cases are a, b, c"
    assert expected in infer(folders, "--strokes", path.parent, status=1).stderr
    save_nifti(path.parent / "a.nii.gz", draw())
    assert "d: strokes of no case" in infer(folders, "--strokes", path.parent, status=1).stderr
    images = ("-i", folders.images, "-o", folders.output)
    assert "--logits" in run_here("infer", *images, "--strokes", path.parent, status=2).stderr


def test_convert_makes_strokes_of_another_convention(folders, tmp_path):
    scribbles = np.where(draw() == 0, 4, draw())
    scribbles[OTHER > 0] = 0
    path = save_nifti(tmp_path / "drawn.nii.gz", scribbles)
    assert "crfrefine convert --map OLD=NEW" in refine_a(folders, path, status=1).stderr
    converted = tmp_path / "strokes.nii.gz"
    run_here("convert", path, converted, "--map", "0=255", "--map", "4=0", status=0)
    refine_a(folders, converted)
    np.testing.assert_array_equal(
        load_nifti(tmp_path / "a.nii.gz"), refined(folders, "a", strokes=draw() + OTHER)
    )


@pytest.fixture
def manifest(folders, tmp_path):
    """The cases of the folders under names of their own, beside a manifest that is not in the
    current folder.
    """
    archive = tmp_path / "archive"
    rows = ["case,images,logits,output"]
    for number, name in enumerate("abc"):
        (archive / "net" / str(number)).mkdir(parents=True)
        images = [f"{channel} of {number}.nii.gz" for channel in ("t1", "flair")]
        for modality, image in enumerate(images):
            shutil.copy(folders.images / f"{name}_{modality:04d}.nii.gz", archive / image)
        shutil.copy(
            folders.logits / f"{name}.nii.gz", archive / "net" / str(number) / "output.nii.gz"
        )
        output = "sub/second.nii.gz" if name == "b" else ""
        rows.append(f"{name},{';'.join(images)},net/{number}/output.nii.gz,{output}")
    (archive / "cases.csv").write_text("\n".join([*rows, ""]))
    return archive / "cases.csv"


def test_results_are_those_of_a_folder_run(folders, manifest, tmp_path):
    assert infer(folders).status == 0
    output = tmp_path / "by manifest"
    run_here(
        "infer", "--manifest", manifest, "-o", output, "--save-logits", "--preview", *FAST, status=0
    )
    assert files_in(output) == [
        *(f"{name}{end}" for name in "ac" for end in (".nii.gz", "_logits.nii.gz", "_preview.png")),
        "sub",
    ]
    assert files_in(output / "sub") == [
        "second.nii.gz",
        "second_logits.nii.gz",
        "second_preview.png",
    ]
    for name, path in (("a", "a.nii.gz"), ("b", "sub/second.nii.gz"), ("c", "c.nii.gz")):
        assert (output / path).read_bytes() == (folders.output / f"{name}.nii.gz").read_bytes()


def test_parts_continue_and_status_work_with_it(manifest, tmp_path, monkeypatch):
    monkeypatch.chdir(manifest.parent)
    arguments = ("infer", "--manifest", "cases.csv", "-o", "../out", *FAST)
    for part_id in range(2):
        run_here(*arguments, "--num-parts", 2, "--part-id", part_id, status=0)
    run_here("status", "../out", status=0)
    (tmp_path / "out" / "sub" / "second.nii.gz").unlink()
    result = run_here("status", "../out", "--json", status=1)
    (folder,) = json.loads(result.stdout)["folders"]
    assert [case["state"] for case in folder["cases"]] == ["done", "missing", "done"]
    assert statuses(run_here(*arguments, "--continue", "--num-parts", 2, "--part-id", 1)) == [
        ("b", "done")
    ]
    run_here("status", "../out", status=0)


def test_spacing_and_mask_are_per_case_and_the_output_keeps_the_image_s_grid(
    manifest, folders, tmp_path
):
    """Twice as thick slices as in the header: other distances, other results. Masks of the other
    cases are `-m nonzero`.
    """
    mask = np.zeros(GRID_SHAPE, np.uint8)
    mask[3:16, 2:13] = 1
    save_nifti(manifest.parent / "mask.nii.gz", mask)
    head, case, *others = manifest.read_text().splitlines()
    manifest.write_text(
        "\n".join(
            [
                f"{head},spacing,mask",
                f"{case},1;1.25;5,mask.nii.gz",
                *(f"{line},," for line in others),
            ]
        )
    )
    strong = {"bilateral.weight": 30, "bilateral.theta_alpha": 3}
    settings = []
    for key, value in strong.items():
        settings += ["--set", f"{key}={value}"]
    arguments = (
        "-o",
        tmp_path / "out",
        "-m",
        "nonzero",
        "--summary",
        tmp_path / "s.json",
        *FAST,
        *settings,
    )
    run_here("infer", "--manifest", manifest, *arguments, status=0)
    first, second, _ = json.loads((tmp_path / "s.json").read_text())["cases"]
    assert (first["spacing"], second["spacing"]) == ([1.0, 1.25, 5.0], [1.0, 1.25, 2.5])
    note = "t1 of 0.nii.gz: spacing 1×1.25×5 mm as given, in place of 1×1.25×2.5 mm"
    assert note in [told["text"] for told in first["notes"]]
    assert first["num_voxels_in_mask"] == mask.sum()
    assert second["num_voxels_in_mask"] == (folders.image("b") != 0).any(axis=0).sum()
    by_spacing = [
        refined(folders, "a", strong, spacing=(1, 1.25, step), mask=mask.astype(bool))
        for step in (5, 2.5)
    ]
    assert (by_spacing[0] != by_spacing[1]).any(), "the spacing makes no difference here"
    np.testing.assert_array_equal(load_nifti(tmp_path / "out" / "a.nii.gz"), by_spacing[0])
    np.testing.assert_allclose(nib.load(tmp_path / "out" / "a.nii.gz").affine, AFFINE)


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        (
            "sub/../a.nii.gz",
            (),
            "out/a.nii.gz: an output of the case 'a' and of 'b'; choose another output for one of "
            "them",
        ),
        ("a.mha", ("--preview",), "out/a_preview.png: an output of the case 'a' and of 'b'"),
        ("a.mha", ("--save-structures",), "out/a: an output of the case 'a' and of 'b'"),
        (
            "a_logits.nii.gz",
            ("--save-logits",),
            "out/a_logits.nii.gz: an output of the case 'a' and of 'b'",
        ),
        ("{archive}/t1 of 0.nii.gz", (), "t1 of 0.nii.gz: would replace an input"),
        ("{archive}/../link/t1 of 0.nii.gz", (), "would replace an input"),
    ],
)
def test_cases_share_no_output_and_replace_no_input(manifest, tmp_path, output, options, message):
    """Those of other parts of a job array, too."""
    (tmp_path / "link").symlink_to("archive")
    manifest.write_text(
        manifest.read_text().replace("sub/second.nii.gz", output.format(archive=manifest.parent))
    )
    arguments = (
        "infer",
        "--manifest",
        manifest,
        "-o",
        tmp_path / "out",
        *options,
        "--num-parts",
        2,
        "--part-id",
        0,
    )
    assert message in run_here(*arguments, status=1).stderr
    assert not (tmp_path / "out").exists()
