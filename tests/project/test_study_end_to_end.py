"""The study of learning end to end: it goes on where it was stopped, refuses what it cannot use, and says what its tests say."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import nibabel
import numpy as np
import pytest
from cli_helpers import load_nifti
from script_imports import importing_from
from study_helpers import BENCHMARKS, run_script

from crfrefine import CrfParameters
from crfrefine.cases.discovery import discover_cases
from crfrefine.errors import GridMismatchError, InputError
from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.statistics.comparison import Measurement, ResultTable

torch = pytest.importorskip("torch", reason="the study trains with PyTorch")


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


def test_all_arms_begin_with_the_weights_of_the_one_trained_network(script, taste, tmp_path, monkeypatch):
    """Their cases and their seed, too, are the same; an arm that made its network anew would have other weights than the trained ones."""
    arms, training = script("end_to_end_arms"), script("end_to_end_training")
    begun = []

    def train(segmenter, cases, phases, sides, seed, file, watch):
        weights = {name: value.clone() for name, value in segmenter.network.state_dict().items()}
        begun.append((file.parent.name, weights, [case.case_id for case in cases], seed))
        return training.train(segmenter, cases, phases, sides, seed, file, watch)

    monkeypatch.setattr(arms, "train", train)
    unit = make_unit(script, taste / "generated", tmp_path / "arms")
    arms.run_unit(unit, training.Watch(lambda text: None))
    assert [name for name, *_ in begun] == ["network", "longer", "end_to_end", "added"]
    model = torch.load(unit.folder / "network" / "model.pt", weights_only=True)
    trained = {name.removeprefix("network."): value for name, value in model.items()}
    assert not all(torch.equal(value, trained[name]) for name, value in begun[0][1].items())
    for name, weights, cases, seed in begun[1:]:
        assert weights.keys() == trained.keys(), name
        assert all(torch.equal(value, trained[key]) for key, value in weights.items()), name
        assert (cases, seed) == begun[1][2:], name


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


@pytest.mark.parametrize(
    ("crf_rate", "expected"), [(0.0, "the loss of step 1 of more is nan"), (0.1, "step 1 of more: image: modality 0 .* not")]
)
def test_a_step_that_is_not_finite_names_its_case_and_keeps_the_checkpoint(script, taste, tmp_path, crf_rate, expected):
    cases, network, training = (script(f"end_to_end_{name}") for name in ("cases", "network", "training"))
    files = discover_cases(taste / "generated" / "images", None, None, taste / "generated" / "labels")
    good = cases.read_case(files[0])
    bad = replace(good, case_id="case9", image=np.full_like(good.image, np.nan))
    segmenter = network.Segmenter(network.VolumeUNet(2, 4, 4, (True, True, False)), network.make_crf(4, 2))
    checkpoint, watch = tmp_path / "checkpoint.pt", training.Watch(lambda text: None)
    phases = [training.Phase("network", 25, 1e-3)]
    training.train(segmenter, [good], phases, (8, 12, 4), 0, checkpoint, watch)
    content = checkpoint.read_bytes()
    before = {name: value.clone() for name, value in segmenter.state_dict().items()}
    with pytest.raises(InputError, match=f"case 'case9'.* {expected}"):
        training.train(segmenter, [bad], [*phases, training.Phase("more", 2, 1e-3, crf_rate)], (8, 12, 4), 0, checkpoint, watch)
    assert checkpoint.read_bytes() == content
    assert all(torch.equal(value, before[name]) for name, value in segmenter.state_dict().items())


def test_a_crf_that_does_not_learn_takes_no_part(script, taste, tmp_path):
    """The network that a CRF is added to is trained on its own logits: bit for bit as one without a CRF."""
    cases, network, training = (script(f"end_to_end_{name}") for name in ("cases", "network", "training"))
    files = discover_cases(taste / "generated" / "images", None, None, taste / "generated" / "labels")
    case = cases.read_case(files[0])
    found = {}
    for name, crf in (("alone", None), ("with", network.make_crf(4, 2))):
        torch.manual_seed(0)
        segmenter = network.Segmenter(network.VolumeUNet(2, 4, 4, (True, True, False)), crf)
        phases = [training.Phase("network", 3, 1e-3)]
        training.train(segmenter, [case], phases, (8, 12, 4), 0, tmp_path / name, training.Watch(lambda text: None))
        found[name] = segmenter.network.state_dict()
    assert all(torch.equal(value, found["with"][name]) for name, value in found["alone"].items())


@pytest.mark.parametrize("change", ["shape", "affine"])
def test_labels_on_another_grid_are_refused(script, taste, tmp_path, change):
    data = shutil.copytree(taste / "generated", tmp_path / "data")
    file = data / "labels" / "case0.nii.gz"
    labels, affine = load_nifti(file), nibabel.load(file).affine
    if change == "shape":
        labels = labels[:, :-1]
    else:
        affine = affine @ np.diag([1.0, 1.0, 1.1, 1.0])
    nibabel.Nifti1Image(labels, affine).to_filename(file)
    files = discover_cases(data / "images", None, None, data / "labels")
    shapes = "28×23×12" if change == "shape" else "28×24×12, 1.00×1.20×2.75 mm"
    with pytest.raises(GridMismatchError, match=f"(?s)case 'case0'.*{shapes}.*28×24×12, 1.00×1.20×2.50 mm"):
        script("end_to_end_cases").read_case(files[0])


def test_values_that_are_no_labels_are_refused(script, taste, tmp_path):
    """By name, before a training begins; dataset.json declares three structures."""
    data = shutil.copytree(taste / "generated", tmp_path / "data")
    file = data / "labels" / "case4.nii.gz"
    nibabel.Nifti1Image(load_nifti(file) + np.uint8(2), nibabel.load(file).affine).to_filename(file)
    unit = make_unit(script, data, tmp_path / "out")
    unit = replace(unit, seen=unit.held_out, held_out=unit.seen)
    with pytest.raises(InputError, match=r"labels/case4.nii.gz: the values go from 2 to 5; dataset.json declares the labels 0 to 3"):
        script("end_to_end_arms").run_unit(unit, script("end_to_end_training").Watch(lambda text: None))


def test_images_that_are_not_finite_are_refused(script, taste, tmp_path):
    data = shutil.copytree(taste / "generated", tmp_path / "data")
    file = data / "images" / "case0_0001.nii.gz"
    values = load_nifti(file).astype(np.float32)
    values[1, 2, 3] = np.inf
    nibabel.Nifti1Image(values, nibabel.load(file).affine).to_filename(file)
    files = discover_cases(data / "images", None, None, data / "labels")
    with pytest.raises(InputError, match=r"case0_0001.nii.gz: 1 of 8064 values .* at voxel \(1, 2, 3\)"):
        script("end_to_end_cases").read_case(files[0])


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


def test_patches_of_a_batch_have_the_shape_that_all_cases_have(script):
    """Cases of different shapes and spacings; each patch keeps the spacing of its case, and the network's view is of its own image."""
    cases = script("end_to_end_cases")
    found = []
    for number, (grid, spacing) in enumerate((((20, 15, 9), (1.0, 1.5, 2.0)), ((13, 22, 7), (0.9, 1.1, 2.5)))):
        image = np.random.default_rng(number).random((2, *grid), np.float32)
        found.append(cases.VolumeCase(f"case{number}", image, image, np.ones(grid, np.int64), spacing))
    batch = cases.draw_batch(found, 6, (16, 16, 16), (4, 4, 1), np.random.default_rng(3))
    assert batch.image.shape == batch.seen.shape == (6, 2, 12, 12, 7)
    assert batch.labels.shape == (6, 12, 12, 7)
    assert set(zip(batch.case_ids, batch.spacing, strict=True)) == {("case0", (1.0, 1.5, 2.0)), ("case1", (0.9, 1.1, 2.5))}
    for image, seen in zip(batch.image, batch.seen, strict=True):
        assert np.corrcoef(image.flatten(), seen.flatten())[0, 1] > 0.999


def test_thick_slices_are_turned_only_within_themselves(script):
    cases = script("end_to_end_cases")
    spacing, grid = (1.0, 1.2, 8.0), (32, 30, 12)
    depth = np.broadcast_to(np.arange(12) * 8.0, grid)[None].astype(np.float32)
    case = cases.VolumeCase("case", depth, depth, np.ones(grid, np.int64), spacing)
    generator = np.random.default_rng(1)
    for _ in range(8):
        image = cases.draw_patch([case], (8, 8, 4), (4, 4, 1), generator).image
        assert float((image - image[:, :1, :1]).abs().max()) < 1e-3


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


def test_what_a_study_cannot_begin_with_is_a_sentence(tmp_path):
    """No traceback; nothing is written."""
    for name in ("images", "labels"):
        (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "heart": 1}}))
    for options, expected in (
        ([tmp_path / "data"], "study: .*images: no case found: it is empty"),
        (["--workers", 0], "--workers: expected 1"),
    ):
        done = run_script("study_end_to_end.py", *options, "-o", tmp_path / "out")
        assert done.returncode != 0
        assert re.search(expected, done.stderr), done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
