"""Time and memory of `export_prediction`, beside nnU-Net's own export of the same logits, on a made-up body with many labels.

    python -P benchmarks/export.py [--labels 117] [--network 116 128 128] [--image 174 256 256] [--theirs PYTHON]

PYTHON is an interpreter that has nnU-Net (`.venv-nnunet/bin/python` after `make test-nnunet`). Each export runs in a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SPACING = (0.75, 0.75, 1.0)  # x, y, z


def make(folder: Path, num_labels: int, network: list[int], image: list[int]) -> None:
    """Write logits (label, z, y, x) of organs that are ellipsoids, 1.5 nats per voxel across a border, and an image of them."""
    import nibabel

    rng = np.random.default_rng(0)
    axes = np.meshgrid(*[np.linspace(-1, 1, size, dtype=np.float32) for size in network], indexing="ij", sparse=True)
    logits = np.lib.format.open_memmap(folder / "logits.npy", "w+", np.float16, (num_labels, *network))
    best, labels = np.zeros(network, np.float16), np.zeros(network, np.uint8)
    for label in range(1, num_labels):
        radii = rng.uniform(0.03, 0.12, 3) * (1, 2, 2) * (3 if label < 6 else 1)
        center = rng.uniform(-0.8, 0.8, 3) * (1, 0.6, 0.75)
        distance = np.sqrt(sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, center, radii, strict=True)))
        slope = 1.5 * float(np.mean(radii * network) / 2)
        logits[label] = (
            np.clip(slope * (1 - distance), -16, 12)
            + rng.normal(0, 0.5, (1, *[size // 4 for size in network])).repeat(4, 1).repeat(4, 2).repeat(4, 3)[0]
        )
        labels[logits[label] > best] = label
        np.maximum(best, logits[label], out=best)
    index = [np.arange(fine) * coarse // fine for fine, coarse in zip(image, network, strict=True)]
    gray = rng.normal(0, 100, num_labels)[labels[np.ix_(*index)]] + rng.normal(0, 25, image)
    nibabel.save(nibabel.Nifti1Image(gray.astype(np.int16).transpose(), np.diag([*SPACING, 1.0])), folder / "image.nii")


def export(kind: str, folder: Path) -> None:
    """Run one export, and print its seconds, its peak memory in GiB, and a file with the labels."""
    import nibabel

    logits = np.load(folder / "logits.npy")
    stored = nibabel.load(folder / "image.nii").shape[::-1]
    box = [[0, extent] for extent in stored]
    names = ("spacing", "shape_before_cropping", "bbox_used_for_cropping", "shape_after_cropping_and_before_resampling")
    properties = dict(zip(names, (SPACING[::-1], stored, box, stored), strict=True))
    started = time.perf_counter()
    if kind == "theirs":
        from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

        wide = [step * fine / coarse for step, fine, coarse in zip(SPACING[::-1], stored, logits.shape[1:], strict=True)]
        dense = resample_data_or_seg_to_shape(logits.astype(np.float32), stored, wide, SPACING[::-1], order=1, force_separate_z=None)
        nibabel.save(nibabel.Nifti1Image(dense.argmax(0).astype(np.uint8).transpose(), np.eye(4)), folder / f"{kind}.nii.gz")
    else:
        from crfrefine import CrfParameters, nnunet

        parameters = CrfParameters().replace(**{"bilateral.weight": 0.0}) if kind == "no CRF" else None
        nnunet.export_prediction(logits, properties, folder / "image.nii", folder / f"{kind}.nii.gz", parameters=parameters)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 - logits.nbytes / 2**30
    print(f"{kind:10} {time.perf_counter() - started:8.1f} s {peak:6.2f} GiB beside the logits")


def main() -> None:
    """Make a body, export it in each way, and compare the labels."""
    import nibabel

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=117)
    parser.add_argument("--network", type=int, nargs=3, default=[116, 128, 128])
    parser.add_argument("--image", type=int, nargs=3, default=[174, 256, 256])
    parser.add_argument("--theirs")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        export(options.run[0], Path(options.run[1]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, options.labels, options.network, options.image)
        kinds = {"no CRF": sys.executable, "default": sys.executable, **({"theirs": options.theirs} if options.theirs else {})}
        for kind, python in kinds.items():
            subprocess.run([python, "-P", __file__, "--run", kind, name], check=True)
        if options.theirs:
            ours, theirs = (np.asarray(nibabel.load(folder / f"{kind}.nii.gz").dataobj) for kind in ("no CRF", "theirs"))
            print(f"without the CRF, {np.count_nonzero(ours != theirs)} of {ours.size} voxels have another label than nnU-Net's")


if __name__ == "__main__":
    main()
