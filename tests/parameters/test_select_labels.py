"""Parameters of a case in which only some of the labels take part."""

import pytest

from crfrefine.errors import ConfigError
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import BilateralParameters

MATRIX = [[0.0, 1.0, 2.0, 3.0], [4.0, 0.0, 5.0, 6.0], [7.0, 8.0, 0.0, 9.0], [10.0, 11.0, 12.0, 0.0]]


def test_values_per_label_are_those_of_the_labels():
    parameters = CrfParameters(bilateral=(BilateralParameters(weight=(1.0, 2.0, 3.0, 4.0)), BilateralParameters(weight=5.0)))
    parameters = parameters.replace(
        **{
            "spatial.weight": [6.0, 7.0, 8.0, 9.0],
            "mean_field.bias": [0.1, 0.2, 0.3, 0.4],
            "compatibility.kind": "matrix",
            "compatibility.matrix": MATRIX,
        }
    )
    chosen = parameters.select_labels((0, 2, 3), 4)
    assert CrfParameters().select_labels((0, 10, 52), 53) == CrfParameters()
    assert [kernel.weight for kernel in chosen.bilateral] == [(1.0, 3.0, 4.0), 5.0]
    assert chosen.spatial.weight == (6.0, 8.0, 9.0)
    # Row: label of the neighbor, column: own label.
    assert chosen.compatibility.matrix == ((0.0, 2.0, 3.0), (7.0, 0.0, 9.0), (10.0, 12.0, 0.0))
    assert chosen.intensity == parameters.intensity
    assert chosen.mean_field.bias == (0.1, 0.3, 0.4)
    assert chosen.mean_field.temperature == parameters.mean_field.temperature


def test_a_list_for_another_number_of_labels_is_refused():
    assert CrfParameters().num_labels is None
    for key, value, message in (
        ("bilateral.weight", [1.0, 2.0, 3.0], "it has 3 values, but the case has 4 labels"),
        ("mean_field.bias", [0.0, 1.0], "it has 2 values"),
        ("compatibility", {"kind": "matrix", "matrix": [[0.0, 1.0], [1.0, 0.0]]}, "it is 2 x 2"),
    ):
        parameters = CrfParameters().replace(**{key: value})
        assert parameters.num_labels == (3 if key == "bilateral.weight" else 2)
        with pytest.raises(ConfigError, match=rf"^{key}\S*: {message}"):
            parameters.select_labels((0, 1), 4)
