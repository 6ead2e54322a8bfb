"""Labels are matched by their names where both sides have names, and by numbers elsewhere."""

import json

import numpy as np
import pytest
from cli_helpers import GRID_SHAPE, load_nifti, run_here, save_nifti, write_folders
from evaluation_helpers import read_metrics, write_study
from training_helpers import cases_in, write_cases

from crfrefine import io
from crfrefine.base.notes import NoteKind
from crfrefine.cases.label_names import LabelNames, normalized, tells
from crfrefine.demo.phantom import make_phantom
from crfrefine.errors import InputError
from crfrefine.io.volume import Segment
from crfrefine.train.dataset import read_labeled

NAMES = LabelNames.of({0: "background", 1: "liver", 2: "Left kidney", 5: "tumor"}, "dataset.json")
SWAPPED = np.array([0, 2, 1, 3], np.uint8)


def describe(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    labels = dict(zip(("background", *names), range(9), strict=False))
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


def name_labels(path, names, table=(0, 1, 2, 3, 4)):
    """Write a label map again, as a segmentation with names, and with the numbers of a table."""
    volume = io.read_labels(path)
    labels = np.array(table, np.uint8)[volume.data]
    segments = [Segment(number, name) for number, name in names.items()]
    path.unlink()
    target = path.parent / f"{io.paths.stem_of(path)}.seg.nrrd"
    io.write_label_map(target, labels, volume.header, segments=segments)


@pytest.mark.parametrize(
    ("one", "other"),
    [("Left_Kidney", "left kidney"), ("GTV-T", "gtv  t"), ("Ko\u0308rper", "K\u00f6rper")],
)
def test_names_are_compared_without_case_separators_and_forms_of_letters(one, other):
    assert normalized(one) == normalized(other)
    assert normalized(one) != normalized(one + "2")


def test_numbers_of_programs_are_no_names():
    for name in ("Segment_1", "Label 2", "3", "", "class-4", "Segmentation"):
        assert not tells(name)
    for name in ("T1", "segment 4a", "3rd ventricle", "left label"):
        assert tells(name)


@pytest.mark.parametrize(
    ("names", "present", "moved"),
    [
        ({1: "tumor", 2: "LIVER", 3: "left-kidney"}, (1, 2, 3), {1: 5, 2: 1, 3: 2}),
        ({1: "liver", 2: "left kidney"}, (1, 2), {}),
        ({1: "Segment_1", 2: "Segment_2"}, (1, 2), {}),
        ({1: "tumor", 2: "cyst"}, (1,), {1: 5}),  # A cyst does not occur.
        ({1: "liver", 7: "cyst"}, (1, 7), {}),  # The run has no label 7.
        ({3: "background", 1: "liver"}, (1, 3), {3: 0}),
    ],
)
def test_a_name_has_the_number_of_the_run(tmp_path, names, present, moved):
    assert NAMES.match(tmp_path, names, present) == moved


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({1: "liver", 2: "lesion"}, "label 2 is named 'lesion', but 'Left kidney' in dataset.json"),
        ({1: "liver", 3: "Liver"}, "labels 1 and 3 are both named 'Liver'"),
        ({1: "tumor"}, "which is label 5 of dataset.json, but the file also has a label 5"),
    ],
)
def test_names_that_contradict_are_an_error(tmp_path, names, message):
    with pytest.raises(InputError) as error:
        NAMES.match(tmp_path, names, (1, 2, 3, 5))
    assert message in str(error.value)


def test_evaluate_matches_names_of_files_that_are_numbered_otherwise(tmp_path):
    """Numbers are those of dataset.json, whatever the order of segments; a name is a label's."""
    study = write_study(tmp_path, 3)
    run_here(*study.arguments, status=0)
    expected = read_metrics(study.output)
    describe(study.after, "liver", "left kidney")
    describe(study.before, "left kidney", "liver")
    for path in study.before.glob("*.nii.gz"):
        save_nifti(path, SWAPPED[load_nifti(path)], io.read_header(path).affine)
    for number, path in enumerate(sorted(study.labels.glob("*.nii.gz"))):
        if number == 1:
            name_labels(path, {1: "Left_Kidney", 2: "Liver"}, SWAPPED)
        else:
            name_labels(path, {1: "Liver", 2: "Left_Kidney"})
    done = run_here(*study.arguments, status=0)
    assert "reference: case1.seg.nrrd: labels are matched by name" in done.stderr
    found = read_metrics(study.output)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5, nan_ok=True)


def test_a_perfect_prediction_has_dice_1_with_segments_on_both_sides(tmp_path):
    study = write_study(tmp_path, 2)
    for path in sorted(study.labels.glob("*.nii.gz")):
        (study.after / path.name).write_bytes(path.read_bytes())
        name_labels(study.after / path.name, {1: "liver", 2: "kidney"})
        name_labels(path, {1: "kidney", 2: "liver"}, SWAPPED)
    run_here(*study.arguments, status=0)
    dice = {key: value for key, value in read_metrics(study.output).items() if key[2] == "dice"}
    assert {value for key, value in dice.items() if key[3] == "prediction"} == {1.0}


def test_one_side_without_names_is_compared_by_numbers_and_said_to_be(tmp_path):
    study = write_study(tmp_path, 2)
    for number, path in enumerate(sorted(study.labels.glob("*.nii.gz"))):
        names = {1: "kidney", 2: "liver"} if number else {1: "liver", 2: "kidney"}
        name_labels(path, names)
    done = run_here(*study.arguments, status=0)
    assert "'liver' is 1 in case0, 2 in case1" in done.stderr


def test_predictions_numbered_file_by_file_need_names_in_the_references(tmp_path):
    study = write_study(tmp_path, 2)
    for number, path in enumerate(sorted(study.after.glob("*.nii.gz"))):
        names = {1: "kidney", 2: "liver"} if number else {1: "liver", 2: "kidney"}
        name_labels(path, names, SWAPPED if number else (0, 1, 2))
    done = run_here(*study.arguments, status=0)
    assert "names of labels of prediction have other numbers from file to file" in done.stderr
    assert "'liver' is 1 in case0, 2 in case1" in done.stderr
    describe(study.labels, "liver", "kidney")
    done = run_here(*study.arguments, status=0)
    assert "from file to file" not in done.stderr


def test_a_method_without_names_is_said_to_have_numbers_of_one_reference(tmp_path):
    study = write_study(tmp_path, 2)
    for number, path in enumerate(sorted(study.labels.glob("*.nii.gz"))):
        (study.after / path.name).write_bytes(path.read_bytes())
        name_labels(study.after / path.name, {1: "liver", 2: "kidney"})
        names = {1: "kidney", 2: "liver"} if number else {1: "liver", 2: "kidney"}
        name_labels(path, names, SWAPPED if number else (0, 1, 2))
    done = run_here(*study.arguments, status=0)
    assert "before has no names of labels" in done.stderr
    assert "its numbers are taken for those of" in done.stderr
    describe(study.before, "liver", "kidney")
    assert "has no names" not in run_here(*study.arguments, status=0).stderr


def test_labels_with_other_names_at_the_place_of_a_structure_are_told_by_name(tmp_path):
    """No number of `--map` could make them one, as names come with the numbers."""
    study = write_study(tmp_path, 1)
    path = study.labels / "case0.nii.gz"
    describe(study.after, "kidney", "hepar")
    (study.after / "case0.nii.gz").write_bytes(path.read_bytes())
    save_nifti(path, np.array([0, 1, 3], np.uint8)[load_nifti(path)], io.read_header(path).affine)
    name_labels(path, {1: "kidney", 3: "liver"})
    done = run_here(*study.arguments, status=0)
    assert "label 2 (hepar) is at 100% of the voxels of label 3 (liver)" in done.stderr
    assert "give them the same names" in done.stderr


def test_names_that_contradict_fail_their_case_unless_a_map_says_what_the_number_is(tmp_path):
    study = write_study(tmp_path, 2)
    describe(study.after, "liver", "kidney")
    for path in sorted(study.labels.glob("*.nii.gz"))[:1]:
        name_labels(path, {1: "liver", 2: "lesion"})
    done = run_here(*study.arguments, status=1)
    assert "label 2 is named 'lesion', but 'kidney' in the dataset.json of" in done.stderr
    assert "--map reference:2=2" in done.stderr
    assert [case["status"] for case in study.summary()["cases"]] == ["failed", "measured"]
    run_here(*study.arguments, "--map", "reference:2=2", status=0)


def test_infer_gives_a_label_map_the_numbers_of_its_names(tmp_path):
    folders = write_folders(tmp_path, "a")
    labels = make_phantom(0, GRID_SHAPE, (1, 1, 1)).logits.argmax(axis=0).astype(np.uint8)
    path = folders.logits / "a.nii.gz"
    save_nifti(path, labels)
    describe(folders.logits, "shell", "core", "cyst")
    options = ("--input-type", "labels", "--set", "mean_field.num_iterations=1")
    run_here("infer", *folders.arguments, *options, status=0)
    expected = io.read_labels(folders.output / "a.nii.gz").data
    name_labels(path, {1: "core", 2: "shell", 3: "cyst"}, SWAPPED)
    done = run_here("infer", *folders.arguments, *options, status=0)
    assert "'core' is 2 there and 1 here" in done.stderr
    np.testing.assert_array_equal(io.read_labels(folders.output / "a.nii.gz").data, expected)


def test_training_reads_references_with_the_numbers_of_their_names(tmp_path):
    folder = write_cases(tmp_path, 2)
    plain = read_labeled((cases := cases_in(folder)).files[1], cases, threads=1).labels
    describe(folder / "logits", "shell", "core", "cyst")
    path = folder / "labels" / "case1.nii.gz"
    name_labels(path, {1: "core", 2: "Shell", 3: "cyst"}, SWAPPED)
    cases = cases_in(folder)
    assert any(note.kind is NoteKind.MATCHED_BY_NAME_IN for note in cases.notes)
    np.testing.assert_array_equal(read_labeled(cases.files[1], cases, threads=1).labels, plain)


def test_training_refuses_references_whose_numbers_differ_without_names_of_channels(tmp_path):
    folder = write_cases(tmp_path, 2)
    name_labels(folder / "labels" / "case0.nii.gz", {1: "shell", 2: "core", 3: "cyst"})
    path = folder / "labels" / "case1.nii.gz"
    name_labels(path, {1: "core", 2: "Shell", 3: "cyst"}, SWAPPED)
    with pytest.raises(InputError, match=r"'Shell' is 1 in case0, 2 in case1"):
        cases_in(folder)
    describe(folder / "logits", "shell", "core", "cyst")
    assert cases_in(folder)
