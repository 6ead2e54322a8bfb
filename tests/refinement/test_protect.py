"""`postprocess.protect_probability`: components so large and so certain keep their core."""

import math

import numpy as np
import pytest
from cli_helpers import infer, load_nifti, set_streaming, write_folders
from oracles import random_case, softmax
from scipy import ndimage

import crfrefine
from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.errors import ConfigError

GRIDS = {2: (31, 26), 3: (13, 9, 11)}
STRONG = {"bilateral.weight": 40.0, "bilateral.theta_alpha": 4.0, "mean_field.num_iterations": 3}


def expected_map(network, refined, probabilities, spacing, least_probability, least_ml):
    """The refined map with the cores that the network's map has, component by component."""
    result = refined.copy()
    for label in range(1, len(probabilities)):
        parts, count = ndimage.label(network == label, np.ones((3,) * network.ndim))
        for number in range(1, count + 1):
            part = parts == number
            if part.sum() * math.prod(spacing) / 1000 >= least_ml:
                result[part & (probabilities[label] >= least_probability)] = label
    return result


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("num_dims", [2, 3])
@pytest.mark.parametrize("input_type", ["logits", "probabilities"])
def test_cores_stay(num_dims, order, input_type):
    case = random_case(num_dims, num_labels=4, masked=True, grid_shape=GRIDS[num_dims])
    probabilities = softmax(case.logits)
    values = case.logits if input_type == "logits" else probabilities
    values = np.asarray(values, np.float32, order=order)
    least_ml = 1.5 * math.prod(case.spacing) / 1000
    rules = {"postprocess.min_component_ml": 40 * math.prod(case.spacing) / 1000}

    def refine(**changes):
        parameters = crfrefine.CrfParameters().replace(**STRONG, **changes)
        return crfrefine.refine(
            values,
            case.image,
            spacing=case.spacing,
            parameters=parameters,
            mask=case.mask,
            input_type=input_type,
            allow_vanishing=True,
        )

    for changes in ({}, rules):
        plain = refine(**changes)
        protection = {
            "postprocess.protect_probability": 0.5,
            "postprocess.protect_min_ml": least_ml,
        }
        result = refine(**changes, **protection)
        arguments = (plain.network_label_map, plain.label_map, probabilities, case.spacing)
        expected = expected_map(*arguments, 0.5, least_ml)
        assert np.count_nonzero(expected != plain.label_map) > 5
        np.testing.assert_array_equal(result.label_map, expected)
        np.testing.assert_array_equal(result.marginals, plain.marginals)
        for label, (total, left) in result.lost_to_rules.items():
            before, after = plain.lost_to_rules[label]
            assert total == before
            assert after <= left <= total
        assert result.voxels_removed <= plain.voxels_removed


def test_cores_of_regions():
    """A label is as probable as the region that writes it."""
    case = random_case(3, num_labels=3)
    scheme = RegionScheme.of({"whole": (1, 2, 3), "core": (2, 3), "part": 3})
    plain = crfrefine.CrfParameters().replace(**STRONG)
    protection = {"postprocess.protect_probability": 0.8, "postprocess.protect_min_ml": 0.005}
    maps = []
    for parameters in (plain, plain.replace(**protection)):
        arguments = {"parameters": parameters, "regions": scheme}
        maps.append(crfrefine.refine(case.logits, case.image, spacing=case.spacing, **arguments))
    sigmoids = 1 / (1 + np.exp(-case.logits.astype(np.float64)))
    probabilities = np.concatenate([np.zeros((1, *case.image.shape[1:])), sigmoids])
    arguments = (maps[0].network_label_map, maps[0].label_map, probabilities, case.spacing)
    expected = expected_map(*arguments, 0.8, 0.005)
    assert np.count_nonzero(expected != maps[0].label_map) > 5
    np.testing.assert_array_equal(maps[1].label_map, expected)


def test_a_label_map_has_no_probabilities():
    case = random_case(3)
    parameters = crfrefine.CrfParameters().replace(**{"postprocess.protect_probability": 0.9})
    with pytest.raises(ConfigError, match="protect_probability: needs the network's prob"):
        crfrefine.refine(
            case.logits.argmax(axis=0),
            case.image,
            spacing=case.spacing,
            parameters=parameters,
            input_type="labels",
        )


def test_logits_that_would_stream_are_read(tmp_path, monkeypatch):
    folders = write_folders(tmp_path, "a", "b")
    arguments = ["--set", "bilateral.weight=60", "--set", "volume.weight=0"]
    protection = ["--set", "postprocess.protect_probability=0.8"]
    maps = []
    for streams, options in ((True, ()), (False, protection), (True, protection)):
        set_streaming(monkeypatch, streams)
        infer(folders, *arguments, *options, status=0)
        maps.append(load_nifti(folders.output / "a.nii.gz").copy())
    assert (maps[0] != maps[1]).any()
    np.testing.assert_array_equal(maps[1], maps[2])
