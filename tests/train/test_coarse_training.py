"""Training on label maps of a network whose voxels are larger than the image's."""

import json
from dataclasses import replace

import numpy as np
import pytest
from cli_helpers import load_nifti, run_here, save_nifti
from training_helpers import LARGER, phantom, shorten

from crfrefine.engines import get_backend
from crfrefine.parameters.model import as_parameters
from crfrefine.refinement.networks import LabelMapNetwork
from crfrefine.refinement.refining import refine_network
from crfrefine.runs.cases.reading_options import ReadingOptions
from crfrefine.runs.demo.phantom import write_phantom
from crfrefine.train.crops import make_crop
from crfrefine.train.dataset import find_cases, read_labeled
from crfrefine.train.material import CPU, Sample
from crfrefine.train.model import Model, score
from crfrefine.train.options import TrainingOptions, locate_folders
from crfrefine.train.plan import make_plan

FACTORS = (2, 3, 2)
WIDE = tuple(factor * step for factor, step in zip(FACTORS, LARGER["spacing"], strict=True))


def write_coarse(root, count):
    """References, and label maps of blocks that take the label of their first voxel."""
    for seed in range(count):
        case = phantom(seed, **LARGER)
        write_phantom(case, root, f"case{seed}")
        labels = case.labels[:: FACTORS[0], :: FACTORS[1], :: FACTORS[2]]
        for axis, factor in enumerate(FACTORS):
            labels = labels.repeat(factor, axis)
        blocks = labels[tuple(slice(size) for size in case.labels.shape)]
        save_nifti(root / "logits" / f"case{seed}.nii.gz", blocks.astype(np.uint8), case.affine)
    return root


def test_what_is_learned_for_a_coarser_network_is_what_infer_computes(tmp_path, monkeypatch):
    """Bandwidths count voxels of the network in training, too; only those of intensities move."""
    cases = find_cases(locate_folders(write_coarse(tmp_path, 2)), input_type="labels")
    reading = ReadingOptions("labels", declared=cases.declared, all_labels=True, network_spacing=WIDE)
    case = read_labeled(cases.files[0], cases, reading, threads=1)
    assert case.network_spacing == pytest.approx(WIDE)
    sharp = as_parameters("sharp").replace(**{"mean_field.tolerance": 0.0})
    model = Model(sharp, (), (4, 2, 3))
    monkeypatch.setattr("crfrefine.train.crops.MARGIN_MM", 1000.0)  # the whole case
    crop = make_crop(case, sharp.intensity)
    kept = []
    score(model.refine, Sample.of_crop(crop), lambda refined, labels: kept.append(refined) or refined.sum() * 0, 1)
    network = LabelMapNetwork(case.label_map, range(4), 4, WIDE)
    expected = refine_network(network, case.image, spacing=case.spacing, parameters=sharp, backend=get_backend("cpu"))
    assert crop.mask.shape == case.labels.shape
    found = kept[0].numpy().reshape(4, *crop.mask.shape)
    np.testing.assert_allclose(found - found[0], expected.logits - expected.logits[0], atol=0.02)
    learned = Model(sharp, ("weights", "theta", "temperature"), (4, 2, 3))
    assert [name for name, _ in learned.learned] == ["raw_bilateral_weight", "log_theta_beta", "log_temperature"]
    assert learned.to_parameters().mean_field.positions == "network"


def test_a_run_on_label_maps_of_a_coarser_network(tmp_path, monkeypatch):
    shorten(monkeypatch)
    write_coarse(tmp_path, 4)
    wide = ",".join(f"{step:g}" for step in WIDE)
    arguments = ("train-crf", tmp_path, "-o", tmp_path / "t.toml", "--input-type", "labels")
    short = ("--folds", 2, "--num-iterations", 2, "-q")
    run_here(*arguments, "--network-spacing", wide, *short, status=0)
    trained = as_parameters(tmp_path / "t.toml")
    assert (trained.mean_field.positions, trained.volume.match_input) == ("network", True)
    assert trained.bilateral[0].theta_alpha == as_parameters("sharp").bilateral[0].theta_alpha
    report = json.loads((tmp_path / "t.report.json").read_text())
    methods = {line["method"] for line in report["measurements"]}
    assert {"network", "trained CRF", "softened + volumes", "guided filter + volumes", "sharp preset"} <= methods
    assert not {"vector scaling", "default preset"} & methods
    infer = ("infer", "-i", tmp_path / "images", "-p", tmp_path / "logits", "--input-type", "labels", "-c", tmp_path / "t.toml")
    run_here(*infer, "--network-spacing", wide, "-o", tmp_path / "out", "-q", status=0)
    given = load_nifti(tmp_path / "logits" / "case0.nii.gz")
    refined = load_nifti(tmp_path / "out" / "case0.nii.gz")
    assert np.abs(np.bincount(given.ravel(), minlength=4) - np.bincount(refined.ravel(), minlength=4)).max() <= 3
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
        save_nifti(tmp_path / "logits" / f"case{seed}.nii.gz", coarse, case.affine @ np.diag([2.0, 2.0, 2.0, 1.0]))
    options = TrainingOptions(locate_folders(tmp_path), output=tmp_path / "t.toml", resample="linear")
    plain, sharp = (make_plan(replace(options, parameters=as_parameters(name)), CPU) for name in ("default", "sharp"))
    assert plain.read(plain.cases.files[0], 1).network_spacing is None
    assert sharp.read(sharp.cases.files[0], 1).network_spacing == pytest.approx([2 * step for step in LARGER["spacing"]])
