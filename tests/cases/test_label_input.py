"""Label maps and structures in place of logits: which files, which labels, what is refused."""

import json

import numpy as np
import pytest
from cli_helpers import save_nifti
from data_sets import found_cases
from io_helpers import OBLIQUE, affine_of, numbers

from crfrefine.arrays.label_maps import ABSENT_LOGIT, CONFIDENCE
from crfrefine.cases import foreground
from crfrefine.cases.case import load_case
from crfrefine.cases.dataset_description import read_descriptions
from crfrefine.cases.reading_options import DeclaredLabels, ReadingOptions, declared_labels
from crfrefine.errors import GridMismatchError, InputError, UnsupportedFormatError
from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.evaluate.structures import pair_structures
from crfrefine.parameters.model import CrfParameters

SHAPE = (6, 5, 4)
AFFINE = affine_of((1.0, 1.5, 2.25), (3.0, -4.0, 5.0), OBLIQUE)
LABELS = numbers(SHAPE) % 3 * 5  # 0, 5, 10
MASKS = {
    "liver": np.zeros(SHAPE, np.uint8),
    "tumor": np.zeros(SHAPE, np.uint8),
    "empty": np.zeros(SHAPE, np.uint8),
}
MASKS["liver"][1:5, 1:4, 1:3] = 1
MASKS["tumor"][4:6, 2:4, 1:4] = 1


@pytest.fixture
def folder(tmp_path):
    for case_id in "ab":
        save_nifti(tmp_path / "images" / f"{case_id}_0000.nii.gz", numbers(SHAPE, seed=1), AFFINE)
        save_nifti(tmp_path / "maps" / f"{case_id}.nii.gz", LABELS.astype(np.uint8), AFFINE)
    for name, mask in MASKS.items():
        save_nifti(tmp_path / "structures" / "a" / f"{name}.nii.gz", mask, AFFINE)
    save_nifti(tmp_path / "structures" / "b" / "spleen.nii.gz", MASKS["liver"], AFFINE)
    return tmp_path


def read(folder, logits, images="images", **options):
    reading = ReadingOptions(**{"input_type": "labels", **options})
    cases = found_cases(folder / images, folder / logits, input_type=reading.input_type)
    return load_case(cases[0], reading)


def one_hot(labels, channels):
    return CONFIDENCE * np.stack([labels == channel for channel in channels])


def test_declared_labels_that_do_not_occur_are_far_below_and_others_are_an_error(folder):
    case = read(folder, "maps", declared=DeclaredLabels(tuple(range(12)), "dataset.json"))
    assert case.logits.shape == (12, *SHAPE)
    np.testing.assert_array_equal(case.logits[[0, 5, 10]], one_hot(LABELS, (0, 5, 10)))
    assert (np.delete(case.logits, [0, 5, 10], axis=0) == ABSENT_LOGIT).all()
    assert case.network.absent_labels == (1, 2, 3, 4, 6, 7, 8, 9, 11)
    with pytest.raises(
        InputError,
        match=r"(?s)maps/a\.nii\.gz: has labels that are not declared: 10\n.*0, 5 of study",
    ):
        read(folder, "maps", declared=DeclaredLabels((0, 5), "study/dataset.json"))


@pytest.mark.parametrize(
    ("content", "num_labels", "numbers_", "source"),
    [
        (
            {"labels": {"background": 0, "a": 10, "b": 52, "ignore": 53}},
            4,
            (0, 10, 52),
            "dataset.json",
        ),
        (
            {"labels": {"background": 0, "whole": [1, 2], "core": [2]}},
            None,
            (0, 1, 2),
            "dataset.json",
        ),
        (None, 4, (0, 1, 2, 3), "the parameters"),
    ],
)
def test_who_declares_labels(folder, content, num_labels, numbers_, source):
    assert declared_labels([], (), None) is None
    if content is not None:
        (folder / "dataset.json").write_text(json.dumps(content))
    parameters = None
    if num_labels is not None:
        parameters = CrfParameters().replace(**{"mean_field.bias": (0.5,) * num_labels})
    descriptions = list(read_descriptions([folder / "maps", folder / "images"]))
    declared = declared_labels([], descriptions, parameters)
    assert declared.numbers == numbers_
    assert source in declared.source


def test_beside_logits_the_input_type_decides(folder):
    """nnU-Net's CASE.nii.gz beside CASE.npz: logits win unless label maps are asked for.

    Among label maps, names with an ending win.
    """
    np.savez(
        folder / "maps" / "a.npz",
        logits=np.stack([LABELS, LABELS + 0.5]).transpose(0, 3, 2, 1).astype(np.float32),
    )
    assert [read(folder, "maps", input_type=kind).input_kind for kind in ("auto", "labels")] == [
        "logits",
        "labels",
    ]
    with pytest.raises(UnsupportedFormatError, match="npz"):
        found_cases(
            folder / "images" / "a_0000.nii.gz", folder / "maps" / "a.npz", input_type="labels"
        )
    save_nifti(folder / "maps" / "a_seg.nii.gz", (LABELS > 0).astype(np.uint8), AFFINE)
    cases = found_cases(folder / "images", folder / "maps", input_type="labels")
    assert ([case.network[0].name for case in cases], cases.notes) == (
        ["a_seg.nii.gz", "b.nii.gz"],
        [],
    )


def test_an_image_is_not_silently_taken_as_a_label_map(folder):
    shape = (12, 10, 8)
    values = np.arange(960, dtype=np.int16).reshape(shape)
    save_nifti(folder / "images" / "a_0000.nii.gz", values[::-1], AFFINE)
    save_nifti(folder / "maps" / "a.nii.gz", values, AFFINE)
    with pytest.raises(
        InputError,
        match=r"960 different ones, as in an image; .*For a label map, give --input-type labels",
    ):
        read(folder, "maps", input_type="auto")
    assert read(folder, "maps").network.num_labels == 960


def structures(folder, **options):
    cases = found_cases(folder / "images", folder / "structures", input_type="labels")
    declared = declared_labels(cases, (), None)
    return load_case(cases[0], ReadingOptions(input_type="labels", declared=declared, **options))


def merged(case):
    return case.logits.argmax(axis=0)


def test_where_structures_overlap_the_smallest_one_keeps_the_voxel(folder):
    tiny = np.zeros(SHAPE, np.uint8)
    tiny[4, 2, 1] = tiny[1, 1, 1] = 1  # in liver and tumor; in the liver alone
    save_nifti(folder / "structures" / "a" / "duct.nii.gz", tiny, AFFINE)
    case = structures(folder)
    np.testing.assert_array_equal(
        merged(case), np.where(tiny, 1, np.where(MASKS["tumor"], 5, np.where(MASKS["liver"], 3, 0)))
    )
    assert case.network.channels == (0, 1, 3, 5), "an empty structure costs nothing"
    num_shared = int((MASKS["liver"] + MASKS["tumor"] + tiny > 1).sum())
    assert str(case.notes[0]) == "a is taken as one file per structure: 4 files, 3 not empty"
    assert str(case.notes[1]).startswith(
        f"structures overlap, and the smaller one keeps the voxel: {num_shared} voxels"
    )


LIVER = MASKS["liver"]
AUTO = {"input_type": "auto"}
TWO = np.stack([LABELS, LABELS], -1)
ODD = "structure and image are on different grids"
MAP = "a.nii.gz"


@pytest.mark.parametrize(
    ("name", "values", "options", "message"),
    [
        (MAP, LABELS * 0.25, AUTO, r"a\.nii\.gz: not a label map: .*whole numbers.*-p BACKGROUND"),
        (MAP, LABELS * 0.995, AUTO, "expected whole numbers"),
        (MAP, LABELS * 0.995, {}, None),
        (MAP, LABELS - 1.0, {}, "expected labels from 0 to 65535, found -1 to 9"),
        (MAP, LABELS * 7000.0, {}, "expected labels from 0 to 65535, found 0 to 70000"),
        (MAP, TWO, {}, "expected a label map with one value per voxel, this file has 2"),
        (MAP, LABELS, {"input_type": "logits"}, "one label only.*--input-type labels"),
        (MAP, LABELS[1:], {}, "label map and image are on different grids.*nearest neighbors"),
        (
            "a/liver.nii.gz",
            2 * LIVER,
            {},
            r"liver\.nii\.gz: expected 0 and 1, found values up to 2",
        ),
        ("a/liver.nii.gz", LIVER * 0.5, {}, "by up to 0.5; a file of one structure holds 0 and 1"),
        ("a/tumor.nii.gz", MASKS["tumor"][1:], {}, rf"{ODD}.*tumor\.nii\.gz"),
        ("b/background.nii.gz", LIVER, {}, r"b/background\.nii\.gz: cannot name a structure"),
        ("a/liver.nii", LIVER, {}, "expected one file per structure, found "),
        ("b.nii.gz", LABELS, {}, r"b\.nii\.gz: a label map, but other cases have one file per"),
    ],
)
def test_what_is_no_label_map_or_structure_is_refused(folder, name, values, options, message):
    place = folder / ("maps" if name == MAP else "structures")
    save_nifti(place / name, values.astype(np.float32), AFFINE)
    if message is None:  # Some tools write a slope that is nearly 1.
        np.testing.assert_array_equal(
            read(folder, "maps").logits[[0, 5, 10]], one_hot(LABELS, (0, 5, 10))
        )
        return
    with pytest.raises((InputError, GridMismatchError), match=f"(?s){message}"):
        read(folder, "maps", **options) if name == MAP else structures(folder)


def test_a_file_0_among_numbers_is_the_background(folder):
    """`evaluate` takes the same numbers; 0 beside names is refused."""
    by_number = {0: LABELS == 0, 5: LABELS == 5, 10: LABELS == 10}
    for number, mask in by_number.items():
        path = folder / "numbered" / f"a_{number}.nii.gz"
        save_nifti(path, mask.astype(np.uint8), AFFINE)
    pattern = folder / "numbered" / "{case}_{label}.nii.gz"
    image = folder / "images" / "a_0000.nii.gz"
    (case,) = found_cases(image, pattern, input_type="labels")
    assert case.structures == ("10", "5")
    declared = declared_labels([case], (), None)
    assert declared.structures == {"5": 5, "10": 10}
    options = EvaluationOptions(pattern, pattern, folder / "report")
    numbers, references, _ = pair_structures(options)
    assert numbers == {"5": 5, "10": 10}
    assert references["a"].structures == ("10", "5")
    save_nifti(folder / "numbered" / "a_liver.nii.gz", MASKS["liver"], AFFINE)
    (case,) = found_cases(image, pattern, input_type="labels")
    with pytest.raises(InputError, match=r"a_0\.nii\.gz: cannot name a structure"):
        declared_labels([case], (), None)


def test_structures_are_not_taken_for_labels_in_order(folder):
    """The first one would become the background, and the background padding."""
    paths = [folder / "structures" / "a" / f"{name}.nii.gz" for name in ("liver", "empty")]
    (case,) = found_cases(folder / "images" / "a_0000.nii.gz", paths)
    num_nowhere = int((MASKS["liver"] == 0).sum())
    with pytest.raises(
        InputError,
        match=rf"2 files of 0 and 1, all of them 0 at {num_nowhere} voxels"
        r"(?s:.*)give --input-type labels",
    ):
        load_case(case)
    background = save_nifti(folder / "background.nii.gz", 1 - MASKS["liver"], AFFINE)
    (case,) = found_cases(folder / "images" / "a_0000.nii.gz", [background, paths[0]])
    assert load_case(case).input_kind == "labels", "one-hot channels have a label everywhere"


def test_a_map_of_floats_is_decoded_once_to_tell_it_from_scores_and_one_of_integers_never(
    folder, monkeypatch
):
    """The plan of a run, its memory and the case read the headers, one after the other."""
    decoded = []
    pieces = foreground.decoded_pieces

    def counting(header, **options):
        decoded.append(header.path.name)
        return pieces(header, **options)

    monkeypatch.setattr(foreground, "decoded_pieces", counting)
    for dtype, number in ((np.float32, 1), (np.uint8, 1), (np.int32, 1), (np.float32, 2)):
        save_nifti(folder / "maps" / "a.nii.gz", LABELS.astype(dtype), AFFINE)
        for _ in range(3):
            assert read(folder, "maps", input_type="auto").input_kind == "labels"
        assert len(decoded) == number
