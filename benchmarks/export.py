"""Time and memory of `export_prediction`, beside nnU-Net's own interpolation of the same logits, on a made-up body with many labels.

    python -P benchmarks/export.py [--labels 117] [--network 116 128 128] [--image 174 256 256] [--theirs PYTHON]

PYTHON is an interpreter that has nnU-Net (`.venv-nnunet/bin/python` after `make test-nnunet`). Each export runs in a process of its own.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np

SPACING = (0.75, 0.75, 1.0)  # x, y, z


def make(folder: Path, num_labels: int, network: list[int], image: list[int]) -> None:
    """Write logits (label, z, y, x) of organs that are ellipsoids, 1.5 nats per voxel across a border, and an image of them."""
    rng = np.random.default_rng(0)
    axes = np.meshgrid(*[np.linspace(-1, 1, size, dtype=np.float32) for size in network], indexing="ij", sparse=True)
    logits = np.lib.format.open_memmap(folder / "logits.npy", "w+", np.float16, (num_labels, *network))
    best, labels = np.zeros(network, np.float16), np.zeros(network, np.uint8)
    for label in range(1, num_labels):
        radii, center = rng.uniform(0.03, 0.12, 3) * (1, 2, 2) * (3 if label < 6 else 1), rng.uniform(-0.8, 0.8, 3) * (1, 0.6, 0.75)
        distance = np.sqrt(sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, center, radii, strict=True)))
        noise = np.kron(rng.normal(0, 0.5, [size // 4 for size in network]), np.ones((4, 4, 4)))
        logits[label] = np.clip(0.75 * float(np.mean(radii * network)) * (1 - distance), -16, 12) + noise
        labels[logits[label] > best] = label
        np.maximum(best, logits[label], out=best)
    index = np.ix_(*[np.arange(fine) * coarse // fine for fine, coarse in zip(image, network, strict=True)])
    gray = rng.normal(0, 100, num_labels)[labels[index]] + rng.normal(0, 25, image)
    nibabel.save(nibabel.Nifti1Image(gray.astype(np.int16).transpose(), np.diag([*SPACING, 1.0])), folder / "image.nii")


def export(kind: str, folder: Path) -> None:
    """Run one export, and print its seconds and its peak memory beside the logits."""
    logits, stored = np.load(folder / "logits.npy"), nibabel.load(folder / "image.nii").shape[::-1]
    started = time.perf_counter()
    if kind == "theirs":
        from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

        wide = [step * fine / coarse for step, fine, coarse in zip(SPACING[::-1], stored, logits.shape[1:], strict=True)]
        dense = resample_data_or_seg_to_shape(logits.astype(np.float32), stored, wide, SPACING[::-1], order=1, force_separate_z=None)
        nibabel.save(nibabel.Nifti1Image(dense.argmax(0).astype(np.uint8).transpose(), np.eye(4)), folder / "theirs.nii.gz")
    else:
        from crfrefine import CrfParameters, nnunet

        names = ("spacing", "shape_before_cropping", "bbox_used_for_cropping", "shape_after_cropping_and_before_resampling")
        properties = dict(zip(names, (SPACING[::-1], stored, [[0, extent] for extent in stored], stored), strict=True))
        parameters = CrfParameters().replace(**{"bilateral.weight": 0.0}) if kind == "no CRF" else None
        nnunet.export_prediction(logits, properties, folder / "image.nii", folder / f"{kind}.nii.gz", parameters=parameters)
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 - logits.nbytes / 2**30
    print(f"{kind:10} {seconds:8.1f} s {peak:6.2f} GiB beside the logits", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        sys.exit(export(sys.argv[2], Path(sys.argv[3])))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--labels", type=int, default=117)
    parser.add_argument("--network", type=int, nargs=3, default=[116, 128, 128])
    parser.add_argument("--image", type=int, nargs=3, default=[174, 256, 256])
    parser.add_argument("--theirs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), options.labels, options.network, options.image)
        for kind in ("no CRF", "default", *(["theirs"] if options.theirs else [])):
            subprocess.run([options.theirs if kind == "theirs" else sys.executable, "-P", __file__, "--run", kind, name], check=True)
        if options.theirs:
            ours, theirs = (np.asarray(nibabel.load(f"{name}/{kind}.nii.gz").dataobj) for kind in ("no CRF", "theirs"))
            print(f"without the CRF, {np.count_nonzero(ours != theirs)} of {ours.size} voxels have another label than nnU-Net's")
