"""Reading a case: its files are checked against each other, and against the memory."""

import math
from dataclasses import replace

import numpy as np
import pytest
from io_helpers import affine_of, numbers, save_nifti

from crfrefine.base.limits import PROCESS
from crfrefine.cases.case import load_case
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.case_headers import read_case_headers
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.errors import CapacityError, InputError
from crfrefine.io import reading

SHAPE = (5, 6, 7)
AFFINE = affine_of((1.0, 1.5, 2.25))


def save_logits(path, shape, affine, num_labels=3):
    return save_nifti(path, np.moveaxis(numbers((num_labels, *shape)) - 100.0, 0, -1), affine)


def make_case(folder, kind):
    """Return the files of a case, how they are read, and the bytes that this takes."""
    image = save_nifti(folder / "a.nii.gz", numbers(SHAPE), AFFINE)
    labels = save_nifti(folder / "a_labels.nii.gz", (numbers(SHAPE) % 3).astype(np.uint8), AFFINE)
    files = CaseFiles("a", (image,), (save_logits(folder / "a_logits.nii.gz", SHAPE, AFFINE),))
    how = {}
    bytes_per_voxel = 8 + 12
    more = 0
    if kind == "modalities":  # An image is there as float32, and normalized.
        second = save_nifti(folder / "a_0001.nii.gz", numbers(SHAPE, seed=1), AFFINE)
        files = replace(files, images=(image, second))
        bytes_per_voxel = 2 * 8 + 12
    elif kind == "channels of one file":
        both = save_logits(folder / "a_both.nii.gz", SHAPE, AFFINE, num_labels=2)
        files = replace(files, images=(both,))
        bytes_per_voxel = 2 * 8 + 12
    elif kind == "one file per label":
        logits = tuple(
            save_nifti(folder / f"a_{k}.nii.gz", numbers(SHAPE, seed=k) - 100.0, AFFINE)
            for k in range(4)
        )
        files = replace(files, network=logits)
        bytes_per_voxel = 8 + 16
    elif kind == "mask":  # as float32, and as booleans
        files = replace(
            files, mask=save_nifti(folder / "a_mask.nii.gz", np.ones(SHAPE, np.uint8), AFFINE)
        )
        bytes_per_voxel += 4 + 1
    elif kind == "reference":
        files = replace(files, labels=labels)
        how = {"with_labels": True}
        bytes_per_voxel = 8 + 12 + 4
    elif (
        kind == "another grid"
    ):  # Logits are there twice: as they are in the file, and interpolated.
        coarse = save_logits(folder / "a_coarse.nii.gz", (3, 4, 4), affine_of((2.0, 2.5, 4.5)))
        files = replace(files, network=(coarse,))
        how = {"resample": "linear"}
        more = 3 * 4 * 4 * 12
    else:  # its values, and two channels or more
        files = replace(files, network=(labels,))
        how = {"input_type": "labels"}
        bytes_per_voxel = 8 + 4 * (1 + 2)
    return files, how, PROCESS + math.prod(SHAPE) * bytes_per_voxel + more


KINDS = [
    "modalities",
    "channels of one file",
    "one file per label",
    "mask",
    "reference",
    "another grid",
    "label map",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_case_is_read_if_it_just_fits_and_refused_one_byte_earlier(kind, tmp_path, monkeypatch):
    files, how, needed = make_case(tmp_path, kind)
    with_labels = how.pop("with_labels", False)
    load_case(files, ReadingOptions(max_memory=needed, **how), with_labels=with_labels)

    def no_array(*_):
        raise AssertionError("an array was allocated")

    monkeypatch.setattr(reading, "allocate_array", no_array)
    with pytest.raises(CapacityError) as caught:
        load_case(files, ReadingOptions(max_memory=needed - 1, **how), with_labels=with_labels)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("case 'a': the program and its files, read as float32, take ")
    assert first.endswith("of --max-memory")
    for path in (files.images[0], files.network[0]):
        assert any(str(path) in line for line in lines)
    assert "raise it" in lines[-1]


def test_a_reference_that_is_not_read_does_not_count_and_without_an_option_the_system_limits(
    tmp_path, control_group
):
    files, _, needed = make_case(tmp_path, "reference")
    needed -= 4 * math.prod(SHAPE)
    load_case(files, ReadingOptions(max_memory=needed))
    (control_group / "memory.max").write_text(f"{needed - 1}\n", encoding="ascii")
    with pytest.raises(CapacityError, match=r"of the control group \(cgroup\)"):
        load_case(files)


def test_a_lone_file_of_all_modalities_and_cases_that_lack_something(tmp_path):
    files = make_case(tmp_path, "modalities")[0]
    headers = read_case_headers(files)
    assert (headers.num_modalities, headers.images[0].grid_shape, headers.mask, headers.labels) == (
        2,
        SHAPE,
        None,
        None,
    )
    assert headers.network.num_labels == 3
    stacked = np.stack([numbers(SHAPE, seed=m) for m in range(4)], axis=-1)
    alone = save_nifti(tmp_path / "all.nii.gz", stacked, AFFINE)
    case = load_case(replace(files, images=(alone,)))
    np.testing.assert_array_equal(case.image, np.moveaxis(stacked, -1, 0))
    with pytest.raises(
        InputError,
        match=r"all\.nii\.gz: expected one modality per file, as there are 2 files; this one has 4",
    ):
        load_case(replace(files, images=(alone, files.images[0])))

    with pytest.raises(InputError, match="something is missing"):
        load_case(replace(files, problem="something is missing"))
    with pytest.raises(InputError, match="case 'a': no logits"):
        load_case(replace(files, network=()))
    assert read_case_headers(replace(files, network=())).network.files == ()
