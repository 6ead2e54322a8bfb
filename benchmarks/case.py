"""Suite `case`: whole BraTS-like cases through the command, start-up, reading, computing and writing included.

Their processor time is compared with that of reading the same files and writing a label map.

Four modalities in float32, zero outside the brain; float32 logits of five labels, constant outside it, as networks leave them that crop
their input; everything gzipped. The files have just been written, so they come from the page cache.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from peers import WORKERS
from processes import measure_command, time_command
from workloads import WORKLOADS, make

COMMAND = Path(sys.executable).with_name("crfrefine")
NUM_CASES = 3
OUTSIDE_LOGIT = 8.0


def _write_cases(folder: Path) -> tuple[Path, Path]:
    arrays = make(WORKLOADS["L"])
    brain = arrays.image.any(axis=0)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    images, logits = folder / "images", folder / "logits"
    images.mkdir()
    logits.mkdir()
    rng = np.random.default_rng(7)
    for modality, image in enumerate(arrays.image):
        values = np.where(brain, image + rng.uniform(-0.5, 0.5, image.shape), 0.0).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(values, affine), images / f"case0_{modality:04d}.nii.gz")
    outside = np.full(len(arrays.logits), -OUTSIDE_LOGIT, np.float32)
    outside[0] = OUTSIDE_LOGIT
    channels_last = np.where(brain[..., None], np.moveaxis(arrays.logits, 0, -1), outside)
    nibabel.save(nibabel.Nifti1Image(channels_last, affine), logits / "case0.nii.gz")
    for copy in range(1, NUM_CASES):
        for source in [*images.glob("case0_*"), *logits.glob("case0*")]:
            shutil.copyfile(source, source.with_name(source.name.replace("case0", f"case{copy}", 1)))
    return images, logits


def _infer(images: Path, logits: Path, output: Path, threads: int, *more: str | Path) -> list[str | Path]:
    return [
        COMMAND,
        "infer",
        "-q",
        "-i",
        images,
        "-p",
        logits,
        "-o",
        output,
        "-m",
        "nonzero",
        "-c",
        "brats",
        "--set",
        "volume.weight=0",  # as in the records that exist
        "--threads",
        str(threads),
        *more,
    ]


def _check(output: Path, logits: Path) -> dict[str, float]:
    """The written labels are on the input's grid, and neither the plain argmax nor far from it."""
    written = nibabel.load(output / "case0.nii.gz")
    source = nibabel.load(logits / "case0.nii.gz")
    plain = np.asarray(source.dataobj).argmax(axis=-1)
    labels = np.asarray(written.dataobj)
    changed = float((labels != plain).mean())
    if labels.shape != plain.shape or not np.allclose(written.affine, source.affine) or not 0.0 < changed < 0.2:
        raise SystemExit(f"benchmark: the command's label map is wrong: {labels.shape}, {changed:.1%} of the voxels changed")
    return {"voxels_changed": changed}


def _beside_files(images: Path, logits: Path, labels: Path, repeats: int) -> dict[str, list[float]]:
    """Processor seconds, on one thread: one case through the command, and a program that reads its files and writes its label map."""
    scores, output = logits / "case0.nii.gz", labels.with_name("again.nii.gz")
    first, *others = (images / f"case0_{modality:04d}.nii.gz" for modality in range(4))
    more = [argument for path in others for argument in ("-i", path)]
    commands: dict[str, list[str | Path]] = {
        "infer": _infer(first, scores, output, 1, *more),
        "files": [sys.executable, WORKERS / "run_files.py", scores, labels, output, first, *others],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            seconds[name].append(measure_command(command)["processor_seconds"])
    return seconds


def run(*, quick: bool) -> dict[str, Any]:
    """One case by itself, and a folder of three; best of 3 (of 1 when quick), two threads. Beside reading and writing: 7 runs (2)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images, logits = _write_cases(folder)
        size_mib = sum(path.stat().st_size for path in folder.rglob("case0*")) / 2**20
        single: list[float] = []
        batch: list[float] = []
        stages: Any = None
        files = [argument for modality in range(1, 4) for argument in ("-i", images / f"case0_{modality:04d}.nii.gz")]
        for repeat in range(1 if quick else 3):
            one, all_cases = folder / f"one{repeat}", folder / f"all{repeat}"
            single.append(time_command(_infer(images / "case0_0000.nii.gz", logits / "case0.nii.gz", one, 2, *files)))
            summary = folder / "summary.json"
            batch.append(time_command(_infer(images, logits, all_cases, 2, "--summary", summary)) / NUM_CASES)
            stages = json.loads(summary.read_text())
        checks = _check(all_cases, logits)
        processor_seconds = _beside_files(images, logits, all_cases / "case0.nii.gz", 2 if quick else 7)
    return {
        "input_mib_gzipped": size_mib,
        "single_seconds": min(single),
        "folder_seconds_per_case": min(batch),
        "runs": {"single": single, "folder_per_case": batch},
        "processor_seconds": processor_seconds,
        "checks": checks,
        "summary": stages,
    }
