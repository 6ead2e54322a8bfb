"""The example that learns from scribbles: quick on generated hearts, going on where it stopped, and what it says to bad input."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import nibabel
import numpy as np
import pytest
from script_imports import importing_from

torch = pytest.importorskip("torch", reason="the example trains with PyTorch")

from crfrefine.errors import ConfigError, GridMismatchError, InputError  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (ROOT / "examples", ROOT / "benchmarks")

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_torch_thread")]


@pytest.fixture
def example() -> Iterator[ModuleType]:
    """The example; it also imports from benchmarks/, which it finds by itself."""
    with importing_from(*FOLDERS) as load:
        yield load("scribbles")


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


def test_files_that_do_not_fit_are_named(example, tmp_path):
    for number, (folder, changed, kind, message) in enumerate(
        (
            ("scribbles", lambda voxels: np.full_like(voxels, 4), InputError, "heart_1.nii.gz: nobody drew anything"),
            ("labels", lambda voxels: voxels + np.uint8(1), InputError, "heart_1.nii.gz: the value 4 is not one of"),
            ("labels", lambda voxels: voxels[:, 2:], GridMismatchError, "case 'heart_1': labels and image are on"),
            ("images", lambda voxels: np.where(voxels > 100, np.nan, voxels), InputError, "heart_1_0000.nii.gz"),
        )
    ):
        hearts = example.generate(tmp_path / str(number), 2, seed=3)
        file = hearts / folder / f"heart_1{'_0000' if folder == 'images' else ''}.nii.gz"
        volume = nibabel.load(file)
        nibabel.Nifti1Image(changed(np.asarray(volume.dataobj)), volume.affine).to_filename(file)
        with pytest.raises(kind, match=message):
            example.read_data(hearts)


def test_options_out_of_range_are_refused_before_anything_is_trained(example, tmp_path):
    for options, message in (
        (["--fold", "2", "3"], "--fold: there is no fold 3; expected 1 to 2"),
        (["--folds", "1"], "--folds: expected 2 to 6"),
        (["--steps", "0"], "--steps: expected 1 or more, got 0"),
        (["--weight", "-1"], r"weight -1\.0, .* expected a weight of 0 or more"),
        (["--ramp", "0"], r"ramp 0\.0: expected .* a ramp above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            example.main(["--quick", "--output", str(tmp_path), *options])
    assert not list(tmp_path.glob("fold_*"))
