"""Parameters chosen without labels: synthetic cases as asked for, the choice, `train-crf
--unlabeled` and `infer -c auto`.
"""

import json
import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest
from cli_helpers import errors, files_in, load_nifti, run_here, save_nifti
from scipy.ndimage import gaussian_filter, zoom
from training_helpers import shorten_choice

import crfrefine
from crfrefine.arrays.region_scheme import RegionScheme, decode
from crfrefine.parameters.model import CrfParameters
from crfrefine.train import unlabeled, unlabeled_choice
from crfrefine.train.synthetic import (
    agreeing,
    dice_of_maps,
    expected_dice,
    groups_of,
    make_noise,
    noise_scale,
)

GRID_SHAPE = (24, 21, 13)  # no two axes alike
SPACING = (1.0, 1.25, 2.5)  # mm, nor two spacings
AFFINE = np.diag([*SPACING, 1.0])


def anatomy(seed, shape=GRID_SHAPE):
    """Two labels, one inside the other, (*grid): smooth, and somewhere else for each seed."""
    random = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1.0, 1.0, size) for size in shape), indexing="ij")
    center = random.uniform(-0.15, 0.15, len(shape))
    distance = np.sqrt(sum((axis - middle) ** 2 for axis, middle in zip(axes, center, strict=True)))
    distance += 2.0 * gaussian_filter(random.normal(size=shape), 3.0)
    return (distance < 0.65).astype(np.uint8) + (distance < 0.35).astype(np.uint8)


def image_of(labels, seed):
    noise = np.random.default_rng(seed).normal(0.0, 4.0, labels.shape)
    return (100.0 * labels + noise).astype(np.float32)


def network(labels, kind, seed):
    """Logits (3, *grid) float32 that are "clean", "noisy" or a "wreck".

    Noisy ones are unsure, with blobs of a voxel or two of wrong labels.
    """
    strength, size = {"clean": (9.0, 0.3), "noisy": (3.0, 0.8), "wreck": (3.0, 1.5)}[kind]
    random = np.random.default_rng(seed + 100)
    noise = np.stack([gaussian_filter(random.normal(size=labels.shape), 1.0) for _ in range(3)])
    logits = strength * np.eye(3)[labels].transpose(labels.ndim, *range(labels.ndim))
    return (logits + size / noise.std() * noise).astype(np.float32)


def write_data(root, kind, count=2, *, channels=network):
    for seed in range(count):
        labels = anatomy(seed)
        save_nifti(root / "images" / f"case{seed}_0000.nii.gz", image_of(labels, seed), AFFINE)
        save_nifti(
            root / "logits" / f"case{seed}.nii.gz",
            np.moveaxis(channels(labels, kind, seed), 0, -1),
            AFFINE,
        )
    return root


def as_regions(labels, kind, seed):
    logits = network(labels, kind, seed)
    return np.stack(
        [np.maximum(logits[1], logits[2]) - logits[0], logits[2] - np.maximum(logits[0], logits[1])]
    )


@pytest.fixture(autouse=True)
def few(monkeypatch):
    shorten_choice(monkeypatch, 1.0, 3.0)


def choose(root, *options, status=0):
    return run_here(
        "train-crf",
        "--unlabeled",
        root,
        "-o",
        root / "out" / "params.toml",
        *options,
        status=status,
    )


def infer(root, *options, status=0):
    return run_here(
        "infer",
        "-i",
        root / "images",
        "-p",
        root / "logits",
        "-o",
        root / "out",
        "-c",
        "auto",
        *options,
        status=status,
    )


def report_of(root):
    return json.loads((root / "out" / "params.report.json").read_text())


@pytest.mark.parametrize("shape", [GRID_SHAPE, (61, 47)])
@pytest.mark.parametrize("scheme", [None, RegionScheme.of({"whole": (1, 2), "core": 2})])
@pytest.mark.parametrize("dice", [0.95, 0.7, 0.4])
def test_the_noise_reaches_the_dice_that_is_asked_for(shape, scheme, dice):
    truth = anatomy(1, shape)
    logits = agreeing(
        (network if scheme is None else as_regions)(anatomy(2, shape), "noisy", 0), truth, scheme
    )
    mask = np.ones(shape, bool)
    mask[:2] = False
    noise = make_noise(logits.shape, 1.0, np.random.default_rng(5)) * mask
    noisy = logits + np.float32(noise_scale(logits, noise, truth, mask, dice, scheme)) * noise
    groups = groups_of(len(logits), scheme)
    assert dice_of_maps(np.where(mask, decode(noisy, scheme), 0), truth, groups) == pytest.approx(
        dice, abs=0.01
    )
    np.testing.assert_array_equal(noisy[:, ~mask], logits[:, ~mask])


def test_the_dice_that_a_network_expects_is_its_mean_over_maps_drawn_from_it():
    """With independent voxels of one label it is 2 E(both) / (E(found) + E(true)).

    The mean of ratios is the ratio of means but for a few thousandths.
    """
    random = np.random.default_rng(0)
    p = np.where(
        anatomy(1) > 0, random.uniform(0.6, 1.0, GRID_SHAPE), random.uniform(0.0, 0.1, GRID_SHAPE)
    )
    logits = np.log(np.stack([1.0 - p, p])).astype(np.float32)
    found = p > 0.5
    drawn = []
    for _ in range(20):
        true = random.random(GRID_SHAPE) < p
        drawn.append(2 * (true & found).sum() / (true.sum() + found.sum()))
    assert expected_dice(logits, p >= 0, None) == pytest.approx(np.mean(drawn), abs=0.003)


def test_a_noisy_network_gets_a_stronger_model_and_a_clean_one_stays_with_default(tmp_path):
    verdicts = {}
    for kind in ("noisy", "clean", "wreck"):
        data = write_data(tmp_path / kind, kind)
        verdicts[kind] = choose(data).stdout.splitlines()[-1]
    assert verdicts["noisy"].startswith("verdict: chosen: theta_alpha 4.39 mm, ")
    assert "made from 2 cases. That is no proof" in verdicts["noisy"]
    assert verdicts["clean"].startswith("verdict: it stays with `default`: ")
    assert (
        "`default` changes so many of the network's labels that synthetic cases would not be like "
        "the real ones" in verdicts["wreck"]
    )
    assert CrfParameters.load(tmp_path / "clean" / "out" / "params.toml") == CrfParameters()
    chosen = CrfParameters.load(tmp_path / "noisy" / "out" / "params.toml")
    assert (
        chosen.bilateral[0].theta_alpha,
        chosen.bilateral[0].weight,
        chosen.mean_field.num_iterations,
    ) == (4.39, 8.0, 5)
    truth = anatomy(3)  # of a case that it has not seen
    image = image_of(truth, 3)
    logits = network(truth, "noisy", 3)
    refined = crfrefine.refine(logits, image, spacing=SPACING, parameters=chosen)
    by_default = crfrefine.refine(logits, image, spacing=SPACING, parameters=CrfParameters())
    groups = ((1,), (2,))
    assert dice_of_maps(refined.label_map, truth, groups) > dice_of_maps(
        by_default.label_map, truth, groups
    )
    report = report_of(tmp_path / "noisy")
    best = max(range(9), key=lambda number: report["gains"][number])
    assert report["choice"]["chosen"] == report["candidates"][best]["name"]
    assert np.shape(report["dice"]) == (2, 2, 4, 10)
    assert CrfParameters.from_dict(report["parameters"]) == chosen
    assert files_in(tmp_path / "noisy" / "out") == ["params.report.json", "params.toml"]


def test_the_choice_depends_on_the_seed_and_not_on_the_threads(tmp_path):
    write_data(tmp_path, "noisy", 4)
    found = []
    for options in (("--threads", 1), ("--threads", 3), ("--seed", 1)):
        choose(tmp_path, *options)
        found.append(report_of(tmp_path)["dice"])
    assert found[0] == found[1] != found[2]


def test_one_case_and_what_cannot_be_used(tmp_path):
    """Files of one case.

    A folder of three, of which one has background alone and one is damaged.
    """
    write_data(tmp_path, "noisy", 3)
    files = (
        "-i",
        tmp_path / "images" / "case0_0000.nii.gz",
        "-p",
        tmp_path / "logits" / "case0.nii.gz",
    )
    one = run_here("train-crf", "--unlabeled", *files, "-o", tmp_path / "one.toml", status=0)
    assert "made from 1 case. " in one.stdout
    empty = np.full((*GRID_SHAPE, 3), -1.0, np.float32)
    empty[..., 0] = 5.0
    save_nifti(tmp_path / "logits" / "case1.nii.gz", empty, AFFINE)
    (tmp_path / "logits" / "case2.nii.gz").write_bytes(b"nothing")
    (tmp_path / "labels").mkdir()
    three = choose(tmp_path)
    assert (
        "note: 2 cases not used:\n"
        "  case 'case1': no label has 30 voxels, which a comparison needs\n" in three.stderr
    )
    assert "/labels is not read: --unlabeled chooses without labels" in three.stderr
    assert report_of(tmp_path)["choice"]["cases"] == ["case0"]
    assert list(report_of(tmp_path)["choice"]["left_out"]) == ["case1", "case2"]
    save_nifti(
        tmp_path / "logits" / "case0.nii.gz",
        network(anatomy(0), "noisy", 0).argmax(axis=0).astype(np.uint8),
        AFFINE,
    )
    refused = choose(tmp_path, status=1).stderr
    assert "no case can be used to choose parameters" in errors(refused)[0]
    assert "a label map does not say how sure the network is" in refused
    assert "it stays with `default`: no case could be used\n" in infer(tmp_path, status=1).stderr


@pytest.mark.parametrize("kind", ["regions", "masks", "another grid", "two axes"])
def test_other_inputs(tmp_path, kind):
    write_data(tmp_path, "noisy", 1, channels=as_regions if kind == "regions" else network)
    logits = tmp_path / "logits" / "case0.nii.gz"
    options = ()
    if kind == "regions":
        content = {
            "labels": {"background": 0, "whole": [1, 2], "core": [2]},
            "regions_class_order": [1, 2],
        }
        (tmp_path / "dataset.json").write_text(json.dumps(content))
    elif kind == "masks":
        save_nifti(tmp_path / "masks" / "case0.nii.gz", (anatomy(0) > 0).astype(np.uint8), AFFINE)
    elif kind == "another grid":
        affine = AFFINE @ np.diag([1.0, 1.0, 0.5, 1.0])
        options = ("--resample",)
        affine[2, 3] -= SPACING[2] / 4
        save_nifti(
            logits,
            zoom(load_nifti(logits), (1, 1, 2, 1), order=1, grid_mode=True, mode="nearest"),
            affine,
        )
    else:
        labels = anatomy(0, (61, 47))
        save_nifti(tmp_path / "images" / "case0_0000.nii.gz", image_of(labels, 0), AFFINE)
        save_nifti(logits, np.moveaxis(network(labels, "noisy", 0), 0, -1)[:, :, None], AFFINE)
    choose(tmp_path, *options)
    found = report_of(tmp_path)
    assert found["choice"]["cases"] == ["case0"]
    assert max(found["gains"]) > 0


def table_of(gains, spread=0.002):
    """Dice of network, `default` and candidates with these gains, which differ a little between six
    cases and their kinds.
    """
    table = np.zeros((6, 2, 2 + len(gains)))
    table[..., 0] = 0.7
    table[..., 1] = 0.8
    table[..., 2:] = 0.8 + np.array(gains)
    table[..., 2:] += np.random.default_rng(0).normal(0.0, spread, table[..., 2:].shape)
    return table


def test_the_rule_takes_what_surely_gains_a_point_in_every_kind_of_case():
    hurt = table_of([0.02, 0.06])
    hurt[:, 1, 3] -= 0.055
    scattered = table_of([0.1, 0.1], spread=0.6)
    for table, chosen in (
        (table_of([0.02, 0.04, 0.03]), 2),
        (table_of([0.0, -0.01]), 0),
        (scattered, 0),
        (hurt, 1),
    ):
        assert unlabeled_choice.decide(table, (0.9,) * 6)[0] == chosen
    assert unlabeled_choice.decide(table_of([0.02, 0.04]), (0.9, 0.8, 0.9, 0.8, 0.8, 0.8))[
        1
    ].startswith("`default` changes so many")
    assert unlabeled_choice.decide(table_of([0.008, 0.004]), (0.9,) * 6)[1].startswith(
        "no other set gains 1 point of Dice"
    )


def test_an_interrupt_ends_all_threads_at_once(tmp_path, monkeypatch):
    """Another thread may be in the midst of minutes of work."""
    second_runs = threading.Event()
    stopped = []

    def score(source, candidates, seed, threads, check):
        if not seed[2]:
            second_runs.wait(60)
            raise KeyboardInterrupt
        second_runs.set()
        try:
            for _ in range(600):
                check()
                time.sleep(0.1)
        except CancelledError:
            stopped.append(seed)
            raise

    monkeypatch.setattr(unlabeled, "score_candidates", score)
    with pytest.raises(KeyboardInterrupt):
        choose(write_data(tmp_path, "noisy"), "--threads", 2)
    assert stopped
    assert files_in(tmp_path / "out") == []


def test_what_makes_no_sense_without_labels_is_refused_at_once(tmp_path):
    for options, names in (
        (("-l", tmp_path), "--labels"),
        (("--learn", "theta", "--folds", 3), "--learn, --folds"),
        (("-c", "brats", "--set", "spatial.weight=1"), "--config, --set"),
        (("--continue", "--device", "cpu"), "--device, --continue"),
    ):
        message = errors(choose(tmp_path, *options, status=2).stderr)[0]
        assert "Invalid value for --unlabeled: " in message
        assert message.endswith(f"leave out {names}")
    assert (
        "name the file to write" in run_here("train-crf", "--unlabeled", tmp_path, status=2).stderr
    )
    assert "images and logits" in choose(tmp_path, status=1).stderr
    assert not (tmp_path / "out").exists()


def test_infer_chooses_records_and_continues_with_what_it_chose(tmp_path, monkeypatch):
    write_data(tmp_path, "noisy", 2)
    first = infer(tmp_path, "--set", "postprocess.fill_holes=each")
    assert "chosen: theta_alpha 4.39 mm, " in first.stderr
    assert files_in(tmp_path / "out") == ["case0.nii.gz", "case1.nii.gz"]
    (record,) = (tmp_path / "out" / ".crfrefine").iterdir()
    head = json.loads(record.read_text().splitlines()[0])
    used = CrfParameters.from_dict(head["parameters"])
    assert (used.bilateral[0].theta_alpha, used.postprocess.fill_holes) == (4.39, "each")
    assert head["choice"]["cases"] == ["case0", "case1"]
    image = load_nifti(tmp_path / "images" / "case1_0000.nii.gz")
    logits = network(anatomy(1), "noisy", 1)
    expected = crfrefine.refine(logits, image, spacing=SPACING, parameters=used).label_map
    np.testing.assert_array_equal(load_nifti(tmp_path / "out" / "case1.nii.gz"), expected)
    assert run_here("status", tmp_path / "out").status == 0
    other = infer(
        tmp_path, "--continue", "--set", "bilateral.weight=3", "--summary", tmp_path / "other.json"
    )
    assert (
        "trying 5 sets of parameters" in other.stderr
    )  # Others than those that it had chosen from.
    assert "weight 3" in json.loads((tmp_path / "other.json").read_text())["choice"]["sentence"]
    infer(tmp_path, "--set", "postprocess.fill_holes=each")
    (tmp_path / "out" / "case1.nii.gz").unlink()
    monkeypatch.delattr(unlabeled, "Source")  # It is not to choose again.
    again = infer(tmp_path, "--continue")
    assert (
        "parameters as an earlier run into this folder has chosen them: theta_alpha 4.39 mm, "
        in again.stderr
    )
    assert [line.split("\t")[1] for line in again.stdout.splitlines()[1:]] == ["skipped", "done"]
    np.testing.assert_array_equal(load_nifti(tmp_path / "out" / "case1.nii.gz"), expected)
