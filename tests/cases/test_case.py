"""Reading a case: all of its files together, checked against each other."""

from dataclasses import replace

import numpy as np
import pytest
from io_helpers import OBLIQUE, affine_of, numbers, save_nifti

from crfrefine.errors import InputError
from crfrefine.runs.cases.case import load_case
from crfrefine.runs.cases.case_files import CaseFiles
from crfrefine.runs.cases.case_headers import read_case_headers

SHAPE = (5, 6, 7)
AFFINE = affine_of((1.0, 1.5, 2.25), (3.0, -4.0, 5.0), OBLIQUE)


def make_case(folder):
    images = [save_nifti(folder / f"a_{m:04d}.nii.gz", numbers(SHAPE, seed=m), AFFINE) for m in range(2)]
    logits = save_nifti(folder / "a_logits.nii.gz", numbers((*SHAPE, 3)) - 100.0, AFFINE)
    return CaseFiles("a", tuple(images), (logits,))


def test_a_lone_file_of_all_modalities(tmp_path):
    files = make_case(tmp_path)
    stacked = np.stack([numbers(SHAPE, seed=m) for m in range(4)], axis=-1)
    alone = save_nifti(tmp_path / "all.nii.gz", stacked, AFFINE)
    case = load_case(replace(files, images=(alone,)))
    np.testing.assert_array_equal(case.image, np.moveaxis(stacked, -1, 0))
    with pytest.raises(InputError, match=r"all\.nii\.gz: expected one modality per file, as there are 2 files; this one has 4"):
        load_case(replace(files, images=(alone, files.images[0])))


def test_headers_alone_and_cases_that_lack_something(tmp_path):
    with pytest.raises(InputError, match="something is missing"):
        load_case(replace(make_case(tmp_path), problem="case 'a': something is missing"))
    with pytest.raises(InputError, match="case 'a': no logits"):
        load_case(replace(make_case(tmp_path), logits=()))
    headers = read_case_headers(make_case(tmp_path))
    assert (headers.num_modalities, headers.images[0].grid_shape, headers.mask, headers.labels) == (2, SHAPE, None, None)
    assert headers.logits.num_labels == 3
    assert read_case_headers(replace(make_case(tmp_path), logits=())).logits is None
