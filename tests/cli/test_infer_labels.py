"""`infer` on label maps and on one binary file per structure, as users run it."""

import json

import nibabel as nib
import numpy as np
import pytest
from cli_helpers import (
    AFFINE,
    FAST,
    GRID_SHAPE,
    SPACING,
    Folders,
    errors,
    files_in,
    load_nifti,
    run_here,
    save_nifti,
    statuses,
    write_folders,
)

import crfrefine
from crfrefine import io
from crfrefine.arrays.label_maps import ABSENT_LOGIT
from crfrefine.demo.phantom import make_phantom

AS_LABELS = ("--input-type", "labels", "--save-structures")
STRENGTH = {
    "mean_field.filter": "lattice",
    "bilateral.theta_alpha": 3.0,
    "bilateral.theta_beta": 0.1,
}


def network_labels(seed):
    return make_phantom(seed, GRID_SHAPE, SPACING).logits.argmax(axis=0).astype(np.uint8)


def settings(changes):
    words = []
    for key, value in changes.items():
        words += ["--set", f"{key}={value}"]
    return words


def from_labels(labels, image, changes, **options):
    """What the public function gives for a label map."""
    parameters = crfrefine.CrfParameters().replace(**changes)
    options = {"spacing": SPACING, "parameters": parameters, "input_type": "labels", **options}
    return crfrefine.refine(np.asfortranarray(labels), image, **options)


@pytest.fixture
def maps(tmp_path):
    folders = write_folders(tmp_path, "a", "b")
    for seed, case_id in enumerate("ab"):
        save_nifti(tmp_path / "maps" / f"{case_id}.nii.gz", 10 * network_labels(seed))
    return folders._replace(logits=tmp_path / "maps")


@pytest.fixture
def structures(maps):
    """The same as one file per structure and case; b lacks one, and has one that a lacks."""
    root = maps.output.with_name("structures")
    for seed, case_id in enumerate("ab"):
        for label, name in enumerate(("aorta", "kidney", "liver"), 1):
            save_nifti(
                root / case_id / f"{name}.nii.gz", (network_labels(seed) == label).astype(np.uint8)
            )
    (root / "b" / "liver.nii.gz").rename(root / "b" / "spleen.nii.gz")
    return maps._replace(logits=root)


def save_nifti_with_table(path, labels, names):
    """A label map with the table of names and colors of TotalSegmentator, behind an extension that
    is none of it.
    """
    colors = f'Red="1.0" Green="{128 / 255}" Blue="0.0" Alpha="1"'
    entries = "\n".join(
        f'<Label Key="{label}" {colors}><![CDATA[{name}]]></Label>' for label, name in names.items()
    )
    text = (
        '<?xml version="1.0" encoding="UTF-8"?> <CaretExtension>  '
        "<Date><![CDATA[2013-07-14T05:45:09]]></Date>   "
        f'<VolumeInformation Index="0">   <LabelTable>\n{entries}\n  </LabelTable>  '
        "<VolumeType><![CDATA[Label]]></VolumeType>   </VolumeInformation>"
        "</CaretExtension>\n              "
    )
    image = nib.Nifti1Image(labels, AFFINE)
    for code, content in ((6, b"a comment"), (0, text.encode())):
        image.header.extensions.append(nib.nifti1.Nifti1Extension(code, content))
    nib.save(image, path)


def infer(folders, *options, status=None):
    return run_here("infer", *folders.arguments, *settings(STRENGTH), *options, status=status)


def test_structures_become_a_label_map_with_names(structures):
    summary = structures.output.with_name("summary.json")
    result = infer(structures, *AS_LABELS, "--summary", summary, status=0)
    numbers = {"aorta": 1, "kidney": 2, "liver": 3, "spleen": 4}
    assert json.loads((structures.output / "dataset.json").read_text()) == {
        "labels": {"background": 0, **numbers}
    }
    image = make_phantom(1, GRID_SHAPE, SPACING).image.astype(np.int16)
    expected = from_labels(np.array([0, 1, 2, 4])[network_labels(1)], image, STRENGTH).label_map
    np.testing.assert_array_equal(load_nifti(structures.output / "b.nii.gz"), expected)
    assert files_in(structures.output) == ["a", "a.nii.gz", "b", "b.nii.gz", "dataset.json"]
    assert files_in(structures.output / "b") == ["aorta.nii.gz", "kidney.nii.gz", "spleen.nii.gz"]
    for name in ("aorta", "kidney", "spleen"):
        written = load_nifti(structures.output / "b" / f"{name}.nii.gz")
        np.testing.assert_array_equal(written, expected == numbers[name])
        assert written.dtype == np.uint8
    content = json.loads(summary.read_text())
    assert content["label_names"] == {str(number): name for name, number in numbers.items()}
    assert content["cases"][1]["structures"] == str(structures.output / "b")
    (structures.output / "b" / "kidney.nii.gz").unlink()
    assert statuses(infer(structures, *AS_LABELS, "--continue")) == [
        ("a", "skipped"),
        ("b", "done"),
    ]
    assert "kidney.nii.gz" in files_in(structures.output / "b")
    (structures.output / "dataset.json").write_text('{"labels": {"background": 0, "tumor": 1}}')
    result = infer(structures, *AS_LABELS, status=1)
    assert "dataset.json: has other labels than the 4 structures of this run" in result.stderr


def test_names_in_the_header_reach_notes_previews_and_the_refined_map(maps):
    """Names with the marks of XML and colors come back; 30 has no name, and 77 has no voxel."""
    table = {10: "lung & <trachea>", 20: "Niere ß", 77: "absent"}
    options = (
        "--save-structures",
        "--preview",
        *settings({"bilateral.theta_alpha": 40, "bilateral.weight": 500}),
    )
    plain = maps._replace(output=maps.output.with_name("plain"))
    infer(plain, *options, status=0)
    for seed, case_id in enumerate("ab"):
        save_nifti_with_table(maps.logits / f"{case_id}.nii.gz", 10 * network_labels(seed), table)
    told = infer(maps, *options, status=0).stderr
    assert "lung & <trachea> (" in told
    assert "10 (" not in told
    before = io.read_header(maps.logits / "a.nii.gz")
    after = io.read_header(maps.output / "a.nii.gz")
    assert after.segments == before.segments
    assert [(segment.label, segment.name) for segment in after.segments] == list(table.items())
    np.testing.assert_array_equal(
        load_nifti(plain.output / "a.nii.gz"), load_nifti(maps.output / "a.nii.gz")
    )
    assert (plain.output / "a_preview.png").read_bytes() != (
        maps.output / "a_preview.png"
    ).read_bytes()
    (structure,) = io.read_header(maps.output / "a" / "absent.nii.gz").segments
    assert (structure.label, structure.name) == (1, "absent")
    described = run_here("info", "-v", maps.output / "a.nii.gz", status=0).stdout
    assert "labels        10 lung & <trachea>, 20 Niere ß, 77 absent" in described


def test_results_are_not_written_among_the_structures(structures):
    """The next run would take label maps there for the input."""
    before = {path: path.read_bytes() for path in structures.logits.rglob("*.nii.gz")}
    for options, told in (
        (AS_LABELS, "would replace an input"),
        (AS_LABELS[:2], "choose another folder for the results"),
    ):
        result = infer(structures._replace(output=structures.logits), *options, status=1)
        assert told in result.stderr
        assert {path: path.read_bytes() for path in structures.logits.rglob("*.nii.gz")} == before


# ---- Many labels

SHAPE = (35, 26, 19)
NUMBERS = np.array([0, *range(2, 42, 2)])
NARROW = {
    "bilateral.theta_alpha": 1.5,
    "bilateral.theta_beta": 0.05,
    "mean_field.filter": "truncated",
}


def test_every_output_is_that_of_refine(tmp_path):
    """Inside of a mask, with the labels that are declared: blocks of labels with wrong voxels, and
    an image of them.
    """
    rng = np.random.default_rng(0)
    coarse = NUMBERS[rng.integers(0, len(NUMBERS), (4, 3, 2))]
    coarse.flat[: len(NUMBERS)] = NUMBERS
    true = coarse.repeat(10, 0).repeat(10, 1).repeat(10, 2)[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    labels = np.where(rng.random(SHAPE) < 0.06, np.roll(true, 1, axis=0), true).astype(np.uint8)
    image = (100 * true + rng.normal(0, 30, SHAPE)).astype(np.int16)
    mask = np.zeros(SHAPE, np.uint8)
    mask[4:30, :20] = 1
    folders = Folders(tmp_path / "images", tmp_path / "maps", tmp_path / "out")
    for folder, name, values in (
        (folders.images, "a_0000", image),
        (folders.logits, "a", labels),
        (tmp_path / "masks", "a", mask),
    ):
        save_nifti(folder / f"{name}.nii.gz", values)
    names = {"background": 0, **{f"part {label}": int(label) for label in range(1, 45)}}
    (folders.logits / "dataset.json").write_text(json.dumps({"labels": names}))
    summary = tmp_path / "summary.json"
    kinds = (
        "--save-probabilities",
        "--save-logits",
        "--summary",
        summary,
        "-m",
        tmp_path / "masks",
    )
    result = run_here("infer", *folders.arguments, *settings(NARROW), *kinds, status=0)
    assert result.stderr.count("a.nii.gz is taken as a label map") == 1
    expected = from_labels(labels, image, NARROW, mask=mask.astype(bool))
    np.testing.assert_array_equal(load_nifti(folders.output / "a.nii.gz"), expected.label_map)
    np.testing.assert_array_equal(expected.label_map[mask == 0], labels[mask == 0])
    probabilities, logits = (
        np.moveaxis(load_nifti(folders.output / f"a_{kind}.nii.gz"), -1, 0)
        for kind in ("probabilities", "logits")
    )
    np.testing.assert_allclose(probabilities[NUMBERS], expected.marginals, atol=2e-5)
    np.testing.assert_array_equal(NUMBERS[logits[NUMBERS].argmax(axis=0)], expected.label_map)
    missing = np.setdiff1d(range(45), NUMBERS)
    assert (probabilities[missing] == 0).all()
    assert (logits[missing] == ABSENT_LOGIT).all()
    (record,) = json.loads(summary.read_text())["cases"]
    assert (record["input_type"], record["num_labels"], record["num_modalities"]) == (
        "labels",
        45,
        1,
    )
    assert record["voxels_changed"] == expected.changes.voxels_changed > 20
    assert record["voxels_before"][:41] == list(expected.changes.voxels_before)


def test_kernels_narrower_than_the_voxels_get_a_note(maps):
    for changes, advice in (
        (
            {"bilateral.theta_alpha": 0.55},
            "0.55 voxels; --set bilateral.theta_alpha=1.5 (mm) makes it 1.5",
        ),
        (
            {"bilateral.theta_alpha": [0.5, 0.5, 1.55]},
            None,
        ),  # wide enough along the third axis alone
        (
            {"bilateral.weight": 0, "spatial.weight": 0.2, "spatial.theta_gamma": 0.4},
            "--set spatial.theta_gamma=1.5 (mm)",
        ),
    ):
        told = infer(maps, *settings(changes), status=0).stderr
        assert told.count("kernels are narrower than the voxels") == (advice is not None), (
            "one for all cases"
        )
        assert advice is None or advice in told


def test_a_map_of_a_coarse_network(tmp_path):
    """From its blocks, and from numbers in the order of the file's axes; the preset is `sharp`
    unless another one is named.
    """
    shape = (54, 42, 21)
    phantom = make_phantom(0, shape, SPACING)
    labels = phantom.logits.argmax(axis=0).astype(np.uint8)
    intensities = phantom.image[0].astype(np.int16)
    for axis, factor in enumerate((3, 2, 1)):
        labels = (
            labels.take(np.arange(0, shape[axis], factor), axis)
            .repeat(factor, axis)
            .take(np.arange(shape[axis]), axis)
        )
    image = save_nifti(tmp_path / "ct.nii.gz", intensities)
    network = save_nifti(tmp_path / "fast.nii.gz", labels)
    spacing = tuple(step * factor for step, factor in zip(SPACING, (3, 2, 1), strict=True))
    expected = from_labels(labels, intensities, {}, parameters=None, network_spacing=spacing)

    def infer(*options):
        return run_here(
            "infer", "-i", image, "-p", network, "-o", tmp_path / "out.nii.gz", *options
        )

    given = infer("--input-type", "labels", "--network-spacing", ",".join(map(str, spacing)))
    assert given.status == 0, given.stderr
    assert (
        "parameters are those of the preset sharp, since --network-spacing is given without -c"
        in given.stderr
    )
    np.testing.assert_array_equal(load_nifti(tmp_path / "out.nii.gz"), expected.label_map)
    assert (expected.label_map != labels).any()
    (tmp_path / "out.nii.gz").unlink()
    infer("--network-spacing", "auto")  # which only label maps have
    np.testing.assert_array_equal(load_nifti(tmp_path / "out.nii.gz"), expected.label_map)
    infer(
        "--input-type",
        "labels",
        "--network-spacing",
        "auto",
        "-c",
        "sharp",
        "--set",
        "volume.match_input=false",
    )
    assert (load_nifti(tmp_path / "out.nii.gz") != expected.label_map).any()
    for options, message in (
        (
            ("--input-type", "logits", "--network-spacing", "3"),
            "it is that of label maps, and --input-type logits reads scores",
        ),
        (
            ("--input-type", "labels", "--network-spacing", "3mm"),
            "expected mm, such as 3 or 1.5,1.5,3 (x, y, z), or auto; got '3mm'",
        ),
        (
            ("--input-type", "labels", "-c", "sharp"),
            "expected their size: --input-type labels --network-spacing MM",
        ),
    ):
        failed = infer(*options)
        assert failed.status, options
        assert message in failed.stderr


def test_a_folder_may_hold_images_as_coarse_as_the_network(tmp_path):
    for seed, case_id in enumerate(("coarse", "fine")):
        phantom = make_phantom(seed, (39, 36, 24), SPACING)
        labels = phantom.logits.argmax(axis=0).astype(np.uint8)
        if case_id == "fine":
            labels = labels[1::3, 1::3, ::2].repeat(3, 0).repeat(3, 1).repeat(2, 2)
        save_nifti(tmp_path / "images" / f"{case_id}_0000.nii.gz", phantom.image[0])
        save_nifti(tmp_path / "maps" / f"{case_id}.nii.gz", labels)
    folders = Folders(tmp_path / "images", tmp_path / "maps", tmp_path / "out")
    done = run_here("infer", *folders.arguments, "--network-spacing", "auto", status=0)
    assert "coarse: the label map has no blocks of a coarser grid" in done.stderr
    assert "fine: the label map is taken as that of a coarser network, found in it" in done.stderr


def test_a_map_on_the_coarse_grid_of_its_network(tmp_path):
    """With --resample, the spacing is that of the file, also where its axes are turned; the blocks
    need not be found.
    """
    phantom = make_phantom(0, GRID_SHAPE, SPACING)
    inner = tuple(slice(0, extent // 2 * 2) for extent in GRID_SHAPE)
    small = phantom.logits.argmax(axis=0).astype(np.uint8)[inner][::2, ::2]
    intensities = phantom.image[0].astype(np.int16)[inner]
    affine = AFFINE @ np.diag([2.0, 2.0, 1.0, 1.0])
    affine[:3, 3] += 0.5 * (AFFINE[:3, 0] + AFFINE[:3, 1])
    image = save_nifti(tmp_path / "ct.nii.gz", intensities)
    network = save_nifti(
        tmp_path / "fast.nii.gz",
        np.ascontiguousarray(small.swapaxes(0, 1)),
        affine[:, [1, 0, 2, 3]],
    )
    placed = small.repeat(2, 0).repeat(2, 1)
    spacing = (2 * SPACING[0], 2 * SPACING[1], SPACING[2])
    expected = from_labels(placed, intensities, {}, parameters=None, network_spacing=spacing)
    options = ("--input-type", "labels", "--resample", "--network-spacing", "auto")
    found = run_here(
        "infer", "-i", image, "-p", network, "-o", tmp_path / "out.nii.gz", *options, status=0
    )
    assert "coarser network: 2 x 2 x 1 voxels of the image" in found.stderr
    np.testing.assert_array_equal(load_nifti(tmp_path / "out.nii.gz"), expected.label_map)


# ---- Rules for small objects that would take structures away

VOXEL_ML = float(np.prod(SPACING)) / 1000
ORGANS = {"background": 0, "liver": 3, "spleen": 5, "left kidney": 9}
FOREGROUND = "postprocess.keep_largest=foreground"
STILL = ("--set", "bilateral.weight=0", *FAST)


@pytest.fixture
def organs(tmp_path):
    """Label maps: in a the organs are apart, in b they touch."""
    folders = Folders(tmp_path / "images", tmp_path / "maps", tmp_path / "out")
    for case_id, gap in (("a", 2), ("b", 0)):
        labels = np.zeros((18, 15, 11), np.uint8)
        labels[1:8, 2:13, 1:9] = 3
        labels[8 + gap : 13 + gap, 2:7, 2:6] = 5
        labels[8 + gap : 11 + gap, 7 + gap : 12 + gap, 2:6] = 9
        image = np.random.default_rng(3).normal(10.0 * labels, 2.0)
        save_nifti(folders.logits / f"{case_id}.nii.gz", labels)
        save_nifti(folders.images / f"{case_id}_0000.nii.gz", image.astype(np.int16))
    (folders.logits / "dataset.json").write_text(json.dumps({"labels": ORGANS}))
    crfrefine.CrfParameters().replace(**{"postprocess.keep_largest": "foreground"}).save(
        tmp_path / "own.toml"
    )
    return folders


def infer_still(folders, *options, status=None):
    return run_here(
        "infer", *folders.arguments, "--input-type", "labels", *STILL, *options, status=status
    )


def test_a_rule_of_a_file_that_empties_structures_is_an_error_of_its_case(organs):
    summary = organs.output.with_name("summary.json")
    result = infer_still(
        organs, "-c", organs.output.with_name("own.toml"), "--summary", summary, status=1
    )
    assert statuses(result) == [("a", "failed"), ("b", "done")]
    assert [path.name for path in organs.output.glob("*.nii.gz")] == ["b.nii.gz"]
    message = (
        "case 'a': postprocess.keep_largest = 'foreground' would remove more than 10% of 2 "
        "structures: "
        f"spleen 100 → 0 voxels ({100 * VOXEL_ML:.3g} → 0 ml), left kidney 60 → 0 voxels "
        f"({60 * VOXEL_ML:.3g} → 0 ml)"
    )
    assert message in errors(result.stderr)[0]
    assert (
        "Switch it off (postprocess.keep_largest = none), or allow it: --allow-vanishing"
        in result.stderr
    )
    failed, done = json.loads(summary.read_text())["cases"]
    assert (failed["status"], failed["output"], done["voxels_removed"]) == ("failed", None, 0)
    assert message.removeprefix("case 'a': ") in failed["error"]


def test_what_is_wanted_is_done_and_noted_with_names(organs):
    """A rule that is set on the command line is wanted, too."""
    own = ("-c", organs.output.with_name("own.toml"))
    rule = "postprocess.keep_largest = 'foreground'"
    for options in ((*own, "--allow-vanishing"), ("--set", FOREGROUND)):
        result = infer_still(organs, *options, status=0)
        assert set(np.unique(load_nifti(organs.output / "a.nii.gz"))) == {0, 3}
        removed = "a: structures that rules of [postprocess] removed, in whole or by more than 10%"
        assert f"{removed}, by {rule}: spleen 100" in result.stderr
        assert (
            "a: labels that vanished: spleen (100 voxels), left kidney (60 voxels)\n"
            in result.stderr
        )
        assert "b: structures" not in result.stderr
    own += ("--set", "postprocess.min_component_ml=0.001")
    assert (
        f"{rule} and postprocess.min_component_ml = 0.001 would remove"
        in infer_still(organs, *own, status=1).stderr
    )
    infer_still(organs, *own, "--set", FOREGROUND, status=0)


def test_the_file_of_a_label_that_vanished_is_empty(maps):
    """An earlier file of it, of whatever origin, would pass for a result."""
    for path in maps.logits.iterdir():
        labels = load_nifti(path)
        labels[0, 0, 0] = 7
        save_nifti(path, labels)
    earlier = maps.output / "a" / "Label_7.nii.gz"
    save_nifti(earlier, np.ones(GRID_SHAPE, np.uint8))
    options = ("--set", "postprocess.min_component_ml=0.01", "--allow-vanishing")
    result = run_here("infer", *maps.arguments, *FAST, *AS_LABELS, *options, status=0)
    assert "a: labels that vanished: 7 (1 voxel)" in result.stderr
    assert not load_nifti(earlier).any()
    assert not load_nifti(maps.output / "b" / "Label_7.nii.gz").any()
