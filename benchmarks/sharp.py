"""Labels made coarse and brought back to the image's resolution by `crfrefine` and its rivals.

Usage: sharp.py DATA [--half even|odd] [--quick | --masks]

DATA holds acdc/ atrium/ hippocampus/, each with images/ labels/, and totalsegmentator/ for --masks.
Values, such as those of the guided filter among 51 settings, are chosen on cases of even numbers
and reported on odd ones. Hearts become coarse in plane only. A score is a mean over labels.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from report import markdown_table, source_hash
from scipy.ndimage import correlate1d, gaussian_filter, maximum_filter, minimum_filter
from scripts import case_names, new_parser

import crfrefine
from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.metrics.overlap import measure_case, one_voxel
from crfrefine.statistics.paired import holm, signed_rank
from crfrefine.statistics.texts import format_p
from crfrefine.train.guided import Guide

ORGANS = {"acdc": "hearts", "atrium": "atria", "hippocampus": "hippocampi"}
IN_PLANE = "acdc"  # becomes coarse along the first two axes only
COARSE_BY = ("majority", "sampled")
FACTORS = (2, 3, 4)
METRICS = {"dice": "Dice", "surface_dice": "surface Dice at one voxel"}
NEAREST = "nearest"
CRF = "crfrefine"
LOSS = 0.5  # points; cases that lose more are counted
QUICK_CASES = 2
HALVES = {"even": slice(0, None, 2), "odd": slice(1, None, 2)}

MASKS = {  # of TotalSegmentator: a mask, its image, options
    "example_seg_dicom": ("ct_dicom", "--network-spacing auto", "-c body-ct", "-c default"),
    "example_seg": ("example_ct_sm.nii.gz", "-c body-ct", "-c default"),
    "example_seg_fast": ("example_ct_sm.nii.gz", "-c body-ct", "-c default"),
    "example_seg_mr": ("example_mr_sm.nii.gz", "-c body-mr", "-c default"),
}

# the lengths in voxels of the network
SIGMA = 0.5
GUIDED_RADIUS = 0.5
GUIDED_EPSILON = 0.01
KAPPA = 2.0
MIN_SHARE = 1e-3
MAX_BIAS = 6.0
NUM_ROUNDS = 3

Labels = NDArray[np.integer[Any]]
Shares = NDArray[np.float32]
Row = tuple[str, str, int]  # folder, way and factor of making coarse
Scores = dict[str, dict[str, float]]  # metrics of each method


@dataclass(frozen=True)
class Coarse:
    labels: Labels  # (*grid), constant in each block
    image: NDArray[Any]  # (*grid), raw intensities
    spacing: tuple[float, ...]  # mm of the image, one per axis
    factors: tuple[float, ...]


def make_coarse(labels: Labels, factors: Sequence[int], how: str) -> Labels:
    """Return a label per block: that of its middle voxel ("sampled"), or the most frequent one.

    If two labels have equally many voxels, the middle voxel decides where it has one of them.
    """
    counts = _one_hot(labels)
    middles = []
    for axis, (size, factor) in enumerate(zip(labels.shape, factors, strict=True), start=1):
        starts = np.arange(0, size, factor)
        middles.append(np.minimum(starts + factor // 2, size - 1))
        counts = np.add.reduceat(counts, starts, axis)
    middle = labels[np.ix_(*middles)]
    if how == "sampled":
        return middle
    counts += np.float32(0.5) * _one_hot(middle, len(counts))
    return np.argmax(counts, axis=0).astype(labels.dtype)


def to_grid(blocks: Labels, factors: Sequence[int], shape: Sequence[int]) -> Labels:
    """Repeat each block's label in all of its voxels."""
    for axis, factor in enumerate(factors):
        blocks = np.repeat(blocks, factor, axis)
    return blocks[tuple(slice(size) for size in shape)]


def interpolate(coarse: Coarse) -> Shares:
    """Return the shares (L, *grid) by linear interpolation between the centers of blocks.

    This is the mean over a box of a block's size around each voxel.
    """
    shares = _one_hot(coarse.labels)
    for axis, factor in enumerate(coarse.factors, start=1):
        reach = int(np.ceil((factor - 1) / 2))
        weights = np.clip(factor / 2 + 0.5 - np.abs(np.arange(-reach, reach + 1)), 0, 1)
        shares = correlate1d(shares, weights / weights.sum(), axis, mode="nearest")
    return shares


def soften(coarse: Coarse) -> Shares:
    """Return the shares (L, *grid): labels under a Gaussian along the axes that are coarse."""
    sigmas = [SIGMA * factor if factor > 1 else 0.0 for factor in coarse.factors]
    return gaussian_filter(_one_hot(coarse.labels), (0.0, *sigmas), mode="nearest")


def _one_hot(labels: Labels, num_labels: int | None = None) -> Shares:
    numbers = range(num_labels or int(labels.max()) + 1)
    return np.stack([(labels == label).astype(np.float32) for label in numbers])


def guide(coarse: Coarse) -> Shares:
    """Return interpolated shares, filtered along the image."""
    image = normalize_intensity(coarse.image[None], crfrefine.CrfParameters().intensity)
    steps = [1 / factor if factor > 1 else 1e9 for factor in coarse.factors]
    windows = Guide(image, GUIDED_RADIUS, steps)
    return np.stack([windows.filter(share, [GUIDED_EPSILON])[0] for share in interpolate(coarse)])


def keep_volumes(shares: Shares, coarse: Coarse) -> Labels:
    """Return the argmax of log shares, with biases that give each label its volume in the map.

    Voxels further than a block from other labels keep their label.
    """
    sizes = [2 * int(np.ceil(factor)) + 1 if factor > 1 else 1 for factor in coarse.factors]
    band = maximum_filter(coarse.labels, sizes) != minimum_filter(coarse.labels, sizes)
    shares = shares[:, band]
    places = [np.flatnonzero(share > MIN_SHARE) for share in shares]
    scores = KAPPA * np.log(np.maximum(shares, MIN_SHARE))
    volumes = np.bincount(coarse.labels[band], minlength=len(scores))
    for _ in range(NUM_ROUNDS):
        for label in np.flatnonzero(volumes)[1:]:
            near = scores[:, places[label]]
            margins = np.sort(near[label] - np.delete(near, label, axis=0).max(axis=0))[::-1]
            last = min(volumes[label], len(margins) - 1)
            scores[label] -= np.clip(margins[last - 1 : last + 1].mean(), -MAX_BIAS, MAX_BIAS)
    result = coarse.labels.copy()
    result[band] = scores.argmax(axis=0)
    return result


def crf(coarse: Coarse) -> Labels:
    network = [size * factor for size, factor in zip(coarse.spacing, coarse.factors, strict=True)]
    options = {"spacing": coarse.spacing, "network_spacing": network, "input_type": "labels"}
    options |= {"parameters": "sharp", "threads": 1}
    return crfrefine.refine(coarse.labels, coarse.image, **options).label_map


METHODS: dict[str, Callable[[Coarse], Labels]] = {
    "linear shares": lambda coarse: interpolate(coarse).argmax(axis=0),
    "softened + volume": lambda coarse: keep_volumes(soften(coarse), coarse),
    "guided filter + volume": lambda coarse: keep_volumes(guide(coarse), coarse),
    CRF: crf,
}


def regions_of(labels: Labels) -> dict[str, tuple[int, ...]]:
    return {str(label): (int(label),) for label in np.unique(labels[labels > 0])}


def score(labels: Labels, truth: Labels, spacing: Sequence[float]) -> dict[str, float]:
    """Mean over the labels of the reference."""
    options = {"tolerance_mm": one_voxel(spacing), "metrics": tuple(METRICS)}
    values = measure_case(labels, truth, regions_of(truth), spacing, **options).values()
    return {metric: float(np.mean([row[metric] for row in values])) for metric in METRICS}


def measure(data: Path, name: str) -> dict[Row, Scores]:
    """Measure a case, made coarse in every way."""
    image = np.asarray(nibabel.load(data / f"images/{name}_0000.nii.gz").dataobj)
    labels = nibabel.load(data / f"labels/{name}.nii.gz")
    truth = np.asarray(labels.dataobj).astype(np.uint8)
    spacing = tuple(map(float, labels.header.get_zooms()[:3]))
    result = {}
    for how in COARSE_BY:
        for factor in FACTORS:
            lengths = [factor, factor, factor]
            if data.name == IN_PLANE:
                lengths[2] = 1
            blocks = make_coarse(truth, lengths, how)
            coarse = Coarse(to_grid(blocks, lengths, truth.shape), image, spacing, lengths)
            scores = {NEAREST: score(coarse.labels, truth, spacing)}
            for method, bring_back in METHODS.items():
                scores[method] = score(bring_back(coarse), truth, spacing)
            result[data.name, how, factor] = scores
    return result


def _values(cases: Sequence[Scores], method: str, metric: str) -> NDArray[np.float64]:
    return np.array([case[method][metric] for case in cases])


def gain_table(found: dict[Row, list[Scores]], metric: str) -> str:
    """Return points above nearest neighbor (cases that lose more than LOSS, worst), recovered."""
    rows = []
    for (folder, how, factor), cases in found.items():
        before = _values(cases, NEAREST, metric)
        row = [ORGANS[folder], how, f"{factor}×", str(len(cases)), f"{before.mean():.3f}"]
        for method in METHODS:
            change = 100 * (_values(cases, method, metric) - before)
            num_losses = np.count_nonzero(change < -LOSS)
            row.append(f"{change.mean():+.2f} ({num_losses}, {change.min():+.2f})")
        gain = _values(cases, CRF, metric).mean() - before.mean()  # The ceiling is 1: the labels.
        rows.append([*row, f"{100 * gain / (1 - before.mean()):.0f} %"])
    return markdown_table(["", "coarse by", "", "cases", NEAREST, *METHODS, "recovered"], rows)


def test_table(found: dict[Row, list[Scores]], metric: str) -> str:
    """Points of `crfrefine` above each other method; p of Wilcoxon's test, after Holm in a row."""
    others = [NEAREST, *(method for method in METHODS if method != CRF)]
    rows = []
    for (folder, how, factor), cases in found.items():
        own = _values(cases, CRF, metric)
        gains = [100 * (own - _values(cases, other, metric)) for other in others]
        row = [ORGANS[folder], how, f"{factor}×"]
        tests = holm([signed_rank(gain)[0] for gain in gains])
        for gain, p_value in zip(gains, tests, strict=True):
            row.append(f"{gain.mean():+.2f} ({format_p(p_value)})")
        rows.append(row)
    return markdown_table(["", "coarse by", "", *others], rows)


def report(found: dict[Row, list[Scores]]) -> str:
    text = ""
    for metric, title in METRICS.items():
        title = f"points above nearest (cases that lose more than {LOSS:g}, worst case)"
        gains = f"{title}\n\n{gain_table(found, metric)}"
        tests = f"points of {CRF} above the others (p after Holm)\n\n{test_table(found, metric)}"
        text += f"### {title}: {gains}\n### {title}: {tests}\n"
    return text + f"*sources {source_hash()}*\n"


def mask_row(folder: Path, mask: str, image: str, options: str) -> list[str]:
    """What the command does to a mask without a reference: a row of the table of masks."""
    file = folder / f"{mask}.nii.gz"
    with TemporaryDirectory() as home:
        source = folder / image
        result = Path(home, "result.nii.gz")
        command = [sys.executable, "-m", "crfrefine"]
        if source.is_dir():
            source = Path(home, "image.nii.gz")
            subprocess.run([*command, "convert", folder / image, source], check=True)
        words = f"--input-type labels --threads 1 --allow-vanishing -q {options}".split()
        begin = os.times()
        files = ["-i", source, "-p", file, "-o", result]
        subprocess.run([*command, "infer", *files, *words], check=True)
        seconds = sum(os.times()[2:4]) - sum(begin[2:4])
        volumes = [nibabel.as_closest_canonical(nibabel.load(path)) for path in (file, result)]
        old, new = (np.asarray(volume.dataobj) for volume in volumes)
    regions = regions_of(old)
    spacing = volumes[0].header.get_zooms()
    before = measure_case(old, old, regions, spacing)
    after = measure_case(new, old, regions, spacing)
    changed = np.count_nonzero(old != new) / np.count_nonzero(old)
    ratios = [after[name]["volume_ml"] / before[name]["volume_ml"] - 1 for name in regions]
    largest = max(abs(ratio) for ratio in ratios)
    counts = [sum(row["num_components"] for row in values.values()) for values in (before, after)]
    border = np.nanmax([row["hd95_mm"] for row in after.values()])
    farthest = np.nanmax([row["hd_mm"] for row in after.values()])
    cells = [f"`{mask}`", f"`{options}`", str(len(regions)), f"{100 * changed:.2f} %"]
    cells += [str(ratios.count(-1.0)), f"{100 * largest:.2f} %"]
    cells += [f"{counts[0]:.0f} → {counts[1]:.0f}", f"{border:.1f} mm", f"{farthest:.1f} mm"]
    return [*cells, f"{seconds:.1f} s"]


def mask_table(folder: Path) -> str:
    header = ["mask", "options", "structures", "voxels changed", "vanished", "volume"]
    header += ["components", "border, 95 %", "farthest", "CPU time"]
    rows = []
    for mask, (image, *all_options) in MASKS.items():
        rows += [mask_row(folder, mask, image, options) for options in all_options]
    return markdown_table(header, rows)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("data", type=Path, help="folder with acdc/ atrium/ hippocampus/")
    parser.add_argument("--half", choices=HALVES, default="odd")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_CASES} cases of each organ")
    masks_help = "only what changes in masks of TotalSegmentator"
    parser.add_argument("--masks", action="store_true", help=masks_help)
    options = parser.parse_args()
    if options.masks:
        sys.stdout.write(mask_table(options.data / "totalsegmentator"))
        return
    num_cases = QUICK_CASES if options.quick else None
    folders = []
    names = []
    for organ in ORGANS:
        chosen = case_names(options.data / organ)[HALVES[options.half]][:num_cases]
        folders += [options.data / organ] * len(chosen)
        names += chosen
    if not names:
        raise SystemExit(f"sharp: no cases in {options.data}; expected acdc/labels/*.nii.gz, …")
    found: dict[Row, list[Scores]] = {}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for name, case in zip(names, pool.map(measure, folders, names), strict=True):
            for row, scores in case.items():
                found.setdefault(row, []).append(scores)
            sys.stderr.write(f"sharp: {name}\n")
    sys.stdout.write(report(found))


if __name__ == "__main__":
    main()
