"""The study of learning end to end: it goes on where it was stopped, refuses what it cannot use, and says what its tests say."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from script_imports import importing_from
from study_helpers import BENCHMARKS, run_script

from crfrefine import CrfParameters
from crfrefine.cases.discovery import discover_cases
from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.statistics.comparison import Measurement, ResultTable

torch = pytest.importorskip("torch", reason="the study trains with PyTorch")

pytestmark = pytest.mark.long


@pytest.fixture
def script(one_torch_thread: None) -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of the study on one thread."""
    with importing_from(BENCHMARKS) as load:
        yield load


@pytest.fixture(scope="module")
def taste(tmp_path_factory) -> Path:
    """The output of a quick study of one fold."""
    output = tmp_path_factory.mktemp("taste")
    page = shutil.copy(BENCHMARKS.parent / "docs" / "reference" / "end-to-end.md", output)
    done = run_script("study_end_to_end.py", "--quick", "--folds", 1, "--workers", 1, "-o", output, "--document", page)
    assert done.returncode == 0, done.stderr
    return output


def make_unit(script, data: Path, folder: Path):
    study, arms = script("study_end_to_end"), script("end_to_end_arms")
    files = discover_cases(data / "images", None, None, data / "labels")
    setup = replace(study.OTHER, **study.TASTE)
    return arms.Unit("some cases", folder, (files[0], files[1]), (files[4],), ("background", "shell", "core", "cyst"), setup, 10)


def results_of(folder: Path) -> dict[str, list]:
    return {file.parent.name: json.loads(file.read_text())["measurements"] for file in sorted(folder.glob("*/result.json"))}


def test_a_taste_gives_all_tables_and_repeats_nothing(taste):
    fold = taste / "generated" / "cases_2" / "fold_1"
    found = results_of(fold)
    assert list(found) == ["added", "end_to_end", "longer", "network"]
    assert len({row["method"] for rows in found.values() for row in rows}) == 8
    text = (taste / "results.md").read_text()
    for expected in ("end to end against network trained on", "theta_alpha, mm", "paper: PROMISE12", "the network's own logits"):
        assert expected in text
    page = (taste / "end-to-end.md").read_text()
    for marker in ("summary", "dice", "networks", "learned", "paper", "cost"):
        assert "generated, 2 training cases" in page.partition(f"<!-- {marker}:begin -->")[2].partition(f"<!-- {marker}:end -->")[0]
    trained = CrfParameters.load(fold / "end_to_end" / "params.toml")
    assert trained.mean_field.num_iterations == 5
    assert trained.bilateral[0].theta_beta != CrfParameters().bilateral[0].theta_beta
    weights = (fold / "end_to_end" / "model.pt").stat().st_mtime_ns
    again = run_script("study_end_to_end.py", "--quick", "--folds", 1, "--workers", 1, "-o", taste)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("is there already") == 4
    assert (fold / "end_to_end" / "model.pt").stat().st_mtime_ns == weights
    assert (taste / "results.md").read_text() == text


def test_every_arm_trains_the_network_and_two_have_a_crf(taste):
    """Also the arm with the CRF added at the end, whose first steps are the network's."""
    fold = taste / "generated" / "cases_2" / "fold_1"
    states = {arm: torch.load(fold / arm / "model.pt", weights_only=True) for arm in ("network", "longer", "end_to_end", "added")}
    name = "network.head.weight"
    assert len({states[arm][name].numpy().tobytes() for arm in states}) == 4
    assert {arm for arm in states if any(key.startswith("crf.") for key in states[arm])} == {"end_to_end", "added"}


def test_a_study_that_ran_out_of_time_goes_on_to_the_same_result(script, taste, tmp_path):
    """Stopped in the middle of each arm, at whatever step the time is up."""
    training, arms = script("end_to_end_training"), script("end_to_end_arms")
    unit = make_unit(script, taste / "generated", tmp_path / "stopped")
    count = 0

    def is_over() -> bool:
        nonlocal count
        count += 1
        return count % 4 == 0

    for _ in range(20):
        try:
            arms.run_unit(unit, training.Watch(lambda text: None, is_over))
            break
        except training.TimeIsUpError:
            assert len(list(unit.folder.glob("*/checkpoint.pt"))) <= 1
    assert count > 20
    through = replace(unit, folder=tmp_path / "through")
    arms.run_unit(through, training.Watch(lambda text: None))
    assert results_of(unit.folder) == results_of(through.folder)
    assert not list(unit.folder.glob("*/checkpoint.pt"))


def test_patches_are_turned_in_millimeters(script):
    """The image holds the world's x, y and z: across a patch, its derivatives per mm are a rotation times the zoom."""
    cases = script("end_to_end_cases")
    spacing, grid = (1.0, 1.4, 1.8), (40, 36, 30)
    axes = [np.arange(n) * step for n, step in zip(grid, spacing, strict=True)]
    world = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    labels = np.zeros(grid, np.int64)
    labels[18:22, 16:20, 13:17] = 1
    case = cases.VolumeCase("case", world, world, labels, spacing)
    generator, turned = np.random.default_rng(0), 0
    for _ in range(12):
        patch = cases.draw_patch([case], (8, 8, 6), (4, 4, 1), generator)
        assert patch.labels.shape == (8, 8, 6)
        middle = patch.image[:, 2:6, 2:6, 2:4].numpy().astype(np.float64)
        slopes = np.stack([np.diff(middle, axis=axis).mean((1, 2, 3)) / spacing[axis - 1] for axis in (1, 2, 3)], axis=1)
        zoom = abs(np.linalg.det(slopes)) ** (1 / 3)
        # Coordinates of tens of mm in float32, interpolated twice.
        np.testing.assert_allclose(slopes.T @ slopes, zoom**2 * np.eye(3), atol=2e-3)
        assert 1 / 1.16 < zoom < 1.16
        is_turned = not np.allclose(slopes, np.eye(3), atol=1e-4)
        turned += is_turned
        if not is_turned:
            place = np.round(patch.image.numpy() / np.reshape(spacing, (3, 1, 1, 1))).astype(int)
            np.testing.assert_array_equal(labels[tuple(place)], patch.labels)
    assert 2 <= turned <= 10


def test_a_coarser_grid_has_means_and_the_most_frequent_labels(script, taste, tmp_path):
    cases = script("end_to_end_cases")
    files = discover_cases(taste / "generated" / "images", None, None, taste / "generated" / "labels")
    fine, coarse = cases.read_case(files[0]), cases.read_case(files[0], shrink=2)
    assert coarse.labels.shape == (14, 12, 6)
    assert coarse.spacing == pytest.approx((2.0, 2.4, 5.0))
    np.testing.assert_allclose(coarse.raw[1, 3, 4, 5], fine.raw[1, 6:8, 8:10, 10:12].mean(), rtol=1e-6)
    block = fine.labels[6:8, 4:6, 2:4]
    assert np.bincount(block.ravel())[coarse.labels[3, 2, 1]] == np.bincount(block.ravel()).max()


def synthetic_results(script, gain: float):
    """Nine cases; end to end gains in each, the CRF added at the end in every other one."""
    lines = []
    for number in range(9):
        values = dict.fromkeys(("network", "network trained on"), 0.8 + 0.01 * number)
        values |= {"end to end": values["network"] + gain * (1 + number), "CRF added at the end": values["network"] + (-1) ** number * 0.01}
        values |= {f"{name}, 5 steps": values[name] for name in ("end to end", "CRF added at the end")}
        values |= {f"{name}, the network's own logits": values[name] for name in ("end to end", "CRF added at the end")}
        for method, value in values.items():
            for metric in ("dice", "surface_dice"):
                lines.append(Measurement(f"case{number}", "heart", metric, value, method))
            for metric in ("nll", "certainty"):
                lines.append(Measurement(f"case{number}", ALL_LABELS, metric, 0.5, method))
    learned = {stage: [CrfParameters(), CrfParameters().replace(**{"bilateral.weight": 2.0})] for stage in ("end_to_end", "added")}
    seconds = dict.fromkeys(("network", "longer", "end_to_end", "added"), 60.0)
    head = script("environment").describe("torch")
    return script("end_to_end_findings").Results("hearts", "8", (1, 2), ResultTable(lines), learned, seconds, head)


@pytest.mark.parametrize(("gain", "word"), [(0.002, "better"), (-0.002, "worse")])
def test_the_sentence_says_what_the_tests_say(script, gain, word):
    """Nine cases of one sign: p is 2 / 512, times three after Holm."""
    sections = script("end_to_end_tables").make_sections([synthetic_results(script, gain)])
    change = f"{100 * gain * 5:+.2f}".replace("-", "−")
    assert f"end to end is {word} than network trained on ({change} points of Dice, p 0.012)" in sections["summary"]
    assert "CRF added at the end and network trained on do not differ significantly" in sections["summary"]
    assert "folds 1, 2 alone" in sections["summary"]
    assert "| 2 to 4 | 1.5 |" in sections["learned"]
    assert math.isclose(float(sections["cost"].splitlines()[2].split("|")[2]), 1.0)


def test_a_test_by_ranks_that_the_mean_does_not_share_is_said(script):
    """Thirteen small gains and one large loss: p is below 0.05, and the interval of the mean includes 0."""
    base = synthetic_results(script, 0.0)
    lines = [line for line in base.table if line.case == "case0"]
    gains = {f"case{number}": -0.2 if number == 13 else 0.01 + 0.001 * number for number in range(14)}
    found = [
        replace(line, case=case, value=line.value + gain * (line.method == "end to end" and line.metric == "dice"))
        for case, gain in gains.items()
        for line in lines
    ]
    sections = script("end_to_end_tables").make_sections([replace(base, table=ResultTable(found))])
    assert "end to end is better than network trained on in more cases than worse, but their mean may not differ" in sections["summary"]
