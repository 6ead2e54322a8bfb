"""Our metrics beside those of other libraries, on real and crafted masks: values, conventions, time; for `docs/decisions/metrics.md`.

Usage: metric_libraries.py [DATA] [--num-cases N] [--json FILE]

DATA (default: $CRFREFINE_DATA) holds hippocampus/ and brats2015/. The libraries are installed into an environment of their own under
.bench/, which sees the packages of this one, as MONAI needs its PyTorch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from environment import describe
from markdown_table import markdown_table
from peers import BENCH, ROOT, WORKERS
from processes import ONE_THREAD
from report import provenance, write_between_markers

from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.cases.case import discover_cases, load_case

OURS = "crfrefine"
METRICS = ("dice", "iou", "sensitivity", "precision", "surface_dice", "hd_mm", "hd95_mm", "assd_mm")
# Dependencies that are for other things than metrics on arrays, such as windows, are left out.
INSTALLS = (
    ("--no-deps", "monai==1.6.1", "seg-metrics==1.2.8", "medpy==0.5.2", "surface-distance==0.1", "medutils==0.1.21"),
    ("pandas", "tqdm", "pingouin", "absl-py"),
)
DATASETS: dict[str, dict[str, tuple[int, ...]]] = {
    "hippocampus": {"anterior": (1,), "posterior": (2,)},
    "brats2015": {"whole": (1, 2, 3, 4), "core": (1, 3, 4)},
}
NUM_TUMORS = 2

Pair = tuple[np.ndarray, np.ndarray, tuple[float, ...]]


def interpreter() -> Path:
    """The Python of the environment with all of the libraries; installs what is not there yet."""
    home = BENCH / "env" / "metric_libraries"
    python, complete = home / "bin" / "python", home / "complete"
    if not complete.exists():
        sys.stderr.write(f"installing the libraries into {home.relative_to(ROOT)}\n")
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        packages = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        (packages / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
        for requirements in INSTALLS:
            subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements], check=True)
        complete.touch()
    return python


def crafted_pairs() -> Iterator[tuple[str, Pair]]:
    """Masks on which conventions show: 12×10×9 voxels of 0.7×0.9×3 mm."""
    spacing = (0.7, 0.9, 3.0)
    empty = np.zeros((12, 10, 9), bool)
    voxel, block, shifted, line = (empty.copy() for _ in range(4))
    voxel[5, 4, 3] = True
    block[3:8, 3:8, 3:7] = True
    shifted[4:9, 3:8, 3:7] = True
    line[2:6, 4, 3] = True
    speck = line.copy()
    speck[11, 4, 3] = True
    cut = empty.copy()
    cut[:6] = True
    yield "both empty", (empty, empty, spacing)
    yield "prediction empty", (empty, block, spacing)
    yield "reference empty", (block, empty, spacing)
    yield "the same voxel", (voxel, voxel, spacing)
    yield "a block, shifted by a voxel of 0.7 mm", (shifted, block, spacing)
    yield "a line of four voxels, with a speck 4.2 mm away", (speck, line, spacing)
    yield "half of the grid against all of it", (cut, ~empty, spacing)


def real_pairs(data: Path, num_cases: int) -> Iterator[tuple[str, Pair]]:
    """The network's labels and the reference, a pair a case and region."""
    for dataset, regions in DATASETS.items():
        folder = data / dataset
        cases = list(discover_cases(folder / "images", folder / "logits_weak", labels=folder / "labels"))
        for files in cases[: num_cases if dataset == "hippocampus" else NUM_TUMORS]:
            case = load_case(files, with_labels=True)
            assert case.labels is not None
            network = argmax_labels(case.logits)
            for name, labels in regions.items():
                # C order, as other libraries expect it and slow down without.
                found, wanted = (np.ascontiguousarray(np.isin(label_map, labels)) for label_map in (network, case.labels))
                yield f"{dataset}/{files.case_id}/{name}", (found, wanted, case.spacing)


def measure_all(pairs: dict[str, Pair]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.npz"
        parts = ("prediction", "reference", "spacing")
        arrays = {f"{name}/{part}": value for name, pair in pairs.items() for part, value in zip(parts, pair, strict=True)}
        np.savez(file, **{name: np.asarray(value) for name, value in arrays.items()})
        command = [interpreter(), WORKERS / "measure_with_libraries.py", file]
        done = subprocess.run(
            command, env=os.environ | ONE_THREAD | {"PYTHONPATH": str(ROOT)}, check=True, stdout=subprocess.PIPE, text=True
        )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _deviation(pairs: dict[str, Any], library: str, metric: str) -> str:
    """The largest difference from ours; of ratios in points, which are hundredths."""
    differences = []
    for record in pairs.values():
        ours, theirs = record[OURS]["values"][metric], record[library].get("values", {}).get(metric)
        if theirs is None:
            return "–"
        if isinstance(ours, str) or isinstance(theirs, str):
            continue  # undefined
        differences.append(abs(theirs - ours))
    unit, scale = (" mm", 1.0) if metric.endswith("_mm") else ("", 100.0)
    largest = scale * max(differences)
    return "same" if largest < 5e-4 else f"{largest:.2g}{unit}"


def agreement_table(pairs: dict[str, Any], libraries: list[str]) -> str:
    rows = []
    for dataset in DATASETS:
        own = {name: record for name, record in pairs.items() if name.startswith(f"{dataset}/")}
        for library in libraries:
            seconds = [record[library].get("seconds") for record in own.values()]
            time = "fails" if None in seconds else f"{1000 * statistics.median(seconds):.1f} ms"
            cells = [""] * len(METRICS) if library == OURS else [_deviation(own, library, metric) for metric in METRICS]
            rows.append([f"{dataset}, {len(own)} pairs", library, *cells, time])
    return markdown_table(["data", "library", *(f"`{metric}`" for metric in METRICS), "time per pair"], rows)


def _number(value: float | str | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return {"nan": "undefined", "inf": "∞"}.get(value, value)
    return f"{value:.1e}" if value > 1e6 else f"{value:.3f}".rstrip("0").rstrip(".")


def convention_table(pairs: dict[str, Any], libraries: list[str]) -> str:
    shown = ("dice", "surface_dice", "hd_mm", "hd95_mm", "assd_mm")
    rows = []
    for name in (name for name, _ in crafted_pairs()):
        cells = []
        for library in libraries:
            record = pairs[name][library]
            if "error" in record:
                cells.append(record["error"].split(":")[0])
            else:
                cells.append(" / ".join(_number(record["values"].get(metric)) for metric in shown))
        rows.append([name, *cells])
    return markdown_table(["Dice / surface Dice / HD / HD95 / ASSD", *libraries], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Our metrics beside those of other libraries.")
    parser.add_argument("data", nargs="?", type=Path, default=os.environ.get("CRFREFINE_DATA"), help="default: $CRFREFINE_DATA")
    parser.add_argument("--num-cases", type=int, default=10, metavar="N", help="of hippocampus")
    parser.add_argument("--json", type=Path, default=BENCH / "metric_libraries.json", help="every value, of every library")
    options = parser.parse_args()
    if options.data is None:
        raise SystemExit("name the folder that holds hippocampus/ and brats2015/, or set CRFREFINE_DATA")
    pairs = dict(crafted_pairs()) | dict(real_pairs(Path(options.data), options.num_cases))
    record = measure_all(pairs)
    record["environment"] = describe("torch")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    libraries = list(next(iter(record["pairs"].values())))
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    text = (
        f"Largest difference from ours (ratios in points), and the time of one call for all metrics that the library has, one thread:\n\n"
        f"{agreement_table(record['pairs'], libraries)}\n"
        f"Results on crafted masks of 12×10×9 voxels of 0.7×0.9×3 mm, distances in mm:\n\n"
        f"{convention_table(record['pairs'], libraries)}\n"
        f"*{versions}.* {provenance(record)}"
    )
    write_between_markers(ROOT / "docs" / "decisions" / "metrics.md", "libraries", text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
