"""What `infer --workers` costs per case against the plain run: processor time, wall time, and memory of client and scheduler.

    python benchmarks/cluster.py --synthetic 1000            tiny cases, made for this
    python benchmarks/cluster.py --images DIR --logits DIR   cases that are there

Processor time is that of all processes of a run, so it can be compared on a machine that has other work; wall time cannot. It includes the
start of the cluster: what a case costs is the difference between runs of few and of many cases. The summary is
`.jsonl`: a `.json` is written anew all the time, the more often the longer a run takes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np

GRID_SHAPE = (12, 10, 8)
AFFINE = np.diag([1.0, 1.25, 2.5, 1.0])


def make_cases(folder: Path, count: int) -> tuple[Path, Path]:
    """Write a box with noise, and noisy logits of it, `count` times."""
    rng = np.random.default_rng(0)
    images, logits = folder / "images", folder / "logits"
    for path in (images, logits):
        path.mkdir(parents=True)
    box = np.zeros(GRID_SHAPE, dtype=np.float32)
    box[3:9, 3:8, 2:6] = 1.0
    for number in range(count):
        image = 100.0 * box + rng.normal(0.0, 20.0, GRID_SHAPE)
        scores = np.stack([1.0 - 2.0 * box, 2.0 * box - 1.0], axis=-1) + rng.normal(0.0, 1.0, (*GRID_SHAPE, 2))
        nib.save(nib.Nifti1Image(image.astype(np.float32), AFFINE), images / f"case{number:06d}_0000.nii.gz")
        nib.save(nib.Nifti1Image(scores.astype(np.float32), AFFINE), logits / f"case{number:06d}.nii.gz")
    return images, logits


def run(images: Path, logits: Path, output: Path, *options: str) -> dict[str, object]:
    """Run `infer` once; return its times and the memory of its own process, in which the scheduler of `--workers` runs."""
    command = [sys.executable, "-m", "crfrefine", "infer", "-i", images, "-p", logits, "-o", output, "--threads", "1", "-q", *options]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen([*map(str, command), "--summary", f"{output}.jsonl"])
    samples: list[float] = []
    watching = threading.Thread(target=watch, args=(process, samples), daemon=True)
    watching.start()
    status = process.wait()
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    summary = json.loads(Path(f"{output}.jsonl").read_text().splitlines()[-1])
    return {
        "options": " ".join(options) or "plain",
        "status": status,
        "done": summary["num_done"],
        "wall_s": round(wall, 2),
        "run_s": round(summary["seconds"], 2),
        "processor_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "client_mib": {f"{100 * part // 4} %": round(samples[min(len(samples) - 1, len(samples) * part // 4)]) for part in range(1, 5)},
    }


def watch(process: subprocess.Popen[bytes], samples: list[float]) -> None:
    """Note the resident memory of a process, MiB, every second until it ends."""
    while process.poll() is None:
        try:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return
        if pages:
            samples.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        time.sleep(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synthetic", type=int, metavar="N", help="make N tiny cases")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--logits", type=Path)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--no-plain", action="store_true", help="leave the plain run out, with which outputs are compared")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        images, logits = (arguments.images, arguments.logits) if arguments.synthetic is None else make_cases(folder, arguments.synthetic)
        plain = None if arguments.no_plain else run(images, logits, folder / "plain")
        if plain is not None:
            print(json.dumps(plain), flush=True)
        for count in arguments.workers:
            output = folder / f"workers{count}"
            one = run(images, logits, output, "--workers", str(count))
            if plain is not None:
                one["more_processor_s"] = round(float(str(one["processor_s"])) - float(str(plain["processor_s"])), 2)
                names = [path.name for path in (folder / "plain").iterdir()]
                one["same_outputs"] = all((folder / "plain" / name).read_bytes() == (output / name).read_bytes() for name in names)
            print(json.dumps(one), flush=True)


if __name__ == "__main__":
    main()
