"""What an interactive user sees: results and parameters as tables, and a page of help that can be read."""

import inspect
import pickle
import pydoc
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from oracles import random_case

import crfrefine
from crfrefine import CrfParameters, RefinementResult, refine
from crfrefine.base.axes import StorageOrder
from crfrefine.base.notebook import html_table
from crfrefine.engines.base import MeanFieldReport, MeanFieldResult
from crfrefine.refinement.refined import RefinedChannels


class Table:
    """Caption, rows and notes of a table; fails on tags that are not closed in order."""

    def __init__(self, text):
        tree = ElementTree.fromstring(f"<div>{text}</div>")
        self.caption = tree.findtext(".//caption")
        self.rows = [["".join(cell.itertext()) for cell in row] for row in tree.iter("tr")]
        self.notes = [note.text for note in tree.iter("p")]


def result_of(num_labels, spacing, shape=(9, 6, 7), **more):
    before = np.arange(np.prod(shape)).reshape(shape).astype(np.uint8) % num_labels
    after = np.where(before == num_labels - 1, 0, before).astype(np.uint8)
    report = MeanFieldReport(3, True, (-10.0, -12.5))
    logits = RefinedChannels(MeanFieldResult(np.zeros((num_labels, *shape), np.float32), report), shape, num_labels)
    return RefinementResult(after, before, logits, StorageOrder.of_memory(after), report, spacing=spacing, **more)


def test_a_result_is_a_small_table_of_its_labels():
    """378 voxels of 2.5 mm³, a quarter of each label; the last label, a quarter but one voxel at most, becomes background."""
    table = Table(result_of(4, (1.0, 1.25, 2.0), notes=("a note",))._repr_html_())
    assert table.caption == (
        "RefinementResult: 4 labels on 9×6×7 voxels, 3 steps, converged, energy -12.5, on cpu; 94 of 378 voxels changed; "
        "spacing 1 × 1.25 × 2 mm"
    )
    assert table.rows == [
        ["label", "voxels before", "voxels after", "difference", "ml before", "ml after"],
        ["0", "95", "189", "+94", "0.2375", "0.4725"],
        ["1", "95", "95", "+0", "0.2375", "0.2375"],
        ["2", "94", "94", "+0", "0.235", "0.235"],
        ["3", "94", "0", "-94", "0.235", "0"],
    ]
    assert table.notes == ["a note"]


def test_the_table_of_a_real_result_has_its_counts_and_spacing():
    case = random_case(grid_shape=(9, 6, 7))
    result = refine(case.logits, case.image, spacing=case.spacing)
    assert result.spacing == tuple(case.spacing)
    table = Table(result._repr_html_())
    counts = np.bincount(result.label_map.ravel(), minlength=3)
    assert [row[2] for row in table.rows[1:]] == [f"{count:,}" for count in counts]
    assert [row[5] for row in table.rows[1:]] == [f"{count * np.prod(case.spacing) / 1000:.4g}" for count in counts]
    # There are milliliters in three dimensions only, and 30 labels at most.
    plain = ["label", "voxels before", "voxels after", "difference"]
    for spacing, shape in ((None, (9, 6, 7)), ((1.0, 0.5), (9, 6)), ((1.0, 0.5, 2.0, 3.0), (5, 3, 4, 2))):
        assert Table(result_of(3, spacing, shape)._repr_html_()).rows[0] == plain
    table = Table(result_of(100, (1.0, 1.25, 2.0))._repr_html_())
    assert (len(table.rows), table.notes) == (31, ["and 70 more labels"])


def test_parameters_are_a_table_of_their_keys():
    kernels = [{"weight": 2.0, "theta_alpha": [1.0, 2.0, 3.3]}, {"theta_beta": 0.2}]
    parameters = CrfParameters().replace(**{"bilateral": kernels, "mean_field.temperature": 0.25})
    table = Table(parameters._repr_html_())
    values = {row[0]: row[1] for row in table.rows[1:]}
    assert values["bilateral.0.theta_alpha"] == "[1.0, 2.0, 3.3]"
    assert values["bilateral.1.theta_beta"] == "0.2"
    assert values["mean_field.temperature"] == "0.25"
    assert values["intensity.window"] == "not set"
    assert all(len(row) == 3 and row[2] for row in table.rows)
    # The keys are those of replace.
    assert parameters.replace(**{"bilateral.0.theta_alpha": (1.0, 2.0, 3.3), "bilateral.1.theta_beta": 0.2}) == parameters
    matrix = (1.0 - np.eye(50)).tolist()
    large = CrfParameters().replace(compatibility={"kind": "matrix", "matrix": matrix})
    assert len(large._repr_html_()) < 2 * len(parameters._repr_html_())


def test_text_in_tables_is_escaped():
    text = html_table("<script>", ("a&b",), [("<img onerror='x'>",), ("line\nbreak\x1b[2J",)], ["<p>"])
    assert not re.search(r"<(?!/?(table|caption|thead|tbody|tr|th|td|p)>)", text)
    table = Table(text)
    assert (table.caption, table.notes) == ("<script>", ["<p>"])
    assert table.rows == [["a&b"], ["<img onerror='x'>"], ["line\\nbreak\\x1b[2J"]]


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
    assert len(page) < 550
    listed = {words[0] for line in inspect.getdoc(crfrefine).splitlines() if line.startswith("    ") and (words := line.split())}
    public = {name for name in dir(crfrefine) if not name.startswith("_")}
    assert listed | {"CrfRefineError"} == public | {"monai"}
    assert [name for name in public if not any(name in line for line in page[:40])] == []


def test_dir_shows_the_public_names_only():
    errors = {"BackendUnavailableError", "CapacityError", "ConfigError", "CrfRefineError", "ExportError", "GridMismatchError"}
    always = {"CrfParameters", "RefinementResult", "RegionScheme", "refine"}
    others = {"CrfRnn", "InputError", "UnsupportedFormatError", "__version__", "crf_loss"}
    modules = {"errors", "layer", "metrics", "parameters", "refining_again", "statistics"}
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
