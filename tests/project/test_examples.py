"""The examples run and show what they say, in their quick form; so does the recipe for a network that ends in the CRF."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import load_nifti, run_here
from script_imports import importing_from

from crfrefine import CrfParameters, refine

torch = pytest.importorskip("torch", reason="the examples train with PyTorch")


pytestmark = pytest.mark.long

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SPACING = (1.0, 1.3, 2.0)


@pytest.fixture
def example(one_torch_thread):
    """Import an example on one thread; one of them also imports from benchmarks/, which it finds by itself."""
    with importing_from(EXAMPLES, EXAMPLES.parent / "benchmarks") as load:
        yield load


def test_the_quick_run_compares_three_trainings_and_goes_on_where_it_stopped(example, tmp_path, capsys):
    """What is there is not trained again; a fold that lost a result trains it again, to the same bit."""
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
def recipe(example, monkeypatch):
    module = example("end_to_end")
    monkeypatch.setattr(module, "GRID", (16, 12, 8))
    monkeypatch.setattr(module, "SPACING", SPACING)
    return module


def make_model(recipe):
    torch.manual_seed(0)
    crf = recipe.CrfRnn(recipe.NUM_LABELS, recipe.NUM_MODALITIES, 3, recipe.START, spatial=True)
    return recipe.Segmenter(recipe.SmallUNet(), crf)


def test_a_stopped_training_goes_on_to_the_same_end(recipe, tmp_path):
    """In half precision, stopped after a volume of the second epoch; gradients are long enough to be cut."""
    volumes, options = [recipe.make_volume(seed) for seed in range(2)], {"autocast": recipe.PRECISIONS["float16"]}
    through, stopped, again = (make_model(recipe) for _ in range(3))
    epochs = iter([volumes, [volumes[0], None]])
    stopping = type("Stopping", (), {"__len__": lambda _: 2, "__iter__": lambda _: iter(next(epochs))})()
    for model, given, checkpoint in ((through, volumes, None), (stopped, stopping, tmp_path / "t.pt"), (again, volumes, tmp_path / "t.pt")):
        with torch.no_grad():
            model.network.head.weight.mul_(300.0 if model is not again else 1.0)
        torch.manual_seed(5)
        with contextlib.suppress(*([TypeError] if model is stopped else [])):  # of the volume that is None
            recipe.train(model, given, SPACING, 1, checkpoint, **options)
    assert epochs.__length_hint__() == 0
    found, wanted = again.state_dict(), through.state_dict()
    assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []


def test_the_saved_parameters_are_the_layer_with_more_steps(recipe, tmp_path, capsys):
    file = tmp_path / "trained.toml"
    model = recipe.main(["--cases", "1", "--epochs", "1", "--output", str(file)])
    learned = CrfParameters.load(file)
    assert (model.crf.num_iterations, learned.mean_field.num_iterations) == (5, 10)
    assert "refined: Dice" in capsys.readouterr().out
    volume = recipe.make_volume(9)
    with torch.no_grad():
        logits = model.network(volume["image"])
        wanted = model.crf(logits, volume["image"], SPACING)[0].softmax(0).numpy()
    same = learned.replace(**{"mean_field.num_iterations": 5, "mean_field.tolerance": 0.0})
    found = refine(logits[0].numpy(), volume["image"][0].numpy(), spacing=SPACING, parameters=same)
    # Rounding of float32 over five steps; the file writes weights with the digits of float32.
    np.testing.assert_allclose(found.marginals, wanted, atol=2e-5)


def test_with_monai_infer_goes_on_where_training_ended(recipe, example, tmp_path):
    pytest.importorskip("monai", reason="MONAI is not installed")
    module = example("end_to_end_monai")
    module.main(["--cases", "2", "--epochs", "1", "--autocast", "--output", str(tmp_path)])
    out = tmp_path / "refined"
    run_here(
        "infer", "-i", tmp_path / "images", "-p", tmp_path / "logits", "-o", out, "-c", tmp_path / "params.toml", "--threads", "1", status=0
    )
    for case in ("case1000", "case1001", "case1002"):
        image = np.stack([load_nifti(tmp_path / "images" / f"{case}_{modality:04d}.nii.gz") for modality in range(2)])
        logits = np.moveaxis(load_nifti(tmp_path / "logits" / f"{case}.nii.gz"), -1, 0)
        wanted = refine(logits, image, spacing=SPACING, parameters=tmp_path / "params.toml").label_map
        np.testing.assert_array_equal(load_nifti(out / f"{case}.nii.gz"), wanted)
