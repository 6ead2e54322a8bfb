"""The recipes for a network with the CRF as its last layer: what they freeze, save and refuse, and that `infer` continues them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

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
def example(one_torch_thread: None) -> Iterator[Callable[[str], ModuleType]]:
    """Import an example on one thread."""
    with importing_from(EXAMPLES) as load:
        yield load


@pytest.fixture
def recipe(example, monkeypatch) -> ModuleType:
    module = example("end_to_end")
    monkeypatch.setattr(module, "GRID", (16, 12, 8))
    monkeypatch.setattr(module, "SPACING", SPACING)
    return module


def make_model(recipe: ModuleType):
    torch.manual_seed(0)
    crf = recipe.CrfRnn(recipe.NUM_LABELS, recipe.NUM_MODALITIES, 3, recipe.START, spatial=True)
    return recipe.Segmenter(recipe.SmallUNet(), crf)


def values_of(module) -> dict:
    return {name: value.clone() for name, value in module.state_dict().items()}


class StopHereError(Exception):
    """What ends a training from outside."""


def test_each_phase_trains_what_it_says(recipe):
    volumes = [recipe.make_volume(seed) for seed in range(2)]
    model = make_model(recipe)
    for phase in recipe.PHASES:
        before = values_of(model.network), values_of(model.crf)
        optimizer = recipe.prepare(model, phase)
        recipe.train_epoch(model, volumes, SPACING, optimizer, recipe.make_scaler(model, None))
        for values, module, rate in zip(before, (model.network, model.crf), (phase.network_rate, phase.crf_rate), strict=True):
            moved = [name for name, value in module.state_dict().items() if not torch.equal(value, values[name])]
            assert bool(moved) == (rate > 0), phase.name
            # What is frozen costs no backward pass, and its dropout and batch statistics rest.
            assert {parameter.requires_grad for parameter in module.parameters()} == {rate > 0}, phase.name
        assert model.network.training == (phase.network_rate > 0)
    # Bandwidths too, in the last phases.
    assert model.crf.theta_alpha.item() != recipe.START.bilateral[0].theta_alpha


class Shuffled:
    """Volumes in another order each epoch, as a loader's; it may stop after the first volume of an epoch, counted from 1."""

    def __init__(self, volumes: list, stops_in: int = 0) -> None:
        self.volumes, self.stops_in, self.epoch = volumes, stops_in, 0

    def __iter__(self):
        self.epoch += 1
        for count, index in enumerate(torch.randperm(len(self.volumes))):
            if self.epoch == self.stops_in and count == 1:
                raise StopHereError
            yield self.volumes[index]


def test_a_stopped_training_goes_on_to_the_same_end(recipe, tmp_path):
    """In half precision; volumes come in random order, and gradients are long enough to be cut."""
    volumes = [recipe.make_volume(seed) for seed in range(2)]
    through, stopped, again = (make_model(recipe) for _ in range(3))
    for model in (through, stopped):
        with torch.no_grad():
            model.network.head.weight.mul_(300.0)
    checkpoint, options = tmp_path / "training.pt", {"autocast": recipe.PRECISIONS["float16"]}
    torch.manual_seed(5)
    recipe.train(through, Shuffled(volumes), SPACING, 1, None, **options)
    torch.manual_seed(5)
    with pytest.raises(StopHereError):
        recipe.train(stopped, Shuffled(volumes, 2), SPACING, 1, checkpoint, **options)
    recipe.train(again, Shuffled(volumes), SPACING, 1, checkpoint, **options)
    found, wanted = values_of(again), values_of(through)
    assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []


def test_the_layer_works_under_autocast(recipe):
    """The network returns half precision; the CRF computes in float32."""
    model, autocast, volume = make_model(recipe), recipe.PRECISIONS["float16"], recipe.make_volume(3)
    with torch.autocast("cpu", autocast):
        logits = model.network(volume["image"])
        refined = model.crf(logits, volume["image"], SPACING)
    assert (logits.dtype, refined.dtype) == (autocast, torch.float32)
    assert torch.equal(refined, model.crf(logits.float(), volume["image"], SPACING))
    assert [recipe.make_scaler(model, recipe.PRECISIONS[name]).is_enabled() for name in ("float16", "bfloat16")] == [True, False]


def test_volumes_that_cannot_be_used_are_refused_by_name(recipe):
    volume = recipe.make_volume(5)
    broken = torch.full_like(volume["image"], float("inf"))
    for changed, message in (
        ({"label": volume["label"][..., :-1]}, r"different grids: the image is \(16, 12, 8\), the labels are \(16, 12, 7\)"),
        ({"image": broken}, "the image holds values that are not finite"),
        ({"label": volume["label"] + (volume["label"] == 2)}, "the labels go from 0 to 3; expected 0 to 2"),
    ):
        with pytest.raises(ValueError, match=f"volume 5: .*{message}"):
            recipe.check_batch(volume | changed)


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
    done = run_here(
        "infer", "-i", tmp_path / "images", "-p", tmp_path / "logits", "-o", out, "-c", tmp_path / "params.toml", "--threads", "1"
    )
    assert done.status == 0, done.stderr
    for case in ("case1000", "case1001", "case1002"):
        image = np.stack([load_nifti(tmp_path / "images" / f"{case}_{modality:04d}.nii.gz") for modality in range(2)])
        logits = np.moveaxis(load_nifti(tmp_path / "logits" / f"{case}.nii.gz"), -1, 0)
        wanted = refine(logits, image, spacing=SPACING, parameters=tmp_path / "params.toml").label_map
        np.testing.assert_array_equal(load_nifti(out / f"{case}.nii.gz"), wanted)
