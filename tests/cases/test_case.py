"""Reading a case: all of its files together, checked against each other."""

from dataclasses import replace

import numpy as np
import pytest
from io_helpers import OBLIQUE, affine_of, numbers, save_nifti

from crfrefine.cases.case import CaseFiles, ReadingOptions, load_case, read_case_headers
from crfrefine.errors import InputError

SHAPE = (5, 6, 7)
AFFINE = affine_of((1.0, 1.5, 2.25), (3.0, -4.0, 5.0), OBLIQUE)


def logits_values(num_labels=3, shape=SHAPE):
    return (numbers((num_labels, *shape)) - 100).astype(np.float32)


def make_case(folder, num_modalities=2, num_labels=3):
    images = [save_nifti(folder / f"a_{m:04d}.nii.gz", numbers(SHAPE, seed=m), AFFINE) for m in range(num_modalities)]
    logits = save_nifti(folder / "a_logits.nii.gz", np.moveaxis(logits_values(num_labels), 0, -1), AFFINE)
    return CaseFiles("a", tuple(images), (logits,))


def test_a_case_of_two_modalities(tmp_path):
    labels = numbers(SHAPE, dtype=np.int16) % 3
    files = replace(make_case(tmp_path), labels=save_nifti(tmp_path / "labels.nii.gz", labels.astype(np.float32), AFFINE))
    case = load_case(files, with_labels=True, threads=2)
    assert case.labels.dtype == np.uint8
    np.testing.assert_array_equal(case.labels, labels)
    case = load_case(files)
    assert case.image.strides == case.logits.strides == (4 * 5 * 6 * 7, 4, 20, 120), "x fastest, channels slowest: no copy is made"
    np.testing.assert_array_equal(case.image, np.stack([numbers(SHAPE, seed=m) for m in range(2)]))
    np.testing.assert_array_equal(case.logits, logits_values())
    assert (case.case_id, case.num_labels, case.input_kind, case.mask, case.labels) == ("a", 3, "logits", None, None)
    assert case.image.dtype == case.logits.dtype == np.float32
    assert case.spacing == pytest.approx((1.0, 1.5, 2.25), rel=1e-6)
    assert (case.like.path, case.like.grid_shape) == (tmp_path / "a_0000.nii.gz", SHAPE)
    (note,) = case.notes
    assert note.startswith("a_logits.nii.gz is taken as logits: it has values outside [0, 1], such as ")


def test_a_lone_file_of_all_modalities(tmp_path):
    files = make_case(tmp_path)
    stacked = np.stack([numbers(SHAPE, seed=m) for m in range(4)], axis=-1)
    alone = save_nifti(tmp_path / "all.nii.gz", stacked, AFFINE)
    case = load_case(replace(files, images=(alone,)))
    np.testing.assert_array_equal(case.image, np.moveaxis(stacked, -1, 0))
    with pytest.raises(InputError, match=r"all\.nii\.gz: expected one modality per file, as there are 2 files; this one has 4"):
        load_case(replace(files, images=(alone, files.images[0])))


def test_probabilities_of_nnunet(tmp_path):
    """(label, z, y, x) without geometry; the image has it."""
    exponentials = np.exp(logits_values() / 100)
    probabilities = exponentials / exponentials.sum(axis=0)
    for name in ("probabilities", "logits"):
        np.savez_compressed(tmp_path / f"{name}.npz", **{name: probabilities.transpose(0, 3, 2, 1)})
    files = replace(make_case(tmp_path), logits=(tmp_path / "probabilities.npz",))
    cases = [load_case(files, threads=threads) for threads in (1, 3)]
    np.testing.assert_array_equal(cases[0].logits, cases[1].logits)
    np.testing.assert_allclose(cases[0].logits, np.log(probabilities), atol=1e-6)
    assert cases[0].input_kind == "probabilities"
    assert cases[0].notes == ["probabilities.npz is taken as probabilities: all values lie in [0, 1] and sum to 1 at each voxel"]
    assert load_case(files, ReadingOptions("logits")).input_kind == "logits"
    assert load_case(replace(files, logits=(tmp_path / "logits.npz",))).input_kind == "logits", "its array is named so"


def test_headers_alone_and_cases_that_lack_something(tmp_path):
    with pytest.raises(InputError, match="something is missing"):
        load_case(replace(make_case(tmp_path), problem="case 'a': something is missing"))
    with pytest.raises(InputError, match="case 'a': no logits"):
        load_case(replace(make_case(tmp_path), logits=()))
    headers = read_case_headers(make_case(tmp_path))
    assert (headers.num_modalities, headers.images[0].grid_shape, headers.mask, headers.labels) == (2, SHAPE, None, None)
    assert headers.logits.num_labels == 3
    assert read_case_headers(replace(make_case(tmp_path), logits=())).logits is None
