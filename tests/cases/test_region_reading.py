"""Channels of regions in files: what is declared against what a file holds."""

import json

import numpy as np
import pytest
from io_helpers import OBLIQUE, affine_of, numbers, save_nifti

from crfrefine import InputError, RegionScheme
from crfrefine.cases.case import load_case
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.dataset_description import read_descriptions
from crfrefine.cases.reading_options import ReadingOptions, find_regions

SHAPE = (5, 6, 7)
AFFINE = affine_of((1.0, 1.5, 2.25), (3.0, -4.0, 5.0), OBLIQUE)
BRATS = {
    "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4},
    "regions_class_order": [1, 2, 3],
}
SCHEME = RegionScheme.of({"whole": [1, 2, 3], "core": [2, 3], "enhancing": 3})
TWO_LABELS = {
    "labels": {"background": 0, "both": [1, 2], "a": 1, "b": 2},
    "regions_class_order": [1, 1, 2],
}
"""As many regions as a softmax over all labels has channels."""
NUMBERS = "expected 3, one per region, or 4, one for each label from 0 to 3 of "


def load(folder, channels, description=None, *, given=None, input_type="auto"):
    (folder / "images").mkdir(exist_ok=True)
    if description is not None:
        (folder / "dataset.json").write_text(json.dumps(description))
    image = save_nifti(folder / "images" / "a_0000.nii.gz", numbers(SHAPE), AFFINE)
    logits = save_nifti(
        folder / "images" / "a_logits.nii.gz",
        np.moveaxis(channels, 0, -1).astype(np.float32),
        AFFINE,
    )
    regions = find_regions(given, read_descriptions([folder / "images"]))
    return load_case(
        CaseFiles("a", (image,), (logits,)), ReadingOptions(input_type=input_type, regions=regions)
    )


def sigmoids(num_channels=3, seed=0):
    """With zeros in all channels at some voxels, as nnU-Net leaves them around its crop."""
    values = np.random.default_rng(seed).uniform(0.01, 0.99, (num_channels, *SHAPE))
    values[:, :2] = 0.0
    return values


def log_odds(probabilities):
    return np.log(np.maximum(probabilities, 1e-7)) - np.log(np.maximum(1 - probabilities, 1e-7))


def test_sigmoid_channels_become_log_odds(tmp_path):
    case = load(tmp_path, sigmoids(), BRATS)
    assert (case.network.regions, case.network.num_labels, case.input_kind) == (
        SCHEME,
        4,
        "probabilities",
    )
    np.testing.assert_allclose(case.logits, log_odds(sigmoids()), atol=1e-5)
    assert case.logits.strides == (4 * 5 * 6 * 7, 4, 20, 120), "x fastest: no copy is made"
    assert str(case.notes[0]).startswith(
        "a_logits.nii.gz is taken as sigmoid probabilities of 3 regions (whole, core, enhancing; "
    )
    assert str(case.notes[0]).endswith("dataset.json): all values lie in [0, 1]")
    np.testing.assert_array_equal(
        case.network.regions.decode(case.logits), SCHEME.decode(sigmoids() - 0.5)
    )
    channels = np.random.default_rng(1).normal(0, 3, (3, *SHAPE))
    case = load(tmp_path, channels, BRATS)  # Values beyond 0 and 1 are log-odds.
    assert (case.network.regions, case.input_kind) == (SCHEME, "logits")
    np.testing.assert_array_equal(case.logits, channels.astype(np.float32))
    assert "is taken as log-odds of 3 regions" in str(case.notes[0])
    given = RegionScheme.of({"left": 1, "right": 2, "middle": 3})
    case = load(
        tmp_path, sigmoids(), BRATS, given=given
    )  # The user's come before those of the description.
    assert case.network.regions == given
    assert "(left, right, middle; --regions)" in str(case.notes[0])
    case = load(tmp_path, sigmoids(1), given=RegionScheme.of({"tumor": 2}))
    assert (case.logits.shape, case.network.num_labels) == ((1, *SHAPE), 3)
    np.testing.assert_array_equal(
        case.network.regions.decode(case.logits), 2 * (sigmoids(1)[0] > 0.5)
    )


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "nowhere", "logits"])
def test_as_many_regions_as_labels(tmp_path, kind):
    """Only probabilities that sum to 1 are a softmax then."""
    logits = np.random.default_rng(1).normal(0, 3, (3, *SHAPE))
    softmax = np.exp(logits) / np.exp(logits).sum(0)
    channels = {
        "softmax": softmax,
        "sigmoid": sigmoids(),
        "nowhere": np.zeros((3, *SHAPE)),
        "logits": logits,
    }[kind]
    case = load(tmp_path, channels, TWO_LABELS)
    assert (case.network.regions is None) == (kind == "softmax")


def refusal(folder, *arguments, **options):
    with pytest.raises(InputError) as caught:
        load(folder, *arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("description", "told"),
    [
        (
            {**BRATS, "regions_class_order": [1, 2]},
            "the class order has 2 labels for 3 regions (whole, core, enhancing)",
        ),
        (
            {**BRATS, "regions_class_order": [1, 2, 1]},
            "the class order has label 1 for region 'enhancing', which has 3",
        ),
        (
            {"labels": BRATS["labels"]},
            "it has only one of regions of several labels and regions_class_order",
        ),
        (
            {"labels": {"background": 0, "a": 1, "b": 2, "c": 3}, "regions_class_order": [1, 2, 3]},
            "it has only one of regions of several",
        ),
        (
            {"labels": {"background": 0, "a": [0, 1], "b": 2}, "regions_class_order": [1, 2]},
            "region 'a': it has label 0, the background",
        ),
    ],
)
def test_a_description_that_contradicts_itself(tmp_path, description, told):
    """It fails the cases that need it, with what nnU-Net writes; a softmax goes on."""
    channels = sigmoids(5)
    message = refusal(tmp_path, channels, description)
    assert (
        f"{tmp_path}/images/a_logits.nii.gz: the network's output has 5 channels, "
        "and whether these are regions is not clear" in message
    )
    assert f"{tmp_path / 'dataset.json'}: {told}" in message
    assert '"regions_class_order": [1, 2, 3]}' in message
    num_labels = 3 if "0" in told else 4
    softmax = np.random.default_rng(1).normal(0, 3, (num_labels, *SHAPE))
    assert load(tmp_path, softmax, description).network.regions is None


@pytest.mark.parametrize(
    ("channels", "options", "told"),
    [
        (sigmoids(5), {"description": BRATS}, [NUMBERS, "whole = 1+2+3"]),
        (sigmoids(4), {"given": SCHEME}, ["expected 3, one per region of --regions\n"]),
        (
            sigmoids(),
            {"description": BRATS, "input_type": "logits"},
            ["expected log-odds of regions, found values that all lie in [0, 1]"],
        ),
        (
            3 * sigmoids(),
            {"description": BRATS, "input_type": "probabilities"},
            ["between 0 and 1, found values from 0 to 2.9"],
        ),
        (
            sigmoids(),
            {},
            [
                "do not sum to 1",
                "regions_class_order",
                "--regions whole=1+2 --regions core=2",
                "RegionScheme.of",
            ],
        ),
    ],
)
def test_what_is_not_what_was_declared_is_refused(tmp_path, channels, options, told):
    message = refusal(tmp_path, channels, **options)
    assert all(words in message for words in told)


def test_the_description_beside_the_logits_comes_first(tmp_path):
    """nnU-Net writes a dataset.json into the folder of its predictions."""
    places = [tmp_path / "predictions", tmp_path / "images"]
    for place, content in ((places[0], BRATS), (places[1], None), (tmp_path, TWO_LABELS)):
        place.mkdir(exist_ok=True)
        if content:
            (place / "dataset.json").write_text(json.dumps(content))
    found = find_regions(None, read_descriptions(places))
    assert (found.scheme, found.num_labels) == (SCHEME, 4)
    assert find_regions(None, read_descriptions(places[1:])).scheme != SCHEME
