"""The examples run and show what they say, in their quick form; so do the notebook, and the recipe
for a network that ends in the CRF.
"""

import ast
import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from cli_helpers import FAST, GRID_SHAPE, SPACING, load_nifti, run_here, save_nifti
from oracles import softmax
from script_imports import importing_from

import crfrefine
from crfrefine import CrfParameters, refine
from crfrefine.demo.phantom import make_phantom

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RECIPE_SPACING = (1.0, 1.3, 2.0)


@pytest.fixture
def example():
    """Import an example; one of them also imports from benchmarks/, which it finds by itself."""
    with importing_from(EXAMPLES, EXAMPLES.parent / "benchmarks") as load:
        yield load


SUBJECTS = {"sub-01_acq-x": "sub-01/anat", "sub-02_ses-a": "sub-02/ses-a/anat"}


def write_dataset(dataset):
    """Two cases of two modalities, with the probabilities of a network in derivatives."""
    for seed, (name, folder) in enumerate(SUBJECTS.items()):
        phantom = make_phantom(seed, GRID_SHAPE, SPACING)
        for suffix, values in zip(("T1w", "FLAIR"), phantom.image, strict=True):
            save_nifti(dataset / folder / f"{name}_{suffix}.nii.gz", values.astype(np.float32))
        probabilities = np.moveaxis(softmax(phantom.logits), 0, -1).astype(np.float32)
        save_nifti(
            dataset / "derivatives" / "net" / folder / f"{name}_desc-net_probseg.nii.gz",
            probabilities,
        )
    content = {"Name": "Phantoms", "BIDSVersion": "1.9.0"}
    (dataset / "dataset_description.json").write_text(json.dumps(content), encoding="utf-8")


def test_each_segmentation_is_refined_into_a_derived_dataset(tmp_path):
    """By `examples/bids.py`, of the derivatives of a BIDS dataset."""
    dataset = tmp_path / "data set"
    output = tmp_path / "data set" / "derivatives" / "crf"
    write_dataset(dataset)
    words = (
        dataset,
        "net",
        output,
        "--modality",
        "FLAIR",
        "--modality",
        "T1w",
        "--threads",
        "1",
        *FAST,
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(crfrefine.__file__).parents[1])}
    subprocess.run(
        [sys.executable, EXAMPLES / "bids.py", *words], env=environment, timeout=120, check=True
    )
    parameters = CrfParameters().replace(**{"mean_field.filter": "lattice"})
    for name, folder in SUBJECTS.items():
        images = [f"{folder}/{name}_{suffix}.nii.gz" for suffix in ("FLAIR", "T1w")]
        network = f"derivatives/net/{folder}/{name}_desc-net_probseg.nii.gz"
        image = np.stack([load_nifti(dataset / path) for path in images])
        scores = np.moveaxis(load_nifti(dataset / network), -1, 0)
        wanted = refine(
            scores, image, spacing=SPACING, parameters=parameters, input_type="probabilities"
        )
        np.testing.assert_array_equal(
            load_nifti(output / folder / f"{name}_desc-crf_dseg.nii.gz"), wanted.label_map
        )
        sidecar = json.loads(
            (output / folder / f"{name}_desc-crf_dseg.json").read_text(encoding="utf-8")
        )
        assert sidecar["Sources"] == [f"bids:raw:{path}" for path in (*images, network)]
    described = json.loads((output / "dataset_description.json").read_text(encoding="utf-8"))
    assert described["DatasetType"] == "derivative"
    assert (output / described["DatasetLinks"]["raw"]).samefile(dataset)


def test_scribbles_of_a_viewer_correct_the_network(example):
    """The part of `examples/monai_label.py` that needs no MONAI Label.

    Values 5 and 6 are background and label 2 as a viewer draws them; 1 to 3 are the segmentation
    around them.
    """
    phantom = make_phantom(0, GRID_SHAPE, SPACING)
    scribbles = phantom.labels.astype(np.uint8)
    strokes = np.zeros(GRID_SHAPE, np.uint8)
    for value, stroke, label in ((5, 255, 0), (6, 2, 2)):
        wrong = np.argwhere(
            (phantom.logits.argmax(axis=0) != phantom.labels) & (phantom.labels == label)
        )
        place = tuple(wrong[len(wrong) // 2])
        scribbles[place] = value
        strokes[place] = stroke
    pytest.importorskip("monai", reason="the example's transforms are MONAI's")
    found = example("monai_label").correct(
        phantom.logits, phantom.image, scribbles, SPACING, {5: 0, 6: 2}, threads=1
    )
    options = {"spacing": SPACING, "threads": 1}
    plain, wanted = (
        refine(phantom.logits, phantom.image, strokes=drawn, **options) for drawn in (None, strokes)
    )
    np.testing.assert_array_equal(found, wanted.label_map)
    assert (found != plain.label_map).any()


# ---- Examples that train, on one thread


@pytest.fixture
def torch(request):
    module = pytest.importorskip("torch", reason="the examples train with PyTorch")
    request.getfixturevalue("one_torch_thread")
    return module


@pytest.mark.long
@pytest.mark.usefixtures("torch")
def test_the_quick_run_compares_three_trainings_and_goes_on_where_it_stopped(
    example, tmp_path, capsys
):
    """What is there is not trained again; a fold that lost a result trains it again, to the same
    bit.
    """
    module = example("scribbles")
    command = ["--quick", "--steps", "6", "--output", str(tmp_path)]
    table = module.main(command)
    assert tuple(table.methods) == module.WAYS
    assert len(table.cases) == 6
    first = capsys.readouterr().out
    assert first.count("step 6 of 6") == 6
    file = tmp_path / "fold_2" / "scribbles_+_crf_loss.json"
    before = file.read_bytes()
    file.unlink()
    again = module.main(command)
    second = capsys.readouterr().out
    assert second.count("is there already") == 5
    assert second.count("step 6 of 6") == 1
    assert file.read_bytes() == before
    assert list(again) == list(table)


@pytest.fixture
def recipe(torch, example, monkeypatch):
    module = example("end_to_end")
    monkeypatch.setattr(module, "GRID", (16, 12, 8))
    monkeypatch.setattr(module, "SPACING", RECIPE_SPACING)
    return module


def make_model(recipe):
    recipe.torch.manual_seed(0)
    crf = recipe.CrfRnn(recipe.NUM_LABELS, recipe.NUM_MODALITIES, 3, recipe.START, spatial=True)
    return recipe.Segmenter(recipe.SmallUNet(), crf)


@pytest.mark.long
def test_a_stopped_training_goes_on_to_the_same_end(recipe, torch, tmp_path):
    """In half precision, stopped after a volume of the second epoch; gradients are long enough to
    be cut.
    """
    volumes = [recipe.make_volume(seed) for seed in range(2)]
    options = {"autocast": recipe.PRECISIONS["float16"]}
    through, stopped, again = (make_model(recipe) for _ in range(3))
    epochs = iter([volumes, [volumes[0], None]])
    stopping = type(
        "Stopping", (), {"__len__": lambda _: 2, "__iter__": lambda _: iter(next(epochs))}
    )()
    for model, given, checkpoint in (
        (through, volumes, None),
        (stopped, stopping, tmp_path / "t.pt"),
        (again, volumes, tmp_path / "t.pt"),
    ):
        with torch.no_grad():
            model.network.head.weight.mul_(300.0 if model is not again else 1.0)
        torch.manual_seed(5)
        with contextlib.suppress(
            *([TypeError] if model is stopped else [])
        ):  # of the volume that is None
            recipe.train(model, given, RECIPE_SPACING, 1, checkpoint, **options)
    assert epochs.__length_hint__() == 0
    found = again.state_dict()
    wanted = through.state_dict()
    assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []


@pytest.mark.long
def test_the_saved_parameters_are_the_layer_with_more_steps(recipe, torch, tmp_path, capsys):
    file = tmp_path / "trained.toml"
    model = recipe.main(["--cases", "1", "--epochs", "1", "--output", str(file)])
    learned = CrfParameters.load(file)
    assert (model.crf.num_iterations, learned.mean_field.num_iterations) == (5, 10)
    assert "refined: Dice" in capsys.readouterr().out
    volume = recipe.make_volume(9)
    with torch.no_grad():
        logits = model.network(volume["image"])
        wanted = model.crf(logits, volume["image"], RECIPE_SPACING)[0].softmax(0).numpy()
    same = learned.replace(**{"mean_field.num_iterations": 5, "mean_field.tolerance": 0.0})
    found = refine(
        logits[0].numpy(), volume["image"][0].numpy(), spacing=RECIPE_SPACING, parameters=same
    )
    # Rounding of float32 over five steps; the file writes weights with the digits of float32.
    np.testing.assert_allclose(found.marginals, wanted, atol=2e-5)


@pytest.mark.long
def test_with_monai_infer_goes_on_where_training_ended(recipe, example, tmp_path):
    pytest.importorskip("monai", reason="MONAI is not installed")
    module = example("end_to_end_monai")
    module.main(["--cases", "2", "--epochs", "1", "--autocast", "--output", str(tmp_path)])
    out = tmp_path / "refined"
    images = tmp_path / "images"
    parameters = tmp_path / "params.toml"
    run_here(
        "infer",
        "-i",
        images,
        "-p",
        tmp_path / "logits",
        "-o",
        out,
        "-c",
        parameters,
        "--threads",
        "1",
        status=0,
    )
    for case in ("case1000", "case1001", "case1002"):
        image = np.stack(
            [load_nifti(images / f"{case}_{modality:04d}.nii.gz") for modality in range(2)]
        )
        logits = np.moveaxis(load_nifti(tmp_path / "logits" / f"{case}.nii.gz"), -1, 0)
        wanted = refine(logits, image, spacing=RECIPE_SPACING, parameters=parameters).label_map
        np.testing.assert_array_equal(load_nifti(out / f"{case}.nii.gz"), wanted)


# ---- The notebook for beginners, whose cells are run as Jupyter does, without Jupyter

NOTEBOOK = EXAMPLES / "first_steps.ipynb"
CONTENT = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
CODE = [cell for cell in CONTENT["cells"] if cell["cell_type"] == "code"]


def run_cell(source, names):
    """Run a cell; return what it prints, and its last expression as text."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, NOTEBOOK.name, "exec"), names)
        value = (
            None
            if last is None
            else eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names)
        )
    return printed.getvalue(), None if value is None else repr(value)


def stored(cell):
    """What a cell printed, and its value as text, when the notebook was executed."""
    printed = "".join(
        "".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream"
    )
    values = [
        "".join(out["data"]["text/plain"])
        for out in cell["outputs"]
        if out["output_type"] == "execute_result"
    ]
    return printed, values[0] if values else None


def in_process(words, **_):
    """Run a command as the notebook does, but in this process, which has imported what it needs."""
    assert words[:3] == [sys.executable, "-m", "crfrefine"]
    done = run_here(
        *words[3:], *(("--processes", 1) if words[3] == "evaluate" else ("--threads", 1))
    )
    return subprocess.CompletedProcess(words, done.status, done.stdout, done.stderr)


@pytest.mark.long
def test_every_cell_gives_what_the_notebook_shows(tmp_path, monkeypatch):
    matplotlib.use("agg")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("subprocess.run", in_process)
    names = {"__name__": "__main__"}
    for number, cell in enumerate(CODE, start=1):
        assert cell["execution_count"] == number, "executed from top to bottom"
        printed, value = run_cell("".join(cell["source"]), names)
        shown_printed, shown = stored(cell)
        assert printed == shown_printed
        if shown is None:
            assert (
                any(
                    "image/png" in out["data"]
                    for out in cell["outputs"]
                    if out["output_type"] == "display_data"
                )
                or value is None
            )
        else:
            assert value.split() == shown.split(), "Jupyter breaks long lists into lines"
