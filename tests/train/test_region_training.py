"""The losses; training on overlapping regions, and on label maps of a network whose voxels are
larger than the image's.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cli_helpers import load_nifti, run_here, save_nifti
from training_helpers import (
    FINER,
    LARGER,
    SIZES,
    as_case,
    cases_in,
    learned_by,
    options_of,
    phantom,
    shorten,
    write_cases,
)

import crfrefine
from crfrefine import CrfParameters, RegionScheme
from crfrefine.arrays.network import ArrayNetwork, LabelMapNetwork
from crfrefine.demo.phantom import write_phantom
from crfrefine.engines import get_backend
from crfrefine.errors import InputError
from crfrefine.parameters.model import as_parameters
from crfrefine.parameters.sections import IntensityParameters
from crfrefine.refinement.refining import refine_network
from crfrefine.train import crops
from crfrefine.train.crops import FOREGROUND_RATIO, count_confusion, make_crop
from crfrefine.train.dataset import read_labeled
from crfrefine.train.losses import make_loss, make_region_loss
from crfrefine.train.material import Sample
from crfrefine.train.model import Model, score
from crfrefine.train.plan import TrainingPlan
from crfrefine.train.workers import Workers

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.mark.parametrize("name", ["ce", "dice", "ce+dice"])
def test_the_truth_costs_nothing_and_gradients_agree_with_differences(name):
    loss = make_loss(name, [(1,), (1, 2)])
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    sure = 40.0 * torch.nn.functional.one_hot(labels, 3).t().double()
    assert float(loss(sure, labels)) == pytest.approx(0.0, abs=1e-12)  # e^-40 is the rest
    logits = torch.randn(
        3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True
    )
    assert torch.autograd.gradcheck(lambda values: loss(values, labels), logits)


def test_a_case_without_the_region_has_a_gradient_of_zero_not_nan():
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = make_loss("dice", [(1,), (2,)])(logits, torch.zeros(6, dtype=torch.long))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not logits.grad.any()


SCHEME = RegionScheme.of({"whole": [1, 2], "core": 2, "cyst": 3})
DESCRIPTION = {
    "labels": {"background": 0, "whole": [1, 2], "core": 2, "cyst": 3},
    "regions_class_order": [1, 2, 3],
}
WEIGHTS = (2.0, 3.0, 5.0)
PARAMETERS = CrfParameters().replace(
    **{
        "bilateral.weight": WEIGHTS,
        "bilateral.theta_alpha": 5.0,
        "bilateral.theta_beta": 0.1,
        "mean_field.tolerance": 0.0,
    }
)


def log_odds_of(logits):
    """The softmax summed over each region, as log-odds."""
    softmax = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(0)
    inside = np.stack([softmax[list(labels)].sum(0) for labels in SCHEME.labels])
    return (np.log(np.maximum(inside, 1e-7)) - np.log(np.maximum(1 - inside, 1e-7))).astype(
        np.float32
    )


def region_case(**grid):
    case = as_case(phantom(0, **grid))
    network = ArrayNetwork(log_odds_of(case.logits), regions=SCHEME)
    return replace(case, network=network)


def test_the_loss_is_the_mean_of_the_binary_losses():
    log_odds = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).double()
    labels = torch.arange(50) % 4
    for name in ("ce", "dice", "ce+dice"):
        expected = []
        for channel, members in zip(log_odds, SCHEME.labels, strict=True):
            inside = torch.tensor([int(int(label) in members) for label in labels])
            expected.append(
                float(
                    make_loss(name, [(1,)])(
                        torch.stack([torch.zeros_like(channel), channel]), inside
                    )
                )
            )
        assert float(make_region_loss(name, SCHEME)(log_odds, labels)) == pytest.approx(
            np.mean(expected), rel=1e-12
        )


def test_a_crop_holds_what_may_be_in_a_region(monkeypatch):
    """Everything with a region at least as likely as FOREGROUND_RATIO; outside, voxels are counted
    by the decoded label.
    """
    monkeypatch.setattr(crops, "MARGIN_MM", 0.0)
    case = region_case(**FINER)
    crop = make_crop(case, IntensityParameters())
    likely = (case.logits.max(0) > math.log(FOREGROUND_RATIO)) | (case.labels > 0)
    assert 0 < crop.mask.sum() == likely.sum() < likely.size
    pairs = count_confusion(case.labels, SCHEME.decode(case.logits), 4)
    np.testing.assert_array_equal(crop.confusion(SCHEME.decode(crop.logits)), pairs)


@pytest.mark.parametrize(
    ("weight", "learn"),
    [(WEIGHTS, ()), (4.0, ("weights", "theta", "temperature"))],
    ids=["fixed", "learned"],
)
def test_the_model_labels_as_refine_does(weight, learn):
    """On a crop that is the whole case: the same label map to a few voxels, as logits are kept in
    half precision.
    """
    case = region_case(**FINER)
    case.labels[:] = 1  # so that every voxel is in the crop
    crop = make_crop(case, IntensityParameters())
    values = {"spatial.weight": 0.5, "mean_field.bias": [0.5, -1.0, 0.0]}
    parameters = PARAMETERS.replace(**{"bilateral.weight": weight}, **values)
    assert crop.mask.all()
    refined = crfrefine.refine(
        case.logits, case.image, spacing=case.spacing, parameters=parameters, regions=SCHEME
    )
    counts = np.bincount(refined.label_map.ravel(), minlength=4)
    _, confusion = score(
        Model(parameters, learn, (3, *SIZES[1:])).refine,
        crop,
        make_region_loss("ce+dice", SCHEME),
        2,
    )
    np.testing.assert_allclose(confusion.sum(0), counts, atol=2)
    assert np.abs(np.bincount(refined.network_label_map.ravel(), minlength=4) - counts).max() > 4, (
        "the CRF changes more than that"
    )


def test_gradients_are_those_of_differences():
    """With a weight per region and shared bandwidths; the sums are exact, since a truncated
    kernel's reach jumps with its bandwidth.
    """
    crop = make_crop(region_case(shape=(9, 8, 10), spacing=(7.2, 7.6, 6.1)), IntensityParameters())
    loss = make_region_loss("ce+dice", SCHEME)
    exact = PARAMETERS.replace(
        **{
            "mean_field.filter": "exact",
            "mean_field.bias": [0.3, -0.2, 0.4],
            "bilateral.theta_alpha": 12.0,
        }
    )
    model = Model(exact, ("weights", "theta", "temperature", "bias"), (3, *SIZES[1:]))
    _, gradients = model.gradient([crop], loss, Workers(2))
    found = dict(zip([name for name, _ in learned_by(model)], gradients, strict=True))
    assert tuple(found["raw_bilateral_weight"].shape) == (1, 3)
    for name, parameter in learned_by(model):
        for index in np.ndindex(*parameter.shape):
            step = 0.02
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter[index] += sign * step
                    values.append(score(model.refine, crop, loss, 2)[0])
                    parameter[index] -= sign * step
            # Central differences of a loss in float32: 1e-7 / 0.04, and the curvature.
            expected = (values[0] - values[1]) / (2 * step)
            assert float(found[name][index]) == pytest.approx(expected, rel=0.05, abs=3e-5), (
                name,
                index,
            )


def write_region_cases(root, count, description=DESCRIPTION):
    def sigmoids(case):
        return np.moveaxis(1 / (1 + np.exp(-log_odds_of(case.logits))), 0, -1)

    write_cases(root, count, network=sigmoids)
    (root / "dataset.json").write_text(json.dumps(description))
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    data = write_region_cases(tmp_path_factory.mktemp("data"), 4)
    output = tmp_path_factory.mktemp("out") / "params.toml"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        options = ("--folds", 2, "--num-iterations", 1, "--learn", "weights,bias", "--threads", 1)
        return data, output, run_here("train-crf", data, "-o", output, *options, status=0)


def test_the_command_compares_regions_and_infer_runs_what_was_trained(trained, tmp_path):
    data, output, result = trained
    assert "4 cases, 3 overlapping regions, 4 labels, modalities: 2" in result.stderr
    assert "the logits have one channel per region of " in result.stderr
    rows = [line.split("\t")[:3] for line in result.stdout.splitlines()[1:] if "\t" in line]
    assert list(dict.fromkeys(row[0] for row in rows)) == ["whole", "core", "cyst", "mean"]
    dice = {(row[0], row[1]): float(row[2]) for row in rows}
    assert dice["mean", "trained CRF"] > dice["mean", "network"] + 0.02
    report = json.loads(output.with_name("params.report.json").read_text())
    assert report["regions"] == {"whole": [1, 2], "core": [2], "cyst": [3]}
    assert report["channels"] == {"labels": report["regions"], "regions_class_order": [1, 2, 3]}
    assert len(report["vector_scaling"]["bias"]) == 3
    parameters = CrfParameters.load(output)
    assert (len(parameters.bilateral[0].weight), parameters.compatibility.kind) == (3, "potts")
    run_here(
        "infer",
        "-i",
        data / "images",
        "-p",
        data / "logits",
        "-o",
        tmp_path,
        "-c",
        output,
        status=0,
    )
    refined = load_nifti(tmp_path / "case1.nii.gz")
    truth = load_nifti(data / "labels" / "case1.nii.gz")
    network = SCHEME.decode(np.moveaxis(load_nifti(data / "logits" / "case1.nii.gz"), -1, 0) - 0.5)
    assert (refined == truth).mean() > (network == truth).mean()


def test_options_and_references_that_do_not_fit_regions(trained, tmp_path):
    description = {
        **DESCRIPTION,
        "labels": {"background": 0, "whole": [1, 2], "core": 2, "rest": 1},
        "regions_class_order": [1, 2, 1],
    }
    of_no_region = write_region_cases(tmp_path / "data", 2, description)
    for data, options, told in (
        (
            trained[0],
            ("--learn", "compatibility"),
            "overlapping regions, each a problem of two labels, have no compatibility to learn",
        ),
        (
            trained[0],
            ("--set", "bilateral.weight=[1.0,2.0,3.0,4.0]"),
            "bilateral.weight: it has 4 values, but the case has 3 regions",
        ),
        (trained[0], ("--regions", "none=9"), "label 9 is not among the logits' 0 to 3"),
        (
            of_no_region,
            ("--folds", 2),
            "the reference has a label 3, but there are 3 labels (0 to 2) according to ",
        ),
    ):
        assert (
            told
            in run_here(
                "train-crf", data, "-o", tmp_path / "params.toml", *options, status=1
            ).stderr
        )


FACTORS = (2, 3, 2)
WIDE = tuple(factor * step for factor, step in zip(FACTORS, LARGER["spacing"], strict=True))


def blocks(case):
    """A label map of blocks that take the label of their first voxel."""
    shape = zip(case.labels.shape, FACTORS, strict=True)
    index = np.ix_(*(np.arange(size) // wide * wide for size, wide in shape))
    return case.labels[index].astype(np.uint8)


def test_what_is_learned_for_a_coarser_network_is_what_infer_computes(tmp_path, monkeypatch):
    """Bandwidths count voxels of the network in training, too; only those of intensities move."""
    write_cases(tmp_path, 2, network=blocks, **LARGER)
    cases = cases_in(tmp_path, input_type="labels", network_spacing=WIDE)
    case = read_labeled(cases.files[0], cases, threads=1)
    assert case.network_spacing == pytest.approx(WIDE)
    sharp = as_parameters("sharp").replace(**{"mean_field.tolerance": 0.0})
    model = Model(sharp, (), (4, 2, 3))
    monkeypatch.setattr("crfrefine.train.crops.MARGIN_MM", 1000.0)  # the whole case
    crop = make_crop(case, sharp.intensity)
    kept = []
    score(
        model.refine,
        Sample(crop),
        lambda refined, labels: kept.append(refined) or refined.sum() * 0,
        1,
    )
    network = LabelMapNetwork(case.coarse_labels, range(4), 4, WIDE)
    expected = refine_network(
        network, case.image, spacing=case.spacing, parameters=sharp, backend=get_backend("cpu")
    )
    assert crop.mask.shape == case.labels.shape
    found = kept[0].numpy().reshape(4, *crop.mask.shape)
    np.testing.assert_allclose(found - found[0], expected.logits - expected.logits[0], atol=0.02)
    learned = Model(sharp, ("weights", "theta", "temperature"), (4, 2, 3))
    assert [name for name, _ in learned_by(learned)] == [
        "raw_bilateral_weight",
        "log_theta_beta",
        "log_temperature",
    ]
    assert learned.to_parameters().mean_field.positions == "network"


def test_a_run_on_label_maps_of_a_coarser_network(tmp_path, monkeypatch):
    shorten(monkeypatch)
    write_cases(tmp_path, 4, network=blocks, **LARGER)
    wide = ",".join(f"{step:g}" for step in WIDE)
    arguments = ("train-crf", tmp_path, "-o", tmp_path / "t.toml", "--input-type", "labels")
    short = ("--folds", 2, "--num-iterations", 2, "-q")
    run_here(*arguments, "--network-spacing", wide, *short, status=0)
    trained = as_parameters(tmp_path / "t.toml")
    assert (trained.mean_field.positions, trained.volume.match_input) == ("network", True)
    assert trained.bilateral[0].theta_alpha == as_parameters("sharp").bilateral[0].theta_alpha
    report = json.loads((tmp_path / "t.report.json").read_text())
    methods = {line["method"] for line in report["measurements"]}
    assert {
        "network",
        "trained CRF",
        "softened + volumes",
        "guided filter + volumes",
        "sharp preset",
    } <= methods
    assert not {"vector scaling", "default preset"} & methods
    infer = (
        "infer",
        "-i",
        tmp_path / "images",
        "-p",
        tmp_path / "logits",
        "--input-type",
        "labels",
        "-c",
        tmp_path / "t.toml",
    )
    run_here(*infer, "--network-spacing", wide, "-o", tmp_path / "out", "-q", status=0)
    given = load_nifti(tmp_path / "logits" / "case0.nii.gz")
    refined = load_nifti(tmp_path / "out" / "case0.nii.gz")
    assert (
        np.abs(
            np.bincount(given.ravel(), minlength=4) - np.bincount(refined.ravel(), minlength=4)
        ).max()
        <= 3
    )
    result = run_here(*arguments, "--network-spacing", wide, "-c", "default", *short, status=1)
    assert "positions = 'network'" in result.stderr
    result = run_here(*arguments, "-c", "sharp", *short, status=1)
    assert "give --network-spacing MM" in result.stderr


def test_only_parameters_in_voxels_of_the_network_keep_volumes(tmp_path):
    """Other parameters train on logits of a coarser grid as on any others."""
    for seed in range(2):
        case = phantom(seed, **LARGER)
        write_phantom(case, tmp_path, f"case{seed}")
        coarse = np.moveaxis(case.logits[:, ::2, ::2, ::2], 0, -1)
        save_nifti(
            tmp_path / "logits" / f"case{seed}.nii.gz",
            coarse,
            case.affine @ np.diag([2.0, 2.0, 2.0, 1.0]),
        )
    options = options_of(tmp_path, resample="linear")
    plain = TrainingPlan(replace(options, parameters=as_parameters("default")))
    sharp = TrainingPlan(replace(options, parameters=as_parameters("sharp")))
    assert plain.read(plain.cases.files[0], 1).network_spacing is None
    assert sharp.read(sharp.cases.files[0], 1).network_spacing == pytest.approx(
        [2 * step for step in LARGER["spacing"]]
    )
    sharp.options = replace(sharp.options, network_spacing=9.0)  # It would count for nothing.
    with pytest.raises(InputError, match="--resample alone for logits"):
        sharp.read(sharp.cases.files[0], 1)
