"""What `refine` is given: arrays in, and a sentence for everything that is not what it seems."""

import re

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
    with pytest.raises(InputError, match=r'as probabilities do\n.*input_type="probabilities".*input_type="logits"'):
        refined(PROBABILITIES)
    by_word = refined(PROBABILITIES, input_type="probabilities")
    by_hand = refined(np.log(np.clip(PROBABILITIES, np.float32(1e-7), 1)))
    np.testing.assert_array_equal(by_word.logits, by_hand.logits)
    assert not np.array_equal(refined(PROBABILITIES, input_type="logits").logits, by_word.logits)


@pytest.mark.parametrize("input_type", ["logits", "probabilities", "labels"])
def test_the_byte_order_of_the_arrays_changes_no_bit(input_type):
    logits = {"logits": CASE.logits.astype(np.float32), "probabilities": PROBABILITIES, "labels": LABELS}[input_type]
    image = (1000 + 300 * CASE.image).astype(np.float32)
    mask = (np.arange(LABELS.size) % 7 > 0).reshape(LABELS.shape).astype(np.uint16)
    native, swapped = (
        refined(*(array.astype(array.dtype.newbyteorder(order)) for array in (logits, image)), input_type=input_type, mask=of_order)
        for order, of_order in (("=", mask), ("S", mask.astype(mask.dtype.newbyteorder())))
    )
    assert native == swapped


WRONG = [
    ({"image": "image.nii.gz"}, "image is a path"),
    *(({"threads": threads}, "threads: expected a whole number of at least 1, or None") for threads in (0, 1.5, True)),
    ({"logits": CASE.logits.astype(complex)}, "expected an array of real numbers"),
    ({"logits": CASE.logits.astype(object)}, "logits"),
    ({"logits": CASE.logits[:, 0, 0], "image": CASE.image[:, 0, 0], "spacing": "one"}, r"one per grid axis$"),  # no sign of a batch
    ({"logits": LABELS, "input_type": "labels", "regions": {"a": 1}}, r"regions: .* a label map has none; leave regions out"),
    # Without the check it would be as many labels as there are voxels on the first axis.
    ({"logits": LABELS.astype(float), "image": CASE.image[0]}, r"the image's shape \(6, 4, 5\) and hold whole numbers"),
    # Three labels and three modalities: a label map has the image's shape, too.
    ({"logits": ONE_HOT, "image": np.stack([CASE.image[0]] * 3)}, "hold whole numbers"),
    ({"logits": LABELS.astype(float), "image": CASE.image[0], "input_type": "probabilities"}, "hold whole numbers"),
    ({"logits": ONE_HOT}, r"as probabilities do\n(?s:.*)give logits\.argmax\(axis=0\) and input_type=\"labels\""),
    ({"logits": 100 * PROBABILITIES}, r"logits: no value is negative, and the labels sum to 100"),
    ({"logits": LABELS}, f"logits have type {LABELS.dtype} and shape .*, as a label map has"),
    ({"logits": LABELS - 1, "input_type": "labels"}, r"holds values from -1 to 1; expected labels from 0 to 65535"),
    ({"logits": LABELS + 0.5, "input_type": "labels"}, "values that are not whole numbers; for logits or probabilities, leave input_type"),
    ({"logits": np.stack([LABELS > 0] * 2)}, "logits have type bool and shape .*, as a mask has; logits are"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_what_is_no_argument_gets_a_sentence(changes, message):
    with pytest.raises((InputError, ConfigError), match=message):
        refined(**changes)


def test_tensors_are_taken_where_numpy_can():
    torch = pytest.importorskip("torch")
    given = torch.from_numpy(CASE.logits)
    np.testing.assert_array_equal(refined(given).logits, refined().logits)
    with pytest.raises(InputError, match=r"; give logits\.detach\(\)\.float\(\)\.cpu\(\)$"):
        refined(given.to(torch.bfloat16).requires_grad_())
    with pytest.raises(InputError, match="logits is a Tensor that numpy cannot take"):
        refined(given.clone().requires_grad_())


def test_a_mask_that_an_array_brings_is_not_lost():
    hidden = CASE.image[0] > 0.5
    image = np.ma.MaskedArray(CASE.image, np.stack([hidden] * len(CASE.image)))
    logits = np.ma.masked_less(CASE.logits, -1.0)
    for name, array in {"image": image, "logits": logits}.items():
        advice = rf"give {name}\.filled\(0\), .* mask=~np\.ma\.getmaskarray\({name}\), .* mask=~np\.ma\.getmaskarray\({name}\)\.any\(0\)$"
        with pytest.raises(InputError, match=f"{name} is a masked array, .*{advice}"):
            refined(**{name: array})
        shown = ~np.ma.getmaskarray(array).any(0)
        assert refined(**{name: array.filled(0)}, mask=shown).energy == refined(**{name: array.data}, mask=shown).energy
    with pytest.raises(InputError, match=r"mask is a masked array, whose mask would be lost; give mask\.filled\(0\)$"):
        refined(mask=image[0])
    assert refined(image=np.ma.MaskedArray(CASE.image)) == refined()


@pytest.mark.parametrize("num_cases", [1, 2])
def test_a_batch_is_named(num_cases):
    logits, images = np.stack([CASE.logits] * num_cases), np.stack([CASE.image] * num_cases)
    told = r"a batch, give .* by itself: refine\(logits\[i\], \.\.\.\) with the image of that case, \(mod"
    for image in (images, images[:, 0], CASE.image[0]):
        with pytest.raises(InputError, match=told):
            refined(logits, image)
    with pytest.raises(InputError, match="first axis"):  # as if of one case in 4-D
        refined(logits, images[:, :1].repeat(logits.shape[1], 1))


def test_channels_last_are_named_and_taken_when_they_are_moved():
    logits, image = np.moveaxis(CASE.logits, 0, -1), np.moveaxis(CASE.image, 0, -1)
    for given in (CASE.image, CASE.image[0]):
        with pytest.raises(InputError, match=r"last axis of the logits is that of the labels, give np\.moveaxis\(logits, -1, 0\)\.$"):
            refined(logits, given)
    with pytest.raises(InputError, match=r"give np\.moveaxis\(logits, -1, 0\), and np\.moveaxis\(image, -1, 0\)\.$"):
        refined(logits, image)
    np.testing.assert_array_equal(refined(np.moveaxis(logits, -1, 0), np.moveaxis(image, -1, 0)).label_map, refined().label_map)


@pytest.mark.parametrize("as_probability", [False, True])
def test_one_channel_of_a_sigmoid_is_named_and_taken_as_a_region(as_probability):
    log_odds = CASE.logits[1:2] - CASE.logits[:1]
    given = 1 / (1 + np.exp(-log_odds)) if as_probability else log_odds
    options = {"input_type": "probabilities"} if as_probability else {}
    advice = 'give regions={"structure": 1}' + (' and input_type="probabilities".' if as_probability else ".")
    with pytest.raises(InputError, match=f"logits have 1 label; .*\n.*{re.escape(advice)}$"):
        refined(given)
    found = refined(given, regions={"structure": 1}, **options)
    two = refined(np.concatenate([np.zeros_like(log_odds), log_odds]), input_type="logits")
    np.testing.assert_array_equal(found.label_map, two.label_map)


@pytest.mark.parametrize("spacing", [(1, 1, 9e-7), -1.0, np.nan, (1.0, 2.0), "one", (1, 1, 1e300)])
def test_a_spacing_that_is_none(spacing):
    with pytest.raises(InputError, match=r"expected 3 positive distances in mm \(from 1e-06 to 1e\+09; convert other units\)"):
        refine(CASE.logits, CASE.image, spacing=spacing)


def test_values_beyond_float32_are_refused_by_every_engine(backend):
    image = CASE.image.astype(np.float64)
    image[0, 1, 2, 3] = 1e300
    with pytest.raises(InputError, match="image: channel 0 has 1 values that are not finite in float32"):
        refined(image=image, device=backend.name)


def test_the_largest_weights_stay_finite(backend):
    largest = CrfParameters().replace(**{"bilateral.weight": 1e6, "spatial.weight": 1e6, "mean_field.filter": "exact"})
    result = refined(parameters=largest, device=backend.name)
    assert np.isfinite(result.marginals).all()
    assert np.isfinite(result.energy).all()
    assert repr(result).startswith("<RefinementResult: 3 labels on 6×4×5 voxels, 2 steps, converged, energy 1.0986e+07, on ")
    assert len(repr(result)) < 120
    for key, value in (("bilateral.weight", 3e38), ("spatial.weight", (1.0, -2e6, 0.0)), ("compatibility.matrix", ((0, 1e9), (1, 0)))):
        changes = {key: value, **({"compatibility.kind": "matrix"} if key.startswith("comp") else {})}
        with pytest.raises(ConfigError, match=rf"{key}.*at least -1e\+06 and at most 1e\+06"):
            CrfParameters().replace(**changes)
