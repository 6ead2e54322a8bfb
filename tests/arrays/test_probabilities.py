"""Are they logits or probabilities: what is taken, what is refused, and the way from one to the other."""

from pathlib import Path

import numpy as np
import pytest

import crfrefine
from crfrefine.arrays.probabilities import identify, identify_array, take_logarithms
from crfrefine.errors import ConfigError, InputError

PATH = Path("logits/case.npz")


def softmax(shape=(3, 6, 5, 4), dtype=np.float32):
    """(L, z, y, x), confident here and there."""
    logits = 4 * np.random.default_rng(1).standard_normal(shape)
    exponentials = np.exp(logits - logits.max(axis=0))
    return (exponentials / exponentials.sum(axis=0)).astype(dtype).astype(np.float32)


@pytest.mark.parametrize(("kind", "dtype"), [(None, np.float16), ("probabilities", np.float32)])
def test_a_distribution_at_each_voxel_becomes_its_logarithm(kind, dtype):
    """float16 sums to 1 within a few times its 2^-11."""
    values = softmax(dtype=dtype)
    expected = np.log(np.clip(values, np.float32(1e-7), 1))
    found, note = identify(values, "auto", kind, PATH)
    take_logarithms(values)
    assert found == "probabilities"
    assert note == "case.npz is taken as probabilities: all values lie in [0, 1] and sum to 1 at each voxel"
    np.testing.assert_array_equal(values, expected)


def test_exact_zeros_do_not_become_hard_constraints():
    """Outside of its crop nnU-Net writes background 1 and the rest 0: finite logits."""
    values = np.zeros((3, 6, 5, 4), np.float32)
    values[0] = 1
    assert identify(values, "auto", None, PATH)[0] == "probabilities"
    take_logarithms(values)
    np.testing.assert_array_equal(values[0], 0)
    np.testing.assert_allclose(values[1:], np.log(1e-7), rtol=1e-6)
    values = softmax((2, 41, 59, 67))  # more than a block
    expected = np.log(np.clip(values, np.float32(1e-7), 1))
    take_logarithms(values)
    np.testing.assert_array_equal(values, expected)


def test_eight_bit_probabilities_are_taken_on_the_users_word():
    values = np.rint(softmax() * 255).astype(np.float32) / 255
    values[:, 0, 0, 0] = (0.5, 0.3, 0.196)
    message = r"sum to about 1, but not to 1 at \d+ of 120 voxels; the first .* a sum of (0\.99|1\.00).*\n.*give --input-type probabilities"
    with pytest.raises(InputError, match=message) as caught:
        identify(values, "auto", None, PATH)
    assert "sigmoid" not in str(caught.value)
    assert identify(values, "probabilities", None, PATH) == ("probabilities", "case.npz is taken as probabilities: requested")


@pytest.mark.parametrize(("input_type", "kind"), [("auto", None), ("auto", "logits"), ("auto", "probabilities"), ("probabilities", None)])
@pytest.mark.parametrize("total", [100.0, 255.0, 1.01])
def test_probabilities_with_another_sum_are_refused(total, input_type, kind):
    """Padding does not count; one voxel with another sum, or one negative value, makes logits of them."""
    values = (total * softmax()).astype(np.float32)
    values[:, 1, 1, 1], values[:, 2, 2, 2] = 0.0, (total, 0.0, 0.0)
    values[:, 3, 3, 3] = -7.0
    with pytest.raises(InputError, match=rf"the labels sum to {total:g} at each voxel.*\n.*give --input-type logits"):
        identify(values, input_type, kind, PATH)
    with pytest.raises(InputError, match=rf"the labels sum to {total:g} at each voxel"):
        identify_array(values, input_type)
    assert identify(values, "logits", None, PATH)[0] == "logits"
    for odd in (1.2 * total, -0.5):
        values[1, 0, 0, 0] = odd
        if input_type == "auto" and kind != "probabilities":
            assert identify(values, input_type, kind, PATH)[0] == identify_array(values, input_type) == "logits"


def test_voxels_with_next_to_no_probability_are_counted_and_located():
    """One of them turned a whole volume into NaN in a known library."""
    values = softmax()
    values[:, 2, 1, 3] = (0, 1e-5, 0)
    values[:, 4, 0, 0] = (0, 0, 1e-6)
    with pytest.raises(InputError, match=r"of all labels are almost zero at 2 of 120 voxels; the first one is voxel \(3, 1, 2\)"):
        identify(values, "auto", None, PATH)
    with pytest.raises(ConfigError, match="input type 'softmax': expected one of auto, logits, probabilities, labels"):
        crfrefine.refine(softmax(), softmax()[0], input_type="softmax")
    values[:], values[0], values[1, 2, 3, 1] = 0, 1, 1  # two structures that overlap at a voxel
    with pytest.raises(InputError, match="All values are 0 or 1: for one binary file per structure, give --input-type labels"):
        identify(values, "auto", None, PATH)


@pytest.mark.parametrize(("input_type", "kind"), [("probabilities", None), ("auto", "probabilities")])
def test_negative_probabilities_are_refused(input_type, kind):
    values = softmax()
    values[1, 2, 3, 1] = -0.25
    with pytest.raises(InputError, match=r"expected probabilities between 0 and 1, found -0\.25 for label 1 at voxel \(1, 3, 2\)"):
        identify(values, input_type, kind, PATH)
