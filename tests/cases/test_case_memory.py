"""A case that cannot fit into memory is refused by its headers, before anything is allocated."""

import math

import numpy as np
import pytest
from io_helpers import affine_of, numbers, save_nifti

from crfrefine.base.memory import PROCESS
from crfrefine.cases import case as cases
from crfrefine.cases.case import CaseFiles, ReadingOptions, load_case
from crfrefine.errors import CapacityError
from crfrefine.io import logits as io_logits
from crfrefine.io import reading

SHAPE = (5, 6, 7)
AFFINE = affine_of((1.0, 1.5, 2.25))
COARSE_SHAPE = (3, 4, 4)
COARSE = affine_of((2.0, 2.5, 4.5))
VOXELS, COARSE_VOXELS = math.prod(SHAPE), math.prod(COARSE_SHAPE)
IMAGE = 4 + 4  # Bytes per voxel: as float32, and normalized.


def save_logits(path, shape, affine, num_labels=3):
    return save_nifti(path, np.moveaxis(numbers((num_labels, *shape)) - 100.0, 0, -1), affine)


def make_case(folder, kind):
    """Return the files of a case, how they are read, and the bytes that this takes."""
    image = save_nifti(folder / "a.nii.gz", numbers(SHAPE), AFFINE)
    mask = save_nifti(folder / "a_mask.nii.gz", np.ones(SHAPE, np.uint8), AFFINE)
    labels = save_nifti(folder / "a_labels.nii.gz", (numbers(SHAPE) % 3).astype(np.uint8), AFFINE)
    logits = (save_logits(folder / "a_logits.nii.gz", SHAPE, AFFINE),)
    images, named, how, of_images, others = (image,), {}, {}, IMAGE, 4 * 3
    if kind == "modalities and logits":
        images, of_images = (image, save_nifti(folder / "a_0001.nii.gz", numbers(SHAPE, seed=1), AFFINE)), 2 * IMAGE
    elif kind == "channels of one file":
        images, of_images = (save_logits(folder / "a_both.nii.gz", SHAPE, AFFINE, num_labels=2),), 2 * IMAGE
    elif kind == "one file per label":
        logits = tuple(save_nifti(folder / f"a_{k}.nii.gz", numbers(SHAPE, seed=k) - 100.0, AFFINE) for k in range(4))
        others = 4 * 4
    elif kind == "mask":
        named, others = {"mask": mask}, 4 * 3 + 4 + 1  # as float32, and as booleans
    elif kind == "reference":
        named, how, others = {"labels": labels}, {"with_labels": True}, 4 * 3 + 4
    elif kind == "another grid":
        logits, how = (save_logits(folder / "a_coarse.nii.gz", COARSE_SHAPE, COARSE),), {"resample": True}
    else:
        logits, how, others = (labels,), {"input_type": "labels"}, 4 * (1 + 2)  # its values, and two channels or more
    # Logits of another grid are there twice: as they are in the file, and interpolated.
    twice = COARSE_VOXELS * 4 * 3 if kind == "another grid" else 0
    return CaseFiles("a", images, logits, **named), how, PROCESS + VOXELS * (of_images + others) + twice


KINDS = ["modalities and logits", "channels of one file", "one file per label", "mask", "reference", "another grid", "label map"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_case_is_read_if_it_just_fits_and_refused_one_byte_earlier(kind, tmp_path, monkeypatch):
    files, how, needed = make_case(tmp_path, kind)
    with_labels = how.pop("with_labels", False)
    load_case(files, ReadingOptions(max_memory=needed, **how), with_labels=with_labels)

    def no_array(*_):
        raise AssertionError("an array was allocated")

    for module in (reading, io_logits, cases):
        monkeypatch.setattr(module, "allocate_array", no_array)
    with pytest.raises(CapacityError) as caught:
        load_case(files, ReadingOptions(max_memory=needed - 1, **how), with_labels=with_labels)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("case 'a': the program and its files, read as float32, take ")
    assert first.endswith("of --max-memory")
    assert any(str(files.logits[0]) in line for line in lines)
    assert any(str(files.images[0]) in line for line in lines)
    assert "raise it" in lines[-1]


def test_a_reference_that_is_not_read_does_not_count_and_without_an_option_the_system_limits(tmp_path, monkeypatch):
    files, _, needed = make_case(tmp_path, "reference")
    needed -= 4 * VOXELS
    load_case(files, ReadingOptions(max_memory=needed))
    monkeypatch.setattr("crfrefine.base.memory.group_numbers", lambda name: [[needed - 1]])
    with pytest.raises(CapacityError, match=r"of the control group \(cgroup\)"):
        load_case(files)
