"""Labels that have other numbers than in the reference are named, with the options that mend it."""

import nibabel as nib
import numpy as np
import pytest
from cli_helpers import load_nifti, run_here, save_nifti
from evaluation_helpers import label_map, logits_of, read_metrics, save_map, write_study

from crfrefine.arrays.label_maps import count_pairs
from crfrefine.evaluate.numbering import other_numbers
from crfrefine.io import read_header


def renumber(folder, table):
    """Give the labels of all files the numbers of a table."""
    for path in folder.iterdir():
        image = nib.load(path)
        values = np.array(table, np.uint8)[np.asanyarray(image.dataobj)]
        nib.Nifti1Image(values, image.affine).to_filename(path)


def options_in(text, method):
    """The options after `add` in the note about a method; empty without a note."""
    for line in text.splitlines():
        if line.startswith(f"note: {method} seems to have other numbers"):
            return line.partition(", add ")[2].split()
    return []


def test_pairs_of_labels_are_counted_in_any_memory_layout():
    first = label_map(1)
    second = np.asfortranarray(100 * label_map(2, (1, 5, 7)).astype(np.uint16))
    for one in (first, np.asfortranarray(first)):
        counts = count_pairs(one, second)
        assert sum(counts.values()) == first.size
        for (label, other), count in counts.items():
            assert count == np.count_nonzero((first == label) & (second == other))


@pytest.mark.parametrize(
    ("prediction", "reference", "options"),
    [
        ([0, 255, 2], [0, 1, 2], ["--map", "255=1"]),
        ([0, 1, 3], [0, 1, 4], ["--map", "3=4"]),
        ([0, 2, 1], [0, 1, 2], ["--map", "1=2", "--map", "2=1"]),
        # 1 is another structure than 1 of the reference, which has none of its kind.
        ([0, 51, 1], [0, 1, 0], ["--map", "51=1", "--map", "1=0"]),
    ],
)
def test_the_options_in_the_note_mend_it(tmp_path, prediction, reference, options):
    study = write_study(tmp_path, 2)
    renumber(study.after, prediction)
    renumber(study.labels, reference)
    done = run_here(*study.arguments, status=0)
    assert options_in(done.stderr, "prediction") == options
    assert "prediction seems to have other numbers" in str(study.summary()["notes"])
    again = run_here(*study.arguments, *options, status=0)
    assert options_in(again.stderr, "prediction") == []
    found = read_metrics(study.output)
    for label in {*reference} - {0}:
        assert all(
            found[case, str(label), "dice", "prediction"] > 0.5 for case in study.maps["after"]
        )


def test_the_options_name_the_baseline_that_they_are_for(tmp_path):
    study = write_study(tmp_path, 2)
    renumber(study.before, [0, 9, 2])
    done = run_here(*study.arguments, status=0)
    assert options_in(done.stderr, "before") == ["--map", "before:9=1"]
    assert options_in(done.stderr, "prediction") == []


def test_channels_keep_their_numbers_and_the_reference_gets_them(tmp_path):
    study = write_study(tmp_path, 2)
    for path in study.after.iterdir():
        labels = study.maps["after"][path.name.partition(".")[0]]
        save_map(path, np.moveaxis(logits_of(labels, 3), 0, -1))
    renumber(study.labels, [0, 1, 4])
    done = run_here(*study.arguments, status=0)
    options = options_in(done.stderr, "prediction")
    assert options == ["--map", "reference:4=2"]
    again = run_here(*study.arguments, *options, status=0)
    assert options_in(again.stderr, "prediction") == []


@pytest.mark.parametrize("numbers", [[0, 1, 2], [0, 1, 4], [0, 1, 9]])
def test_the_options_for_several_methods_hold_together(tmp_path, numbers):
    """The reference has one numbering: that of channels, which label maps then need, too."""
    study = write_study(tmp_path, 2)
    for path in study.before.iterdir():
        labels = study.maps["before"][path.name.partition(".")[0]]
        save_map(path, np.moveaxis(logits_of(labels, 3), 0, -1))
    renumber(study.labels, [0, 1, 4])
    renumber(study.after, numbers)
    done = run_here(*study.arguments, status=0)
    options = options_in(done.stderr, "before")
    if numbers[2] != 4:
        assert options_in(done.stderr, "prediction") == options
    again = run_here(*study.arguments, *options, status=0)
    assert "other numbers" not in again.stderr
    found = read_metrics(study.output)
    for method in ("prediction", "before"):
        assert all(found[case, "2", "dice", method] > 0.5 for case in study.maps["after"])


@pytest.mark.parametrize(
    "pairs",
    [
        {(1, 1): 80, (1, 2): 60, (0, 1): 20},  # 2 is missed, and taken for 1
        {(5, 1): 50, (5, 2): 40, (0, 1): 9},  # 5 is the union of 1 and 2
        {(1, 1): 10, (2, 1): 60, (0, 1): 30, (2, 2): 50},  # 2 is too large
        {(0, 1): 100, (3, 0): 80, (3, 1): 20},  # 3 is elsewhere
        {(1, 0): 100, (0, 0): 5},
    ],
)
def test_other_errors_are_no_other_numbers(pairs):
    assert other_numbers(pairs) == {}


def test_a_method_that_is_the_reference_itself_is_noted(tmp_path):
    study = write_study(tmp_path, 2)
    arguments = (*study.arguments, "-b", f"copy={study.labels}")
    said = "copy equals the reference at every voxel of 2 cases: is it a copy of it?"
    assert said in run_here(*arguments, status=0).stderr
    assert said not in run_here(*arguments, "--ceiling", "copy", status=0).stderr


def test_label_maps_of_several_times_are_no_logits(tmp_path):
    """Each voxel's label would be the time with the largest number."""
    study = write_study(tmp_path, 1)
    path = study.after / "case0.nii.gz"
    labels = load_nifti(path)
    times = np.stack([labels, np.roll(labels, 1, 0)], -1)
    save_nifti(path, times, read_header(path).affine)
    message = run_here(*study.arguments, status=1).stderr
    assert "expected logits or probabilities, a channel per label; found 2 label maps" in message
    assert "--split" in message
    times[..., 1][times[..., 1] == 2] = 4  # No numbering has both.
    save_nifti(path, times, read_header(path).affine)
    run_here(*study.arguments, status=0)
