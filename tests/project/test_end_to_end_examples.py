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


def assert_equal(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name


class StopHereError(Exception):
    """What ends a training from outside."""


def stopping_after(count: int, batches: list) -> Iterator:
    yield from batches[:count]
    raise StopHereError


def test_each_phase_trains_what_it_says(recipe):
    volumes = [recipe.make_volume(seed) for seed in range(2)]
    model = make_model(recipe)
    for phase in recipe.PHASES:
        before = values_of(model.network), values_of(model.crf)
        optimizer = recipe.prepare(model, phase)
        recipe.train_epoch(model, volumes, SPACING, optimizer, autocast=False)
        for values, module, rate in zip(before, (model.network, model.crf), (phase.network_rate, phase.crf_rate), strict=True):
            moved = [name for name, value in module.state_dict().items() if not torch.equal(value, values[name])]
            assert bool(moved) == (rate > 0), phase.name
            # What is frozen costs no backward pass, and its dropout and batch statistics rest.
            assert {parameter.requires_grad for parameter in module.parameters()} == {rate > 0}, phase.name
        assert model.network.training == (phase.network_rate > 0)
    # Bandwidths too, in the last phases.
    assert model.crf.theta_alpha.item() != recipe.START.bilateral[0].theta_alpha


def test_a_stopped_training_goes_on_to_the_same_end(recipe, tmp_path):
    volumes = [recipe.make_volume(seed) for seed in range(2)]
    through, stopped = make_model(recipe), make_model(recipe)
    recipe.train(through, volumes, SPACING, 2, None)
    checkpoint = tmp_path / "training.pt"

    class Volumes:
        """The loader of a run that stops in the second epoch of the second phase."""

        epochs = 0

        def __iter__(self):
            self.epochs += 1
            return stopping_after(1, volumes) if self.epochs == 4 else iter(volumes)

    with pytest.raises(StopHereError):
        recipe.train(stopped, Volumes(), SPACING, 2, checkpoint)
    again = make_model(recipe)
    recipe.train(again, volumes, SPACING, 2, checkpoint)
    assert_equal(values_of(again), values_of(through))


def test_the_layer_works_under_autocast(recipe):
    """The network returns bfloat16; the CRF computes in float32, and gradients reach both."""
    model = make_model(recipe)
    volume = recipe.make_volume(3)
    model.refines = True
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.network(volume["image"])
        refined = model.crf(logits, volume["image"], SPACING)
    assert (logits.dtype, refined.dtype) == (torch.bfloat16, torch.float32)
    exact = model.crf(logits.float(), volume["image"], SPACING)
    assert torch.equal(refined, exact)
    for phase in recipe.PHASES:
        loss = recipe.train_epoch(model, [volume], SPACING, recipe.prepare(model, phase), autocast=True)
        assert np.isfinite(loss)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    assert model.crf.log_theta_beta.grad.abs().max() > 0


@pytest.mark.parametrize("phase", [0, 2], ids=["network", "both"])
def test_a_step_that_is_not_finite_names_its_volume_and_changes_nothing(recipe, tmp_path, phase):
    """Weights that overflow stand for whatever makes a loss NaN; the checkpoint of the epoch before stays."""
    model, checkpoint = make_model(recipe), tmp_path / "training.pt"
    recipe.train(model, [recipe.make_volume(0)], SPACING, 1, checkpoint)
    content = checkpoint.read_bytes()
    with torch.no_grad():
        model.network.head.bias[1] = float("nan")
    before = values_of(model)
    with pytest.raises(FloatingPointError, match=r"^volume 7: its loss is nan.*checkpoint"):
        recipe.train_epoch(model, [recipe.make_volume(7)], SPACING, recipe.prepare(model, recipe.PHASES[phase]), autocast=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name
    assert checkpoint.read_bytes() == content


def test_volumes_that_cannot_be_used_are_refused_by_name(recipe):
    volume = recipe.make_volume(5)
    other = volume | {"label": volume["label"][..., :-1]}
    with pytest.raises(ValueError, match=r"volume 5: .*different grids: the image is \(16, 12, 8\), the labels are \(16, 12, 7\)"):
        recipe.check_batch(other)
    broken = volume["image"].clone()
    broken[0, 1, 2, 3, 4] = float("inf")
    with pytest.raises(ValueError, match="volume 5: the image holds values that are not finite"):
        recipe.check_batch(volume | {"image": broken})


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
