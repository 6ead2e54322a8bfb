"""Commands, files and points on a real GPU, beside the CPU. Skipped where there is none."""

import json

import numpy as np
import pytest
from cli_helpers import (
    FAST,
    GRID_SHAPE,
    load_nifti,
    run_here,
    run_process,
    save_nifti,
    write_folders,
)

from crfrefine.engines import is_available

torch = pytest.importorskip("torch", reason="points on a GPU are tensors")
from training_helpers import write_cases  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not is_available() or not torch.cuda.is_available(),
        reason="needs a GPU, CuPy, and a PyTorch for GPUs",
    ),
]
TRAINING = ("--folds", 2, "--num-iterations", 6, "--threads", 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("cases"), "a", "b")


def infer(folders, device, *options, logits=None):
    output = folders.output / "_".join(map(str, (device.replace(":", "_"), len(options))))
    words = (
        "infer",
        "-i",
        folders.images,
        "-p",
        logits or folders.logits,
        "-o",
        output,
        *FAST,
        "--device",
        device,
        *options,
    )
    run_here(*words, "--summary", output.with_suffix(".json"), status=0)
    return output, json.loads(output.with_suffix(".json").read_text())["cases"]


@pytest.mark.parametrize("device", ["cuda", "torch:cuda"])
@pytest.mark.parametrize(
    "options", [(), ("--save-probabilities", "--set", "volume.weight=1", "--preview")]
)
def test_infer_writes_the_labels_of_the_cpu(folders, device, options):
    output, cases = infer(folders, device, *options)
    expected, _ = infer(folders, "cpu", *options)
    assert [case["device"] for case in cases] == [device, device]
    for name in ("a.nii.gz", "b.nii.gz"):
        found = load_nifti(output / name)
        wanted = load_nifti(expected / name)
        assert 0 < (wanted > 0).sum() < wanted.size
        assert (found == wanted).mean() >= 0.999
        if options:
            name = name.replace(".nii", "_probabilities.nii")
            np.testing.assert_allclose(
                load_nifti(output / name), load_nifti(expected / name), rtol=0, atol=2e-3
            )


def test_coarse_label_maps_and_strokes(folders, tmp_path):
    maps, _ = infer(folders, "cpu")
    strokes = np.zeros(GRID_SHAPE, np.uint8)
    strokes[8:10, 7, 5] = 2
    for name in ("a", "b"):
        save_nifti(tmp_path / "strokes" / f"{name}.nii.gz", strokes)
    options = (
        "--input-type",
        "labels",
        "--network-spacing",
        "2.0,2.5,2.5",
        "--strokes",
        tmp_path / "strokes",
    )
    output, cases = infer(folders, "cuda", *options, logits=maps)
    expected, _ = infer(folders, "cpu", *options, logits=maps)
    assert {case["device"] for case in cases} == {"cuda"}
    for name in ("a.nii.gz", "b.nii.gz"):
        found = load_nifti(output / name)
        wanted = load_nifti(expected / name)
        assert (found[8:10, 7, 5] == 2).all()
        assert (found == wanted).mean() >= 0.999


def test_the_command_as_a_process_takes_the_gpu_by_itself(folders, tmp_path):
    words = (
        "infer",
        "-i",
        folders.images,
        "-p",
        folders.logits,
        "-o",
        tmp_path / "out",
        "--device",
        "auto",
    )
    done = run_process(*words, status=0)
    assert "device cuda (auto)" in done.stderr
    assert (load_nifti(tmp_path / "out" / "a.nii.gz") > 0).any()


def test_train_crf_learns_what_the_cpu_learns(tmp_path):
    data = write_cases(tmp_path / "data", 4)
    dice = {}
    for device in ("cuda", "cpu"):
        output = tmp_path / device / "params.toml"
        run_here("train-crf", data, "-o", output, *TRAINING, "--device", device, status=0)
        report = json.loads(output.with_suffix(".report.json").read_text())
        assert report["device"] == device
        rows = [row for row in report["measurements"] if row["metric"] == "dice"]
        network, dice[device] = (
            np.mean([row["value"] for row in rows if row["method"] == name])
            for name in ("network", "trained CRF")
        )
        assert dice[device] > network + 0.01
    # The engines sum in another order, and a training follows its gradients, so figures drift
    # apart.
    assert abs(dice["cuda"] - dice["cpu"]) < 0.01


@pytest.mark.parametrize(("method", "tolerance"), [("exact", 1e-5), ("lattice", 1e-4)])
@pytest.mark.parametrize("normalization", ["none", "after", "symmetric"])
def test_points_and_their_gradients(method, tolerance, normalization):
    from crfrefine.layer.functional import gaussian_filter

    shape = (9, 14, 11)
    rng = np.random.default_rng(3)
    axes = np.indices(shape).reshape(3, *shape) * np.array([1.0, 0.7, 2.5]).reshape(3, 1, 1, 1) / 3
    points = np.concatenate([axes, rng.normal(0, 0.3, (1, *shape))])[None].astype(np.float32)
    numbers = rng.normal(size=(1, 3, *shape)).astype(np.float32)
    mask = torch.from_numpy(rng.random(shape) < 0.8)
    results = []
    for device in ("cuda", "cpu"):
        values, features = (
            torch.tensor(array, device=device, requires_grad=True) for array in (numbers, points)
        )
        filtered = gaussian_filter(
            values, features, method=method, normalization=normalization, mask=mask
        )
        filtered.square().sum().backward()
        assert filtered.device.type == device
        results.append([filtered.detach().cpu(), values.grad.cpu(), features.grad.cpu()])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(
            found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max())
        )
