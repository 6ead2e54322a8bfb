"""`evaluate` on sigmoid channels of regions: label maps as nnU-Net makes them, and the calibration of each channel."""

import json

import numpy as np
import pytest
from cli_helpers import run_here
from evaluation_helpers import SHAPE, read_metrics, save_map, save_npz, write_study

from crfrefine import RegionScheme
from crfrefine.metrics.calibration import measure_calibration, measure_channel_calibration

SCHEME = RegionScheme.of({"whole": [1, 2], "core": 2})
DESCRIPTION = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}


def sigmoids(study, case, folder="after"):
    """Channels that mostly say what a label map says; exactly zero in a corner, as nnU-Net pads its crop."""
    labels = study.maps[folder][case]
    inside = np.stack([np.isin(labels, members) for members in SCHEME.labels])
    noise = np.random.default_rng(3).uniform(0.02, 0.65, (2, *SHAPE))
    values = np.where(inside, 1 - noise, noise).astype(np.float32)
    values[:, :2, :3] = 0.0
    return values


def dice(found, reference, members):
    a, b = np.isin(found, members), np.isin(reference, members)
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def brier(probabilities, truth):
    return pytest.approx(np.mean((probabilities.astype(float) - truth) ** 2), rel=1e-5)


def test_channels_become_a_label_map_and_are_calibrated(tmp_path):
    """Of an archive, of NIfTI, and as log-odds; another description of the channels means another measurement."""
    study = write_study(tmp_path, 3)
    for folder in (study.labels, study.after):
        (folder / "dataset.json").write_text(json.dumps(DESCRIPTION))
    for case in study.maps["after"]:
        values = sigmoids(study, case)
        (study.after / f"{case}.nii.gz").unlink()
        if case == "case0":
            save_npz(study.after / f"{case}.npz", values, "probabilities")
            continue
        log_odds = np.log(np.maximum(values, 1e-6)) - np.log1p(-values)
        stored = log_odds if case == "case2" else values
        save_map(study.after / f"{case}.nii.gz", np.moveaxis(stored, 0, -1).astype(np.float32))
    result = run_here(*study.arguments)
    assert result.status == 0, result.stderr
    found = read_metrics(study.output)
    for case, reference in study.maps["labels"].items():
        values = sigmoids(study, case).astype(float)
        labels = SCHEME.decode(values - 0.5)
        for name, members in (("whole", (1, 2)), ("2", (2,)), ("1", (1,))):
            assert found[case, name, "dice", "prediction"] == pytest.approx(dice(labels, reference, members))
        for name, channel, members in (("whole", 0, (1, 2)), ("2", 1, (2,))):
            assert found[case, name, "brier", "prediction"] == brier(values[channel], np.isin(reference, members))
        assert np.isnan([found[case, name, "brier", "prediction"] for name in ("1", "all")]).all(), "no channel is label 1 alone"
    assert result.stdout.count("whole") > 0
    (study.after / "dataset.json").write_text(json.dumps({**DESCRIPTION, "regions_class_order": [2, 2]}))
    assert run_here(*study.arguments, "--continue").status == 0
    assert found["case0", "1", "dice", "prediction"] > 0 == read_metrics(study.output)["case0", "1", "dice", "prediction"]


def test_probabilities_beside_label_maps_are_calibrated(tmp_path):
    """nnU-Net's label maps with its .npz; the description is that of the reference."""
    study = write_study(tmp_path, 1)
    (study.root / "dataset.json").write_text(json.dumps(DESCRIPTION))
    save_npz(study.after / "case0.npz", sigmoids(study, "case0"), "probabilities")
    result = run_here(*[argument for argument in study.arguments if argument != "--no-report"])
    assert result.status == 0, result.stderr
    found, reference = read_metrics(study.output), study.maps["labels"]["case0"]
    assert found["case0", "whole", "dice", "prediction"] == pytest.approx(dice(study.maps["after"]["case0"], reference, (1, 2)))
    assert found["case0", "whole", "brier", "prediction"] == brier(sigmoids(study, "case0")[0], np.isin(reference, (1, 2)))
    assert (study.output / "report.html").exists()


def test_each_region_is_measured_on_its_own_channel():
    """As a distribution over two labels would be, outside and inside; the ignored voxels do not count."""
    rng = np.random.default_rng(5)
    reference = rng.integers(0, 4, (6, 5, 7)).astype(np.uint8)
    channels = rng.random((2, 6, 5, 7))
    regions = {"whole": (1, 2), "core": (2,), "rest": (1,)}
    found = measure_channel_calibration(channels, SCHEME.labels, reference, regions, ignore_label=3)
    for name, channel in (("whole", 0), ("core", 1)):
        inside = np.where(reference == 3, 3, np.isin(reference, regions[name])).astype(np.uint8)
        binary = measure_calibration(np.stack([1 - channels[channel], channels[channel]]), inside, {"inside": (1,)}, ignore_label=3)
        assert found[name] == pytest.approx(binary["inside"])
    assert all(np.isnan(value) for name in ("rest", "all") for value in found[name].values())


def test_the_channel_of_a_single_region_is_no_label_map(tmp_path):
    """A file has one value per voxel then; the other method's label maps stay label maps, also as floating-point numbers."""
    study = write_study(tmp_path, 1)
    (study.root / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "whole": [1, 2]}, "regions_class_order": [1]}))
    values, reference = sigmoids(study, "case0")[0], study.maps["labels"]["case0"]
    save_map(study.after / "case0.nii.gz", values)
    save_map(study.before / "case0.nii.gz", study.maps["before"]["case0"].astype(np.float32))
    result = run_here(*study.arguments)
    assert result.status == 0, result.stderr
    found = read_metrics(study.output)
    assert found["case0", "whole", "dice", "prediction"] == pytest.approx(dice(values > 0.5, reference > 0, (1,)))
    assert found["case0", "whole", "brier", "prediction"] == brier(values, reference > 0)
    assert found["case0", "2", "dice", "before"] == pytest.approx(dice(study.maps["before"]["case0"], reference, (2,)))
