"""What a network did not see, in the files of `infer` and in `evaluate`: certain background."""

import json

import numpy as np
import pytest
from cli_helpers import HERE, load_nifti, run_here, set_streaming
from evaluation_helpers import read_metrics
from io_helpers import save_nifti as save_on
from oracles import softmax

from crfrefine.cases.case_files import CaseFiles
from crfrefine.evaluate.measured import CasePair, find_measured
from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.evaluate.reference import read_reference
from crfrefine.evaluate.report.images import read_images


def probabilities_of_case(path):
    return np.moveaxis(load_nifti(path), -1, 0)


@pytest.mark.parametrize("kind", ["labels", "regions"])
def test_voxels_outside_the_networks_grid_are_certain_background(kind, tmp_path, monkeypatch):
    """In memory and streamed, with padding on the network's grid; also their logits."""
    rng = np.random.default_rng(3)
    shape = (24, 19, 15)
    affine_of_image = np.diag([1.0, 1.2, 2.0, 1.0])
    of_network = np.diag([2.0, 2.4, 2.0, 1.0])
    of_network[:3, 3] = (0.5, 0.6, 0.0)
    logits = (rng.normal(size=(9, 9, 15, 12)) * 6).astype(np.float32)
    logits[:, :, :2] = 0.0  # planes of padding
    save_on(tmp_path / "a.nii.gz", logits, of_network)
    save_on(tmp_path / "image.nii.gz", rng.normal(size=shape).astype(np.float32), affine_of_image)
    unseen = np.zeros(shape, bool)
    unseen[18:] = True
    unseen[:, 18:] = True
    unseen[:, :, :2] = True
    inputs = ("-i", tmp_path / "image.nii.gz", "-p", tmp_path / "a.nii.gz", "--resample")
    options = ("--save-probabilities", "--save-logits", "--input-type", "logits")
    options += ("--threads", 1, "--device", "cpu", "--set", "spatial.weight=1")
    if kind == "regions":
        for number in range(1, 13):
            options += ("--regions", f"r{number}={number}")
    background = np.zeros(12) if kind == "regions" else np.arange(12) == 0
    found = []
    for name in ("memory", "streamed"):
        set_streaming(monkeypatch, name == "streamed")
        output = tmp_path / f"{name}.nii.gz"
        run_here("infer", *inputs, *options, "-o", output, status=0)
        labels = load_nifti(output)
        assert (labels[unseen] == 0).all()
        probabilities = probabilities_of_case(tmp_path / f"{name}_probabilities.nii.gz")
        assert (probabilities[:, unseen] == np.float32(background)[:, None]).all()
        saved = probabilities_of_case(tmp_path / f"{name}_logits.nii.gz")
        certain = np.where(background, 0.0, -1e4)
        assert (saved[:, unseen] == np.float32(certain)[:, None]).all()
        assert (probabilities[:, ~unseen].max(axis=0) < 1).any()
        found.append(labels)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("kind", ["probabilities", "logits"])
@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_evaluate_takes_what_a_network_did_not_see_for_certain_background(
    kind, is_elsewhere, tmp_path
):
    """As `infer` does, so that a run that refines nothing leaves the probabilities as they are."""
    rng = np.random.default_rng(4)
    shape = (16, 13, 11)
    grid = np.diag([1.0, 1.2, 2.0, 1.0])
    for name in ("images", "p", "labels"):
        (tmp_path / name).mkdir()
    for number in range(6):
        logits = rng.normal(size=(3, *shape)) * 3
        labels = logits.argmax(axis=0).astype(np.uint8)
        labels[10:] = 0
        values = softmax(logits) if kind == "probabilities" else logits
        if is_elsewhere:
            values = values[:, :10]
        else:
            values[:, 10:] = 0.0
        case = f"c{number}.nii.gz"
        save_on(tmp_path / "labels" / case, labels, grid)
        save_on(tmp_path / "images" / case, rng.normal(size=shape).astype(np.float32), grid)
        save_on(tmp_path / "p" / case, np.moveaxis(values, 0, -1).astype(np.float32), grid)
    folders = [tmp_path / name for name in ("images", "p", "labels", "out")]
    inputs = ("-i", folders[0], "-p", folders[1], "-o", folders[3])
    options = ("--save-probabilities", "--threads", 1, "--set", "bilateral.weight=0", "--resample")
    run_here("infer", *inputs, *options, status=0)
    arguments = ("-b", f"network={folders[1]}", "-o", tmp_path / "e", "--resample")
    run_here("evaluate", folders[3], folders[2], *arguments, *HERE, status=0)
    rows = read_metrics(tmp_path / "e")
    verdict = json.loads((tmp_path / "e" / "summary.json").read_text())["verdict"]
    assert (
        "unchanged up to rounding in 6 cases, negative log" in verdict["probabilities"]["sentence"]
    )
    assert verdict["probabilities"]["change"] == "no difference"
    seen = softmax(logits)[:, :10].astype(np.float64)
    truth = labels[:10]
    likelihood = -np.log(np.take_along_axis(seen, truth[None], 0)).sum() / labels.size
    for method in ("network", "prediction"):
        found = rows["c5", "all", "nll", method]
        assert found == pytest.approx(likelihood, rel=1e-5)


def test_evaluate_tells_of_holes_where_no_window_looked(tmp_path):
    """Their voxels count as certain background, inside a structure, too."""
    shape = (21, 17, 14)
    grid = np.diag([1.0, 1.2, 2.0, 1.0])
    labels = np.zeros(shape, np.uint8)
    labels[3:18, 2:15, 2:13] = 1
    probabilities = np.where(labels[..., None] == (0, 1), 0.9, 0.1).astype(np.float32)
    probabilities[6:15, 3:12, 4:12] = 0.0
    for name, values in (("p", probabilities), ("labels", labels)):
        (tmp_path / name).mkdir()
        for case in "abc":
            save_on(tmp_path / name / f"{case}.nii.gz", values, grid)
    arguments = (tmp_path / "p", tmp_path / "labels", "-o", tmp_path / "e")
    result = run_here("evaluate", *arguments, *HERE, status=0)
    assert "as where no sliding window of the network looked" in result.stderr
    assert f"{9 * 9 * 8} of {labels.size} voxels (13.0%) in 1 hole" in result.stderr
    found = read_metrics(tmp_path / "e")["a", "all", "nll", "prediction"]
    # Certain and wrong in the hole: -log(1e-7), or what the metric takes for 0.
    assert found > 9 * 9 * 8 / labels.size * 10


def test_what_an_image_does_not_show_is_its_lowest_intensity_in_the_report(tmp_path):
    shape = (14, 11, 9)
    grid = np.diag([1.0, 1.2, 2.0, 1.0])
    of_image = np.diag([2.0, 2.4, 2.0, 1.0])
    labels = save_on(tmp_path / "labels.nii.gz", np.ones(shape, np.uint8), grid)
    values = np.linspace(-1000.0, 500.0, 6 * 5 * 9).reshape(6, 5, 9).astype(np.float32)
    image = save_on(tmp_path / "image.nii.gz", values, of_image)
    options = EvaluationOptions(tmp_path, tmp_path, tmp_path / "e", resample=True)
    pair = CasePair(CaseFiles("a", (image,), (), labels=labels), {}, {})
    reference = read_reference(pair, find_measured(options, {}, []))
    (shown,), _ = read_images(pair, reference, print)
    covers = np.zeros(shape, bool)
    covers[:12, :10] = True  # The last samples are at 10 mm and 9.6 mm, half a voxel further.
    assert (shown[~covers] == -1000.0).all()
    np.testing.assert_allclose(shown[:11:2, :9:2], values, rtol=1e-5)
