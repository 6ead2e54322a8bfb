"""`evaluate` on sigmoid channels of regions: label maps as nnU-Net makes them, and the calibration of each channel."""

import json

import numpy as np
import pytest
from cli_helpers import run_here
from evaluation_helpers import SHAPE, read_metrics, save_map, save_npz, write_study

from crfrefine import RegionScheme
from crfrefine.metrics.calibration import measure_calibration

SCHEME = RegionScheme.of({"whole": [1, 2], "core": 2})
DESCRIPTION = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}


def sigmoids(study, case):
    """Channels that mostly say what a label map says; exactly zero in a corner, as nnU-Net pads its crop."""
    inside = np.stack([np.isin(study.maps["after"][case], members) for members in SCHEME.labels])
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
        values, path = sigmoids(study, case), study.after / f"{case}.nii.gz"
        if case == "case0":
            path.unlink()
            save_npz(study.after / f"{case}.npz", values, "probabilities")
        else:
            log_odds = np.log(np.maximum(values, 1e-6)) - np.log1p(-values)
            save_map(path, np.moveaxis(log_odds if case == "case2" else values, 0, -1).astype(np.float32))
    result = run_here(*study.arguments, status=0)
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
    assert run_here(*study.arguments).status == 0
    assert found["case0", "1", "dice", "prediction"] > 0 == read_metrics(study.output)["case0", "1", "dice", "prediction"]


def test_probabilities_beside_label_maps_are_calibrated(tmp_path):
    """nnU-Net's label maps with its .npz; the description is that of the reference. Voxels of an ignored label do not count."""
    study = write_study(tmp_path, 1)
    (study.root / "dataset.json").write_text(json.dumps(DESCRIPTION))
    values = sigmoids(study, "case0")
    save_npz(study.after / "case0.npz", values, "probabilities")
    reference = study.maps["labels"]["case0"].copy()
    reference[:, :, 5:] = 3
    save_map(study.labels / "case0.nii.gz", reference)
    arguments = [argument for argument in study.arguments if argument != "--no-report"]
    run_here(*arguments, "--ignore-label", 3, status=0)
    found, counted = read_metrics(study.output), np.s_[:, :, :5]
    expected = dice(study.maps["after"]["case0"][counted], reference[counted], (1, 2))
    assert found["case0", "whole", "dice", "prediction"] == pytest.approx(expected)
    assert found["case0", "whole", "brier", "prediction"] == brier(values[0][counted], np.isin(reference, (1, 2))[counted])
    inside, both = np.where(reference < 3, reference > 0, 3).astype(np.uint8), np.stack([1 - values[0], values[0]])
    for metric, value in measure_calibration(both, inside, {"1": (1,)}, ignore_label=3)["1"].items():
        assert found["case0", "whole", metric, "prediction"] == pytest.approx(value, rel=1e-5), metric
    assert (study.output / "report.html").exists()


def test_the_channel_of_a_single_region_is_no_label_map(tmp_path):
    """A file has one value per voxel then; the other method's label maps stay label maps, also as floating-point numbers."""
    study = write_study(tmp_path, 1)
    (study.root / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "whole": [1, 2]}, "regions_class_order": [1]}))
    values, reference = sigmoids(study, "case0")[0], study.maps["labels"]["case0"]
    save_map(study.after / "case0.nii.gz", values)
    save_map(study.before / "case0.nii.gz", study.maps["before"]["case0"].astype(np.float32))
    run_here(*study.arguments, status=0)
    found = read_metrics(study.output)
    assert found["case0", "whole", "dice", "prediction"] == pytest.approx(dice(values > 0.5, reference > 0, (1,)))
    assert found["case0", "whole", "brier", "prediction"] == brier(values, reference > 0)
    assert found["case0", "2", "dice", "before"] == pytest.approx(dice(study.maps["before"]["case0"], reference, (2,)))
