"""The example that learns from scribbles: quick on generated hearts, going on where it stopped, and what it says to bad input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel
import numpy as np
import pytest
from script_imports import importing_from

torch = pytest.importorskip("torch", reason="the example trains with PyTorch")

from crfrefine import crf_loss  # noqa: E402
from crfrefine.errors import ConfigError, GridMismatchError, InputError  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (ROOT / "examples", ROOT / "benchmarks")

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture
def example() -> Iterator[ModuleType]:
    """The example; it also imports from benchmarks/, which it finds by itself."""
    with importing_from(*FOLDERS) as load:
        yield load("scribbles")


@pytest.fixture
def hearts(example: ModuleType, tmp_path: Path) -> Path:
    return example.generate(tmp_path / "hearts", 4, seed=3)


def change(file: Path, changed: Any) -> None:
    """Rewrite a file with other voxels."""
    volume = nibabel.load(file)
    nibabel.Nifti1Image(changed(np.asarray(volume.dataobj)), volume.affine).to_filename(file)


def short(example: ModuleType, **changes: Any) -> Any:
    return replace(example.QUICK, num_steps=3, batch=2, width=4, **changes)


def test_the_quick_run_compares_three_trainings_and_goes_on_where_it_stopped(example, tmp_path, capsys):
    """What is there is not trained again; a fold that lost a result trains it again, to the same bit."""
    command = ["--quick", "--steps", "6", "--output", str(tmp_path)]
    table = example.main(command)
    assert tuple(table.methods) == example.WAYS
    assert len(table.cases) == 6
    first = capsys.readouterr().out
    assert first.count("step 6 of 6") == 6
    for text in ("mean Dice of 6 cases", "p (Holm)", "scribbles + crf_loss against scribbles, mean"):
        assert text in first
    file = tmp_path / "fold_2" / "scribbles_+_crf_loss.json"
    before = file.read_bytes()
    file.unlink()
    again = example.main(command)
    second = capsys.readouterr().out
    assert second.count("is there already") == 5
    assert second.count("step 6 of 6") == 1
    assert file.read_bytes() == before
    assert list(again) == list(table)
    with pytest.raises(InputError, match="made with other settings or cases; remove it"):
        example.main(["--quick", "--steps", "7", "--output", str(tmp_path)])


def test_results_of_other_strokes_are_not_taken_for_these(example, hearts, tmp_path):
    """One more stroke: only the training that saw no strokes is still the same."""
    schedule, out = short(example), tmp_path / "out"
    example.run(example.read_data(hearts), out, schedule, example.Recipe(), 2, [1])

    def more(voxels: np.ndarray) -> np.ndarray:
        voxels[0, 0, 0] = 0
        return voxels

    change(hearts / "scribbles" / "heart_2.nii.gz", more)
    data = example.read_data(hearts)
    with pytest.raises(InputError, match=r"fold_1.scribbles\.json: made with other settings or cases; remove it"):
        example.run(data, out, schedule, example.Recipe(), 2, [1])
    kept = (out / "fold_1" / "all_labels.json").read_bytes()
    for name in ("scribbles", "scribbles_+_crf_loss"):
        (out / "fold_1" / f"{name}.json").unlink()
    example.run(data, out, schedule, example.Recipe(), 2, [1])
    assert (out / "fold_1" / "all_labels.json").read_bytes() == kept


def test_with_crf_loss_similar_neighbors_agree_more_on_held_out_hearts(example, tmp_path):
    """8 % is half of what the loss falls by. What it does to Dice takes longer trainings to see."""
    data = example.read_data(example.generate(tmp_path / "hearts", 6, seed=0))
    schedule, recipe, found = replace(example.QUICK, num_steps=60), example.Recipe(weight=1.0, theta_alpha=6.0), {}
    for way in (example.SCRIBBLES, example.WITH_CRF):
        network = example.train(way, data.scribbled[:4], 4, schedule, recipe, 7, tmp_path / "network.pt")
        found[way] = 0.0
        for stack in data.labeled[4:]:
            logits = torch.tensor(example.predict(network, stack)).movedim(1, 0)
            image = torch.tensor(stack.image)
            found[way] += float(crf_loss(logits, image, stack.spacing, theta_alpha=6.0, theta_beta=0.15, intensity="none"))
    assert found[example.WITH_CRF] < 0.92 * found[example.SCRIBBLES]


def test_scribbles_lack_a_class(example, hearts):
    for file in (hearts / "scribbles").iterdir():
        change(file, lambda voxels: np.where(voxels == 2, np.uint8(4), voxels))
    data = example.read_data(hearts)
    with pytest.raises(InputError, match=r"fold 1: none of its 2 training cases has a scribble of label 2 \(wall\); draw some"):
        example.run(data, hearts / "out", short(example), example.Recipe(), 2)
    assert not (hearts / "out").exists()


def test_a_class_may_lack_in_some_cases(example, hearts):
    """Here in one of four: each fold trains on a case that has it."""
    data = example.read_data(hearts)
    labels = data.scribbled[0].labels
    labels[labels == 2] = data.unknown
    for split in example.make_folds(4, 2, example.SEED):
        data.require_all_labels(split.seen, "fold")


BAD: dict[str, tuple[str, Any, type[Exception], str]] = {
    "nothing drawn": ("scribbles", lambda voxels: np.full_like(voxels, 4), InputError, "heart_1.nii.gz: nobody drew anything"),
    "a value that is no label": (
        "scribbles",
        lambda voxels: voxels + np.uint8(1),
        InputError,
        r"heart_1.nii.gz: the value 5 is not one of",
    ),
    "unknown voxels in the labels": (
        "labels",
        lambda voxels: voxels + np.uint8(1),
        InputError,
        r"heart_1.nii.gz: the value 4 is not one of",
    ),
    "scribbles on another grid": ("scribbles", lambda voxels: voxels[:-1], GridMismatchError, "case 'heart_1': labels and image are on"),
    "labels on another grid": ("labels", lambda voxels: voxels[:, 2:], GridMismatchError, "case 'heart_1': labels and image are on"),
    "NaN in the image": ("images", lambda voxels: np.where(voxels > 100, np.nan, voxels), InputError, "heart_1_0000.nii.gz"),
}


@pytest.mark.parametrize(("folder", "changed", "kind", "message"), BAD.values(), ids=BAD)
def test_files_that_do_not_fit_are_named(example, hearts, folder, changed, kind, message):
    change(hearts / folder / f"heart_1{'_0000' if folder == 'images' else ''}.nii.gz", changed)
    with pytest.raises(kind, match=message):
        example.read_data(hearts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fold", "2", "3"], "--fold: there is no fold 3; expected 1 to 2"),
        (["--folds", "1"], "--folds: expected 2 to 6"),
        (["--steps", "0"], "--steps: expected 1 or more, got 0"),
        (["--weight", "-1"], r"weight -1\.0, .* expected a weight of 0 or more"),
        (["--ramp", "0"], r"ramp 0\.0: expected .* a ramp above 0"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_trained(example, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        example.main(["--quick", "--output", str(tmp_path), *options])
    assert not list(tmp_path.glob("fold_*"))


def test_missing_files_and_names_are_named(example, hearts):
    (hearts / "scribbles" / "heart_2.nii.gz").unlink()
    with pytest.raises(InputError, match="1 cases have labels or scribbles, not both: heart_2"):
        example.read_data(hearts)
    (hearts / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "left": 1}}))
    with pytest.raises(InputError, match=r'dataset\.json: no label "ignore"'):
        example.read_data(hearts)
    for labels in (None, {"background": 0, "both": [1, 2], "ignore": 4}):
        (hearts / "dataset.json").write_text(json.dumps({} if labels is None else {"labels": labels}))
        with pytest.raises(InputError, match=r'dataset\.json: no "labels"; expected names with a number each'):
            example.read_data(hearts)
    (hearts / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "ignore": 4}}))
    with pytest.raises(InputError, match=r"dataset\.json: no label besides background and ignore"):
        example.read_data(hearts)
    with pytest.raises(InputError, match="no folder images/; expected images/ labels/ scribbles/"):
        example.read_data(hearts / "labels")


def test_a_training_that_diverges_names_the_case_and_keeps_the_checkpoint(example, hearts, tmp_path):
    """An image far beyond all others: its logits overflow. The first checkpoint is that of the step before."""
    data = example.read_data(hearts)
    training = sys.modules["scribble_training"]
    checkpoint = tmp_path / "network.pt"
    schedule = short(example, rate=1e-3)
    training.train(example.SCRIBBLES, data.scribbled, 4, schedule, example.Recipe(), 1, checkpoint)
    before = checkpoint.read_bytes()
    broken = replace(data.scribbled[0], image=np.full_like(data.scribbled[0].image, 3e38))
    for way in example.WAYS:
        with pytest.raises(
            InputError, match=r"case heart_0: the logits of step 1 are not finite; the network of an earlier step is in .*network.pt"
        ):
            training.train(way, [broken], 4, schedule, example.Recipe(), 1, checkpoint)
        assert checkpoint.read_bytes() == before
    with pytest.raises(InputError, match="there is no checkpoint yet"):
        training.train(example.SCRIBBLES, [broken], 4, schedule, example.Recipe(), 1, tmp_path / "other.pt")
    assert [file.name for file in tmp_path.glob("*.pt*")] == ["network.pt"]


def test_a_gradient_that_is_not_finite_reaches_neither_weights_nor_checkpoint(example, hearts, tmp_path):
    """Logits and loss are finite for this image, and the gradient is not; every step would write a checkpoint."""
    data = example.read_data(hearts)
    training, checkpoint = sys.modules["scribble_training"], tmp_path / "network.pt"
    training.train(example.SCRIBBLES, data.scribbled, 4, short(example), example.Recipe(), 1, checkpoint)
    before = checkpoint.read_bytes()
    large = np.random.default_rng(0).standard_normal(data.scribbled[0].image.shape).astype(np.float32) * np.float32(1e35)
    broken = replace(data.scribbled[0], image=large)
    with pytest.raises(InputError, match="case heart_0: the gradients of step 1 are not finite; the network of an earlier step is in"):
        training.train(example.SCRIBBLES, [broken], 4, short(example), example.Recipe(), 1, checkpoint)
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_patches_without_any_stroke_are_no_nan(example, hearts, tmp_path, weight):
    """Their partial cross-entropy is 0, and the network stays finite."""
    data = example.read_data(hearts)
    bare = [replace(stack, labels=np.full_like(stack.labels, data.unknown)) for stack in data.scribbled]
    training = sys.modules["scribble_training"]
    recipe = example.Recipe(weight=weight, warm_up=0.0)
    network = training.train(example.WITH_CRF, bare, 4, short(example), recipe, 1, tmp_path / "network.pt")
    assert all(torch.isfinite(parameter).all() for parameter in network.parameters())


def test_outside_of_a_slice_nobody_drew(example, hearts):
    """A patch beyond the border has labels of background where labels are known, and unknown ones where there are strokes."""
    data = example.read_data(hearts)
    unet = sys.modules["study_unet"]
    for stacks, outside in ((data.labeled, 0), (data.scribbled, data.unknown)):
        image, labels, spacing = unet.cut_patches([(stacks[0], 0)] * 3, 256, np.random.default_rng(2))
        assert (labels[:, 0, 0] == outside).all()
        assert image.shape == (3, 1, 256, 256)
        for (y, x), (height, width) in zip(spacing, [stacks[0].spacing] * 3, strict=True):
            assert y / height == pytest.approx(x / width)
            assert 0.8 <= y / height <= 1.25
