"""What `refine` is given: arrays in, and a sentence for everything that is not what it seems."""

import numpy as np
import pytest
from oracles import random_case, softmax

from crfrefine import ConfigError, CrfParameters, InputError, refine

CASE = random_case(grid_shape=(6, 4, 5))
LABELS = CASE.logits.argmax(axis=0)
ONE_HOT = np.eye(3, dtype=np.float32)[LABELS].transpose(3, 0, 1, 2)
PROBABILITIES = softmax(CASE.logits).astype(np.float32)


def refined(logits=CASE.logits, image=CASE.image, **options):
    return refine(logits, image, **{"spacing": CASE.spacing, **options})


def test_probabilities_are_refused_unless_said_to_be_some():
    with pytest.raises(
        InputError, match=r'as probabilities do\n.*input_type="probabilities".*input_type="logits"'
    ):
        refined(PROBABILITIES)
    by_word = refined(PROBABILITIES, input_type="probabilities")
    by_hand = refined(np.log(np.clip(PROBABILITIES, np.float32(1e-7), 1)))
    np.testing.assert_array_equal(by_word.logits, by_hand.logits)
    assert not np.array_equal(refined(PROBABILITIES, input_type="logits").logits, by_word.logits)


@pytest.mark.parametrize("input_type", ["logits", "probabilities", "labels"])
def test_the_byte_order_of_the_arrays_changes_no_bit(input_type):
    logits = {
        "logits": CASE.logits.astype(np.float32),
        "probabilities": PROBABILITIES,
        "labels": LABELS,
    }[input_type]
    image = (1000 + 300 * CASE.image).astype(np.float32)
    mask = (np.arange(LABELS.size) % 7 > 0).reshape(LABELS.shape).astype(np.uint16)
    native, swapped = (
        refined(
            *(array.astype(array.dtype.newbyteorder(order)) for array in (logits, image)),
            input_type=input_type,
            mask=of_order,
        )
        for order, of_order in (("=", mask), ("S", mask.astype(mask.dtype.newbyteorder())))
    )
    assert native == swapped


def test_a_label_map_may_be_of_floats_that_hold_few_numbers():
    given = [refined(LABELS.astype(kind), input_type="labels") for kind in (np.uint8, np.float16)]
    assert given[0] == given[1]


FLAT = {"logits": CASE.logits[:, 0, 0], "image": CASE.image[:, 0, 0]}
BATCH = np.stack([CASE.logits] * 2)
HIDDEN = np.ma.masked_less(CASE.logits, -1.0)
WRONG = [
    ({"image": "image.nii.gz"}, "image is a path"),
    *(
        ({"threads": threads}, "threads: expected a whole number from 1 to 1024, or None")
        for threads in (0, 1.5, True, 1 << 31)
    ),
    ({"logits": CASE.logits.astype(complex)}, "expected an array of real numbers"),
    ({"logits": CASE.logits.astype(object)}, "logits has type object"),
    (
        {"logits": HIDDEN},
        r"logits is a masked array, whose mask would be lost; give logits\.filled\(0\), "
        r".*mask=~np\.ma\.getmaskarray\(logits\)",
    ),
    ({"mask": HIDDEN[0]}, "mask is a masked array, whose mask would be lost"),
    (
        {"strokes": np.ma.masked_equal(LABELS.astype(np.uint8), 1)},
        "strokes is a masked array, whose mask would be lost",
    ),
    *(
        ({"spacing": spacing}, "expected 3 positive distances in mm")
        for spacing in ((1, 1, 9e-7), -1.0, np.nan, (1, 2), "one", (1, 1, 1e300))
    ),
    ({**FLAT, "spacing": "one"}, "expected 1 positive distances in mm"),
    (
        {"logits": LABELS, "input_type": "labels", "regions": {"a": 1}},
        r"regions: .* a label map has none; leave regions out",
    ),
    ({"logits": 1.0, "image": 2.0}, r"logits have shape \(\); expected \(labels, \*grid\)"),
    # Without the check it would be as many labels as there are voxels on the first axis.
    (
        {"logits": LABELS.astype(float), "image": CASE.image[0]},
        r"shape \(6, 4, 5\), as a label map or a mask has",
    ),
    # Three labels and three modalities: a label map has the image's shape, too.
    ({"logits": ONE_HOT, "image": np.stack([CASE.image[0]] * 3)}, "as a label map or a mask has"),
    (
        {"logits": LABELS.astype(float), "image": CASE.image[0], "input_type": "probabilities"},
        "as a label map or a mask has",
    ),
    (
        {"logits": ONE_HOT},
        r"as probabilities do\n(?s:.*)logits\.argmax\(axis=0\) and input_type=\"labels\"",
    ),
    ({"logits": 100 * PROBABILITIES}, r"logits: no value is negative, and the labels sum to 100"),
    (
        {"logits": LABELS},
        f"logits have type {LABELS.dtype} and shape .*, as a label map or a mask has",
    ),
    (
        {"logits": np.stack([LABELS > 0] * 2)},
        "logits have type bool and shape .*, as a label map or a mask has",
    ),
    (
        {"logits": LABELS - 1, "input_type": "labels"},
        r"holds values from -1 to 1; expected labels from 0 to 65535",
    ),
    (
        {"logits": LABELS + 0.5, "input_type": "labels"},
        "values that are not whole numbers; for logits or probabilities, leave input_type",
    ),
    (
        {"logits": BATCH[:1]},
        r"logits have 1 label; .*\n.*Of a batch, give each case by itself.*"
        r"regions=\{\"structure\": 1\}",
    ),
    (
        {"logits": BATCH, "image": np.stack([CASE.image] * 2)},
        r"\(\*grid\) with the logits' grid \(3, 6, 4, 5\)\n.*Of a batch",
    ),
    ({"logits": None}, "logits has type object; expected an array of real numbers"),
    ({"image": None}, "image has type object; expected an array of real numbers"),
    (
        {"logits": np.moveaxis(CASE.logits, 0, -1)},
        r"with the logits' grid .*\n.*np\.moveaxis\(logits, -1, 0\)",
    ),
]


@pytest.mark.parametrize(
    ("changes", "message"), WRONG, ids=[str(number) for number in range(len(WRONG))]
)
def test_what_is_no_argument_gets_a_sentence(changes, message):
    with pytest.raises((InputError, ConfigError), match=message):
        refined(**changes)


def test_tensors_are_taken_where_numpy_can():
    torch = pytest.importorskip("torch")
    given = torch.from_numpy(CASE.logits)
    np.testing.assert_array_equal(refined(given).logits, refined().logits)
    for tensor in (given.to(torch.bfloat16), given.clone().requires_grad_()):
        with pytest.raises(InputError, match="logits is a Tensor that numpy cannot take"):
            refined(tensor)


def test_masked_arrays_without_a_masked_value_are_arrays():
    assert refined(image=np.ma.MaskedArray(CASE.image)) == refined()


@pytest.mark.parametrize("as_probability", [False, True])
def test_one_channel_of_a_sigmoid_is_a_region(as_probability):
    log_odds = CASE.logits[1:2] - CASE.logits[:1]
    given = 1 / (1 + np.exp(-log_odds)) if as_probability else log_odds
    options = {"input_type": "probabilities"} if as_probability else {}
    found = refined(given, regions={"structure": 1}, **options)
    two = refined(np.concatenate([np.zeros_like(log_odds), log_odds]), input_type="logits")
    np.testing.assert_array_equal(found.label_map, two.label_map)


def test_values_beyond_float32_are_refused_by_every_engine(backend):
    image = CASE.image.astype(np.float64)
    image[0, 1, 2, 3] = 1e300
    with pytest.raises(
        InputError, match="image: channel 0 has 1 values that are not finite in float32"
    ):
        refined(image=image, device=backend.name)


def test_the_largest_weights_stay_finite(backend):
    largest = CrfParameters().replace(
        **{"bilateral.weight": 1e6, "spatial.weight": 1e6, "mean_field.filter": "exact"}
    )
    result = refined(parameters=largest, device=backend.name)
    assert np.isfinite(result.marginals).all()
    assert np.isfinite(result.energy).all()
    assert repr(result).startswith(
        "<RefinementResult: 3 labels on 6×4×5 voxels, 2 steps, converged, energy 1.0986e+07, on "
    )
    assert len(repr(result)) < 120
    for key, value in (
        ("bilateral.weight", 3e38),
        ("spatial.weight", (1.0, -2e6, 0.0)),
        ("compatibility.matrix", ((0, 1e9), (1, 0))),
    ):
        changes = {
            key: value,
            **({"compatibility.kind": "matrix"} if key.startswith("comp") else {}),
        }
        with pytest.raises(ConfigError, match=rf"{key}.*at least -1e\+06 and at most 1e\+06"):
            CrfParameters().replace(**changes)
