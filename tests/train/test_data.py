"""Cases found, checked, cropped and shared out before anything is trained."""

import json
import os
import tempfile
from copy import copy
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from cli_helpers import load_nifti, save_nifti
from io_helpers import save_seg
from scipy.ndimage import gaussian_filter
from training_helpers import (
    FINER,
    GRID_SHAPE,
    REGIONS,
    as_case,
    cases_in,
    crops,
    material,
    options_of,
    phantom,
    write_cases,
)

from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.base.notes import NoteKind
from crfrefine.cases.case_files import CaseFiles
from crfrefine.demo.phantom import NUM_LABELS, write_phantom
from crfrefine.errors import ConfigError, InputError
from crfrefine.metrics.overlap import mean_dice
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import IntensityParameters
from crfrefine.train import crops as cropping
from crfrefine.train.crops import count_confusion, make_crop, map_from_disk
from crfrefine.train.dataset import read_labeled
from crfrefine.train.folds import fingerprint
from crfrefine.train.material import NUM_SAMPLED, Sample
from crfrefine.train.model import network_refiner, score
from crfrefine.train.plan import TrainingPlan, make_folds

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def read_all(folder):
    cases = cases_in(folder)
    return [read_labeled(files, cases, threads=1) for files in cases.files]


def rewrite_labels(folder, case_id, place, value, dtype=np.uint8):
    labels = np.array(phantom(int(case_id[-1])).labels, dtype=dtype)
    labels[place] = value
    save_nifti(folder / "labels" / f"{case_id}.nii.gz", labels, phantom(0).affine)


def test_labels_that_do_not_fit_name_the_case_or_the_file(tmp_path):
    write_cases(tmp_path, 2)
    for value, dtype, message in (
        (7, np.uint8, r"^the reference has a label 7, but there are 4 labels"),
        (1.5, np.float32, r"labels/case1.nii.gz: not a label map: expected whole numbers"),
    ):
        rewrite_labels(tmp_path, "case1", (3, 2, 1), value, dtype)
        with pytest.raises(InputError, match=message):
            read_all(tmp_path)
    save_nifti(
        tmp_path / "logits" / "case1.nii.gz",
        np.moveaxis(phantom(1).logits[:3], 0, -1),
        phantom(1).affine,
    )
    with pytest.raises(
        InputError, match=r"case 'case1': .* are \(3, 2, 3\), but \(4, 2, 3\) in case 'case0'"
    ):
        cases_in(tmp_path)


def test_a_case_that_lacks_a_file_is_left_out_with_the_reason(tmp_path):
    """Two complete cases are the fewest."""
    write_cases(tmp_path, 6)
    for number in range(6):
        save_nifti(
            tmp_path / "masks" / f"case{number}.nii.gz",
            np.ones(GRID_SHAPE, np.uint8),
            phantom(number).affine,
        )
    complete = cases_in(tmp_path, strict=True)
    assert (complete.case_ids, complete.left_out, complete.notes) == (
        tuple(f"case{number}" for number in range(6)),
        {},
        [],
    )
    for number, folder in enumerate(("labels", "logits", "masks")):
        (tmp_path / folder / f"case{number}.nii.gz").unlink()
    (tmp_path / "images" / "case3_0001.nii.gz").unlink()
    cases = cases_in(tmp_path)
    assert cases.case_ids == ("case4", "case5")
    no_labels = f"no labels in {tmp_path}/labels"
    assert [*cases.left_out.items()] == [
        ("case0", (no_labels,)),
        ("case1", (f"no logits in {tmp_path}/logits",)),
        ("case2", (f"no mask in {tmp_path}/masks",)),
        ("case3", (f"no modality 0001 in {tmp_path}/images",)),
    ]
    assert str(cases.notes[0]).startswith(f"4 of 6 cases are left out: {no_labels} (1): case0")
    (tmp_path / "logits" / "case5.nii.gz").unlink()
    message = (
        r"only 1 of 6 cases is complete; expected at least two .*\n(.*\n)*"
        r"  no logits in \S+ \(2\): case1, case5"
    )
    with pytest.raises(InputError, match=message):
        cases_in(tmp_path)
    write_cases(tmp_path / "one", 1)
    with pytest.raises(
        InputError, match="only 1 of 1 case is complete; expected at least two cases"
    ):
        cases_in(tmp_path / "one")


def test_ignored_voxels_count_nowhere(tmp_path):
    write_cases(tmp_path, 2)
    names = {"background": 0, "shell": 1, "core": 2, "cyst": 3, "ignore": 4}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": names}))
    rewrite_labels(tmp_path, "case0", slice(0, GRID_SHAPE[0] // 2), 4)
    crop = make_crop(read_all(tmp_path)[0], IntensityParameters())
    assert crop.confusion(argmax_labels(crop.logits)).sum() == np.prod(GRID_SHAPE) // 2


def test_the_fingerprint_knows_of_voxels_in_a_file_of_their_own(tmp_path):
    header = tmp_path / "a.mhd"
    voxels = tmp_path / "a.raw"
    header.write_text(
        "ObjectType = Image\nNDims = 2\nDimSize = 2 2\nElementType = MET_UCHAR\n"
        "ElementDataFile = a.raw\n"
    )
    voxels.write_bytes(bytes(4))
    plan = TrainingPlan(options_of(write_cases(tmp_path, 2)))
    plan.cases.files = (CaseFiles("a", (header,), (), None, None),)

    def fingerprint_with(**options):
        changed = copy(plan)
        changed.options = replace(plan.options, **options)
        return fingerprint(changed, is_gpu=False)

    before = fingerprint(plan, is_gpu=False)
    assert fingerprint_with(threads=3, resume=True) == before
    os.utime(voxels, ns=(0, 1))
    assert len({before, fingerprint(plan, is_gpu=False), fingerprint_with(loss="ce")}) == 3


def test_a_crop_and_what_is_outside_of_it_make_up_the_case(monkeypatch):
    """Dice from the crop must be that of the whole case, so that what decides in training is what
    is measured afterwards.
    """
    monkeypatch.setattr(cropping, "MARGIN_MM", 3.0)
    case = as_case(phantom(4))
    # A sure network far away from the labels, with a mistake outside of the mask.
    case.logits[0] += 10.0 * (case.labels == 0)
    case.logits[2, 0, 0, 0] = 50.0
    mask = np.ones(GRID_SHAPE, bool)
    mask[0] = False
    case = replace(case, mask=mask)
    crop = make_crop(case, IntensityParameters())
    assert crop.mask.sum() < 0.7 * case.labels.size
    everything = count_confusion(case.labels, argmax_labels(case.logits), NUM_LABELS)
    np.testing.assert_array_equal(crop.confusion(argmax_labels(crop.logits)), everything)
    assert crop.outside[0, 2] == 1
    assert np.isin(
        crop.image, normalize_intensity(case.image, IntensityParameters(), mask)
    ).all(), "as the whole case"


def test_tiles_share_out_the_voxels_of_the_mask(monkeypatch, tmp_path):
    """Crops beyond the memory go to disk, without a name: a killed process would leave it."""
    monkeypatch.setattr(cropping, "TILE_VOXELS", 400)
    crop = crops(1)[0]
    parts = [crop.tile(number).mask.sum() for number in range(len(crop.tiles))]
    assert (sum(parts), max(parts) <= 400) == (crop.mask.sum(), True)
    assert sum(crop.tile_weights) == pytest.approx(1.0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept = map_from_disk(crop)
    assert isinstance(kept.image, np.memmap)
    assert list(tmp_path.iterdir()) == []
    for name in ("image", "logits", "labels", "mask"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(crop, name))


def test_each_case_is_held_out_once_and_decides_nothing_there():
    """Few cases decide all together, as docs/guide/learning.md says; else those that decide are not
    trained on.
    """
    for num_cases, num_folds in ((23, 5), (4, 4)):
        splits = make_folds(num_cases, num_folds, seed=0)
        held_out = []
        for split in splits:
            held_out += split.held_out
        assert sorted(held_out) == list(range(num_cases))
        for split in splits:
            assert sorted({*split.training, *split.deciding}) == sorted(
                set(range(num_cases)) - {*split.held_out}
            )
            assert not set(split.training) & set(split.deciding) or split.training == split.deciding
    for num_cases, asked, num_folds in ((2, None, 2), (4, None, 4), (120, None, 5), (7, 7, 7)):
        assert len(make_folds(num_cases, asked, 0)) == num_folds
    for asked in (1, 8):
        with pytest.raises(ConfigError, match="--folds: expected 2 to 7"):
            make_folds(7, asked, 0)


def test_interpolated_borders_are_noted_where_nothing_declares_the_labels(tmp_path):
    write_cases(tmp_path, 2)
    for seed in range(2):
        case = phantom(seed)
        labels = case.logits.argmax(axis=0).astype(np.uint8)
        save_nifti(tmp_path / "logits" / f"case{seed}.nii.gz", labels, case.affine)
    assert not any("thin layers" in note for note in map(str, cases_in(tmp_path).notes))
    soft = gaussian_filter(255.0 * (labels > 0), 0.6)
    save_nifti(tmp_path / "logits" / "case1.nii.gz", np.rint(soft).astype(np.uint8), case.affine)
    with pytest.raises(InputError, match="expected a label map, found"):
        cases_in(tmp_path)
    notes = map(str, cases_in(tmp_path, input_type="labels").notes)
    (note,) = (note for note in notes if "thin layers" in note)
    assert "logits/case1.nii.gz: " in note


def test_other_numbers_of_label_maps_than_of_references_are_noted(tmp_path):
    """Training would leave out the label of the reference without a word."""
    write_cases(tmp_path, 2)
    for seed in range(2):
        case = phantom(seed)
        labels = np.array([0, 1, 2, 7], np.uint8)[case.logits.argmax(axis=0)]
        save_nifti(tmp_path / "logits" / f"case{seed}.nii.gz", labels, case.affine)
    notes = [*map(str, cases_in(tmp_path).notes)]
    (note,) = (note for note in notes if "no reference" in note)
    assert "the labels 7 of the label maps, and no label map 3 of the references" in note
    assert note.endswith("add --map 7=3")
    cases = cases_in(tmp_path, mapped=[("", 7, 3)])
    assert not any("no reference" in note for note in map(str, cases.notes))


def test_all_cases_have_the_same_labels(tmp_path):
    """Those of the largest label map or reference, if nothing else says. All are label maps, or
    none.
    """
    write_cases(tmp_path, 2)
    for seed, most in ((0, 2), (1, 3)):  # Case 0 lacks the label 3.
        labels = np.minimum(phantom(seed).logits.argmax(axis=0), most).astype(np.uint8)
        save_nifti(tmp_path / "logits" / f"case{seed}.nii.gz", labels, phantom(seed).affine)
    for input_type in ("auto", "labels"):
        cases = cases_in(tmp_path, input_type=input_type)
        source = cases.reading.declared.source
        assert (cases.num_labels, source) == (4, "the label maps and references")
        case = read_labeled(cases.files[0], cases, threads=1)
        assert (len(case.logits), case.network.absent_labels) == (4, (3,))
    # A reference that no parameters can give is not trained on: its loss would be a constant of ten
    # thousand per voxel.
    crop = make_crop(case, IntensityParameters())
    inside = tuple(slice(0, size) for size in crop.labels.shape)
    assert not (crop.labels == 3).any()
    assert (crop.labels == 4).sum() == (case.labels[inside] == 3).sum() > 0
    write_phantom(phantom(0), tmp_path, "case0")
    with pytest.raises(
        InputError, match=r"case 'case1': .* are \(0, 2, 3\), but \(4, 2, 3\) in case 'case0'"
    ):
        cases_in(tmp_path)
    (tmp_path / "logits" / "case0").mkdir()
    (tmp_path / "logits" / "case0.nii.gz").rename(tmp_path / "logits" / "case0" / "liver.nii.gz")
    with pytest.raises(
        InputError, match=r"case 'case0': .*has one file per structure; merge them into a label map"
    ):
        cases_in(tmp_path, input_type="labels")


def test_what_is_estimated_is_right_on_average(monkeypatch):
    """A recalibration changes each voxel by itself, so that tiles together change what the whole
    changes.

    The counts of the network need no estimate: what is extrapolated is the change that a model
    makes. The tiles of cases differ.
    """
    monkeypatch.setattr(cropping, "TILE_VOXELS", 60)
    (tiled,) = crops(1, **FINER)
    assert len(tiled.tiles) > 3 * NUM_SAMPLED
    values = {"mean_field.bias": (0.0, 6.0, -1.0, 4.0), "mean_field.temperature": 1.3}
    biased = network_refiner(calibrated=CrfParameters().replace(**values))
    loss = material([tiled]).loss
    network = score(network_refiner(), tiled, loss, 1)[1]
    whole = score(biased, tiled, loss, 1)[1]
    samples = [Sample(tiled, number) for number in range(200)]
    drawn = set()
    for sample in samples[:8]:
        drawn.add(frozenset(tile.image.tobytes() for tile in sample.tiles))
    assert len(drawn) == 8
    np.testing.assert_array_equal(score(network_refiner(), samples[3], loss, 1)[1], network)
    found = [score(biased, sample, loss, 1)[1] for sample in samples]
    assert np.abs(whole - network).max() > 100
    np.testing.assert_allclose(
        np.mean(found, axis=0) - network, whole - network, atol=0.05 * np.abs(whole - network).max()
    )
    assert np.min(found) >= 0
    errors = [mean_dice(one, REGIONS) - mean_dice(whole, REGIONS) for one in found]
    assert np.std(errors) < 0.5 * (mean_dice(network, REGIONS) - mean_dice(whole, REGIONS))


def test_a_reference_that_is_stored_as_a_box_is_background_elsewhere(tmp_path):
    folder = write_cases(tmp_path, 2)
    path = folder / "labels" / "case1.nii.gz"
    whole = load_nifti(path)
    save_seg(folder / "labels" / "case1.seg.nrrd", whole, nib.load(path).affine)
    path.unlink()
    cases = cases_in(folder)
    told = "files that are stored for a part of the image's grid are background elsewhere: cases"
    assert f"{told} case1" in map(str, cases.notes)
    case = read_labeled(cases.files[1], cases, threads=1)
    np.testing.assert_array_equal(case.labels, whole)


def test_a_reference_of_slicer_on_the_whole_grid_is_no_part_of_it(tmp_path):
    folder = write_cases(tmp_path, 2)
    path = folder / "labels" / "case1.nii.gz"
    whole = load_nifti(path)
    whole[0, 0, 0] = 1
    whole[-1, -1, -1] = 1
    save_seg(folder / "labels" / "case1.seg.nrrd", whole, nib.load(path).affine)
    path.unlink()
    assert not any(note.kind is NoteKind.FILLED_CASES for note in cases_in(folder).notes)
