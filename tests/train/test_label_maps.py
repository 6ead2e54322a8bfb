"""Training on label maps in place of logits."""

import json

import numpy as np
import pytest
from cli_helpers import save_nifti
from training_helpers import phantom, write_cases

from crfrefine.arrays.one_hot import ABSENT_LOGIT, CONFIDENCE
from crfrefine.cases.case import ReadingOptions
from crfrefine.errors import InputError
from crfrefine.parameters.sections import IntensityParameters
from crfrefine.runs.demo.phantom import write_phantom
from crfrefine.train.crops import make_crop
from crfrefine.train.dataset import find_cases, read_labeled
from crfrefine.train.options import locate_folders


def write_label_maps(root, count):
    """Cases whose logits are label maps; case 0 lacks the label 3."""
    write_cases(root, count)
    for seed in range(count):
        labels = phantom(seed).logits.argmax(axis=0).astype(np.uint8)
        if seed == 0:
            labels[labels == 3] = 2
        save_nifti(root / "logits" / f"case{seed}.nii.gz", labels, phantom(seed).affine)
    return root


def read_case(cases, number):
    reading = ReadingOptions("labels", declared=cases.declared, all_labels=True)
    return read_labeled(cases.files[number], cases, reading, threads=1)


def test_all_cases_have_the_same_labels(tmp_path):
    """Those of the largest label map or reference, if nothing else says. All are label maps, or none."""
    write_label_maps(tmp_path, 2)
    for input_type in ("auto", "labels"):
        cases = find_cases(locate_folders(tmp_path), input_type=input_type)
        assert (cases.num_labels, cases.declared.source) == (4, "the label maps and references")
        case = read_case(cases, 0)
        assert case.logits.shape[0] == 4
        assert (case.logits[3] == ABSENT_LOGIT).all()
        assert case.absent_labels == (3,)
        assert set(np.unique(case.logits[:3])) == {0, CONFIDENCE}
    # A reference that no parameters can give is not trained on: its loss would be a constant of ten thousand per voxel.
    crop = make_crop(case, IntensityParameters())
    inside = tuple(slice(0, size) for size in crop.labels.shape)
    assert (case.labels == 3).any()
    assert not (crop.labels == 3).any()
    assert (crop.labels == 4).sum() == (case.labels[inside] == 3).sum()
    write_phantom(phantom(0), tmp_path, "case0")
    with pytest.raises(InputError, match="case 'case1': a label map, but case 'case0' has 4 labels in the logits; all must be alike"):
        find_cases(locate_folders(tmp_path))
    (tmp_path / "logits" / "case0").mkdir()
    (tmp_path / "logits" / "case0.nii.gz").rename(tmp_path / "logits" / "case0" / "liver.nii.gz")
    with pytest.raises(InputError, match=r"case 'case0': .*has one file per structure; training needs label maps"):
        find_cases(locate_folders(tmp_path), input_type="labels")


def test_the_dataset_declares_the_labels(tmp_path):
    write_label_maps(tmp_path, 2)
    found = []
    for labels in ({"a": 1, "b": 2, "c": 3, "d": 4}, {"a": 1, "b": 2}):
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, **labels}}))
        found.append(find_cases(locate_folders(tmp_path), input_type="labels"))
    assert (found[0].num_labels, found[0].label_names[4]) == (5, "d")
    for number, message in (
        (1, r"logits/case1\.nii\.gz: has labels that are not declared: 3"),
        (0, r"the reference has a label 3, but there are 3 labels \(0 to 2\) according to .*dataset"),
    ):
        with pytest.raises(InputError, match=message):
            read_case(found[1], number)


def test_only_what_is_near_foreground_is_cropped(tmp_path):
    """A confidence of 2 leaves background at 12 %: as logits, the whole volume would be possible foreground."""
    shape, affine = (40, 12, 10), np.diag([3.0, 2.0, 4.0, 1.0])
    labels = np.zeros(shape, np.uint8)
    labels[2:5, 4:7, 3:6] = 1
    for number in range(2):
        save_nifti(tmp_path / "images" / f"c{number}.nii.gz", np.arange(labels.size, dtype=np.int16).reshape(shape), affine)
        for what in ("labels", "logits"):
            save_nifti(tmp_path / what / f"c{number}.nii.gz", labels, affine)
    crop = make_crop(read_case(find_cases(locate_folders(tmp_path), input_type="labels"), 0), IntensityParameters())
    assert crop.mask.shape[0] == 5 + 4, "up to 10 mm from the label"
