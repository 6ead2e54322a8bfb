"""nnU-Net's postprocessing.json: the rules that are read, what they do to a label map, and what is refused."""

import json

import numpy as np
import pytest
from nnunet_helpers import write_json, write_postprocessing, write_tree

from crfrefine.cases.nnunet.layout import require_trained
from crfrefine.cases.nnunet.postprocessing import KeepLargest, find_postprocessing, read_postprocessing
from crfrefine.errors import InputError


def drawn(*rows):
    """Label maps of (3, columns, 2): the picture is the middle slice of each plane, the other plane is empty."""
    values = np.array([[0 if digit == "." else int(digit) for digit in row] for row in rows], dtype=np.uint8)
    return np.stack([values, np.zeros_like(values)], axis=-1)


def kept(label_map, *labels, background=0):
    found = KeepLargest(labels, background).apply(label_map)
    assert found.dtype == label_map.dtype
    assert not found[..., 1].any()
    return ["".join("." if value == 0 else str(value) for value in row) for row in found[..., 0]]


COMPONENTS = {
    "largest": (("11...1", "1..2.2", "...2.."), (1,), 0, ["11....", "1..2.2", "...2.."]),
    "together": (("11..12", "....22", "3....."), (1, 2), 0, ["....12", "....22", "3....."]),
    "corners connect": (("1.....", ".1...1", "..1..1"), (1,), 0, ["1.....", ".1....", "..1..."]),
    "all of the largest size, as in nnU-Net": (("11..11", "......", "..1..."), (1,), 0, ["11..11", "......", "......"]),
    "what nnU-Net calls background": (("11...1", "......", "......"), (1,), 2, ["11...2", "......", "......"]),
    "no such label": (("22...2", "......", "......"), (1,), 0, ["22...2", "......", "......"]),
}


@pytest.mark.parametrize(("picture", "labels", "background", "expected"), COMPONENTS.values(), ids=COMPONENTS)
def test_only_the_largest_component_stays(picture, labels, background, expected):
    assert kept(drawn(*picture), *labels, background=background) == expected


@pytest.mark.parametrize(("written", "labels"), [(2, (2,)), ([[1, 2], 3], (1, 2, 3)), ([[1, 2], [2]], (1, 2))], ids=str)
def test_labels_and_regions_are_read(tmp_path, written, labels):
    tree = write_tree(tmp_path, 2)
    path = write_postprocessing(tree, written, 1)
    found = find_postprocessing(require_trained(tree.network))
    assert (found.path, found.rules) == (path, (KeepLargest(labels), KeepLargest((1,))))
    assert not tree.trap.exists()


def test_rules_follow_each_other(tmp_path):
    """The body on the right is the largest of both labels, the one on the left the largest of label 2: the first rule decides."""
    tree = write_tree(tmp_path, 2)
    picture = drawn("222..1", ".....1", "....22")
    assert kept(read_postprocessing(write_postprocessing(tree, [1, 2], 2)).apply(picture), 3) == [".....1", ".....1", "....22"]
    assert kept(read_postprocessing(write_postprocessing(tree, 2, [1, 2])).apply(picture), 3) == ["222...", "......", "......"]


def test_that_of_the_most_folds_counts(tmp_path):
    tree = write_tree(tmp_path, 2)
    write_json(tree.network / "other" / "postprocessing.json", {})
    assert find_postprocessing(require_trained(tree.network)) is None
    write_postprocessing(tree, 1, folds="0_1_2_3_4")
    write_postprocessing(tree, 2, folds="0_1")
    write_postprocessing(tree, 3, folds="9")
    assert find_postprocessing(require_trained(tree.network)).rules == (KeepLargest((1,)),)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"postprocessing_fns": ["os.system"]}, r"the function 'os\.system' is not known"),
        ({"postprocessing_fns": []}, "equally long"),
        ({"postprocessing_kwargs": [{"labels_or_regions": "1"}]}, "expected labels from 0 to 65535, got '1'"),
        ({"postprocessing_kwargs": [{"labels_or_regions": [True]}]}, "got True"),
        ({"postprocessing_kwargs": [{"labels_or_regions": 1, "x": 2}]}, "expected labels_or_regions and background_label"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_what_nnunet_would_not_write_is_refused(tmp_path, changes, words):
    path = write_postprocessing(write_tree(tmp_path, 2), 1, **changes)
    with pytest.raises(InputError, match=words) as error:
        read_postprocessing(path)
    assert str(path) in str(error.value)
