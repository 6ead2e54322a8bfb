"""Results compare and pickle, and the package shows its public names."""

import pickle

import pytest
from oracles import random_case

import crfrefine


@pytest.mark.parametrize("kind", ["logits", "regions"])
def test_a_result_is_equal_to_what_was_pickled_and_to_nothing_else(kind):
    case = random_case(3, num_labels=3, grid_shape=(6, 5, 7))
    options = {"regions": {"a": [1, 2, 3], "b": [2, 3], "c": 3}} if kind == "regions" else {}
    result = crfrefine.refine(case.logits, case.image, spacing=case.spacing, **options)
    again = pickle.loads(pickle.dumps(result))
    assert result == again
    assert result == crfrefine.refine(case.logits, case.image, spacing=case.spacing, threads=2, **options)
    weak = crfrefine.CrfParameters().replace(**{"bilateral.weight": 0.25})
    assert result != crfrefine.refine(case.logits, case.image, spacing=case.spacing, parameters=weak, **options)
    assert result != "a result"


def test_dir_shows_the_public_names_only():
    errors = {"BackendUnavailableError", "CapacityError", "ConfigError", "CrfRefineError", "ExportError", "GridMismatchError"}
    always = {"CrfParameters", "Plan", "RefinementResult", "RegionScheme", "refine"}
    others = {"CrfRnn", "InputError", "UnsupportedFormatError", "__version__", "crf_loss"}
    modules = {"errors", "layer", "metrics", "parameters", "statistics"}
    assert dir(crfrefine) == sorted(errors | always | others | modules)
    assert set(crfrefine.__all__) == always, "no errors, and nothing that needs PyTorch or MONAI"
    assert all(hasattr(crfrefine, name) for name in dir(crfrefine))
    assert crfrefine.layer.functional.mean_field.__name__ == "mean_field"
