"""Results compare and pickle, and the help of the package can be read."""

import inspect
import pickle
import pydoc
import subprocess
import sys

import pytest
from oracles import random_case

import crfrefine

# Comparing


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


# Help


def test_help_begins_with_every_public_name_and_can_be_read():
    """The full pages of all names were two thousand lines, of which most were on methods of PyTorch and of exceptions."""
    page = pydoc.render_doc(crfrefine, renderer=pydoc.plaintext).splitlines()
    assert len(page) < 600
    listed = {words[0] for line in inspect.getdoc(crfrefine).splitlines() if line.startswith("    ") and (words := line.split())}
    public = {name for name in dir(crfrefine) if not name.startswith("_")}
    assert listed | {"CrfRefineError"} == public | {"monai"}
    assert [name for name in public if not any(name in line for line in page[:40])] == []


def test_dir_shows_the_public_names_only():
    errors = {"BackendUnavailableError", "CapacityError", "ConfigError", "CrfRefineError", "ExportError", "GridMismatchError"}
    always = {"CrfParameters", "Plan", "RefinementResult", "RegionScheme", "refine"}
    others = {"CrfRnn", "InputError", "UnsupportedFormatError", "__version__", "crf_loss"}
    modules = {"errors", "layer", "metrics", "parameters", "statistics"}
    assert dir(crfrefine) == sorted(errors | always | others | modules)
    assert set(crfrefine.__all__) == always, "no errors, and nothing that needs PyTorch or MONAI"
    assert all(hasattr(crfrefine, name) for name in dir(crfrefine))
    assert crfrefine.layer.functional.mean_field.__name__ == "mean_field"


def test_without_pytorch_help_and_star_imports_work():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import crfrefine, pydoc\n"
        "from crfrefine import *\n"
        "print(refine.__name__, CrfParameters.__name__, RefinementResult.__name__, bool({*crfrefine._NEED_TORCH} & {*dir(crfrefine)}))\n"
        "print(len(pydoc.render_doc(crfrefine, renderer=pydoc.plaintext).splitlines()) > 100)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)
    assert done.stdout.split() == ["refine", "CrfParameters", "RefinementResult", "False", "True"], done.stderr
