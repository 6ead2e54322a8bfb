"""A robot user corrects weak networks with strokes.

Dice by the number of strokes, beside fixed voxels, grow cut and random walker.

    pip install itk-growcut scikit-image
    strokes.py [--quick]

$CRFREFINE_DATA holds hippocampus/ and atrium/, each with images/ labels/ logits_weak/. Values were
chosen on cases of even numbers, figures are of odd ones. The robot draws off center in one of the
three largest errors (components of wrong voxels) of its method's result: a line of 10 mm, three
voxels wide, where its label is right. The result without strokes has the seeds of the rivals.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report import describe, markdown_table, provenance
from scipy import ndimage
from scripts import DATA, new_parser
from sharp import make_coarse, to_grid
from study import labeled_cases

import crfrefine
from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.strokes import BACKGROUND
from crfrefine.cases.case import load_case
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.reading_options import ReadingOptions

Labels = NDArray[np.uint8]
NUM_STROKES = 10
SHOWN = (0, 1, 2, 3, 5, 10)
LINE_MM = 10.0
NUM_LARGEST = 3
FAR_MM = 10.0
FACTOR = 2  # voxels of the image in one of the coarse label maps, along each axis
SETTINGS = {  # folder, number of cases, form of the network's output
    "hippocampi, logits": ("hippocampus", 24, "logits"),
    "atria, logits": ("atrium", 10, "logits"),
    "hippocampi, label maps": ("hippocampus", 24, "labels"),
    f"hippocampi, label maps {FACTOR}× coarser": ("hippocampus", 24, "coarse"),
}


@dataclass(frozen=True)
class Subject:
    name: str
    image: NDArray[np.float32]  # (M, *grid)
    spacing: tuple[float, ...]
    truth: Labels
    network: NDArray[Any]
    options: dict[str, Any]  # of `Plan.run`

    @cached_property
    def plan(self) -> crfrefine.Plan:
        return crfrefine.Plan(self.image, spacing=self.spacing, threads=1)

    @cached_property
    def refined(self) -> Labels:
        return self.refine(None)

    @cached_property
    def normalized(self) -> NDArray[np.float32]:
        return normalize_intensity(self.image, crfrefine.CrfParameters().intensity)[0]

    def refine(self, strokes: Labels | None, plan: crfrefine.Plan | None = None) -> Labels:
        result = (plan or self.plan).run(self.network, strokes=strokes, **self.options)
        return np.asarray(result.label_map, np.uint8)

    def dice(self, labels: Labels) -> float:
        """Mean over the labels of the reference, in points."""
        ratios = []
        for label in np.unique(self.truth[self.truth > 0]):
            found = labels == label
            truth = self.truth == label
            overlap = np.count_nonzero(found & truth)
            ratios.append(2 * overlap / (np.count_nonzero(found) + np.count_nonzero(truth)))
        return 100 * float(np.mean(ratios))

    def is_far(self, strokes: Labels) -> NDArray[np.bool_]:
        """Where voxels are more than FAR_MM away from all strokes."""
        return distance_to(strokes != 0, self.spacing) > FAR_MM


def distance_to(voxels: NDArray[np.bool_], spacing: tuple[float, ...]) -> NDArray[np.float64]:
    """The distance to the nearest of some voxels, in mm."""
    return ndimage.distance_transform_edt(~voxels, sampling=spacing)


def cases_of(folder: str) -> list[CaseFiles]:
    """Return the odd cases of a folder; none without data."""
    data = DATA / folder
    if data.is_dir():
        return labeled_cases(data, data / "logits_weak")[1::2]
    return []


def read(files: CaseFiles, form: str) -> Subject:
    case = load_case(files, ReadingOptions(resample="linear"), with_labels=True)
    network = np.array(case.logits)
    options = {}
    if form != "logits":
        network = network.argmax(axis=0).astype(np.uint8)
        options = {"input_type": "labels"}
    if form == "coarse":
        factors = (FACTOR,) * 3
        network = to_grid(make_coarse(network, factors, "majority"), factors, network.shape)
        options["network_spacing"] = [FACTOR * step for step in case.spacing]
    image = np.array(case.image)
    truth = np.array(case.labels, np.uint8)
    return Subject(files.case_id, image, tuple(case.spacing), truth, network, options)


def fix(subject: Subject, strokes: Labels) -> Labels:
    """The drawn voxels, nothing around them."""
    return np.where(strokes == 0, subject.refined, strokes % BACKGROUND).astype(np.uint8)


def _near_strokes(
    window: float, decide: Callable[[Any, Labels, Any], Any], subject: Subject, strokes: Labels
) -> Labels:
    """Decide voxels near strokes.

    `decide` takes image and seeds (label + 1 or 0) of a box and the spacing, and returns label + 1.
    """
    free, _ = ndimage.label(distance_to(strokes != 0, subject.spacing) <= window)
    result = fix(subject, strokes)
    for number, near in enumerate(ndimage.find_objects(free), start=1):
        box = tuple(slice(max(0, side.start - 2), side.stop + 2) for side in near)
        open_voxels = (free[box] == number) & (strokes[box] == 0)
        seeds = np.where(open_voxels, 0, result[box] + 1).astype(np.uint8)
        if len(np.unique(seeds)) > 2 and open_voxels.any():
            decided = decide(subject.normalized[box], seeds, np.array(subject.spacing))
            result[box] = np.where(open_voxels, decided - 1, result[box])
    return result


def grow_cut(image: Any, seeds: Labels, spacing: Any) -> Any:
    import itk

    volumes = []
    for array in (image.astype(np.float32), seeds):
        volume = itk.image_from_array(np.ascontiguousarray(array))
        volume.SetSpacing(spacing[::-1])
        volumes.append(volume)
    gray, drawn = volumes
    return itk.array_from_image(itk.fast_grow_cut(gray, seed_image=drawn))


def walk(image: Any, seeds: Labels, spacing: Any) -> Any:
    from skimage.segmentation import random_walker

    used, numbers = np.unique(seeds, return_inverse=True)
    numbers = numbers.reshape(seeds.shape)
    return used[random_walker(image, numbers, mode="cg_j", tol=1e-5, spacing=spacing)]


CRF = "crfrefine"
# The rivals decide voxels so many mm near to strokes: the best of 2, 4, 6 on even hippocampi.
METHODS: dict[str, Callable[[Subject, Labels], Labels]] = {
    CRF: Subject.refine,
    "fixed voxels": fix,
    "grow cut": partial(_near_strokes, 2.0, grow_cut),
    "random walker": partial(_near_strokes, 4.0, walk),
}
for name, package in (("grow cut", "itk"), ("random walker", "skimage")):
    if importlib.util.find_spec(package) is None:
        sys.stderr.write(f"strokes: {name} left out: {package} is not installed\n")
        del METHODS[name]


def draw(subject: Subject, strokes: Labels, middle: Any, axis: int, value: int) -> None:
    """Draw a line through a voxel along an axis, where the reference has that voxel's label.

    The axis is the first or the second one.
    """
    # Views: what is drawn there is drawn in the volume.
    truth = subject.truth[..., middle[2]].swapaxes(0, axis)
    plane = strokes[..., middle[2]].swapaxes(0, axis)
    center = middle[axis]
    side = middle[1 - axis]
    label = truth[center, side]
    line = [center]
    reach = int(LINE_MM / 2 / subject.spacing[axis])
    for step in (1, -1):
        for place in range(center + step, center + step * (reach + 1), step):
            if not 0 <= place < len(truth) or truth[place, side] != label:
                break
            line.append(place)
    across = range(max(0, side - 1), min(truth.shape[1], side + 2))
    drawn = np.ix_(line, across)
    plane[drawn] = np.where(truth[drawn] == label, value, plane[drawn])


def correct(subject: Subject, labels: Labels, strokes: Labels, rng: np.random.Generator) -> bool:
    """Draw one stroke in an error; return whether there is one."""
    errors, _ = ndimage.label(labels != subject.truth)
    sizes = np.bincount(errors.ravel())[1:]
    if not len(sizes):
        return False
    error = errors == 1 + rng.choice(np.argsort(-sizes, kind="stable")[:NUM_LARGEST])
    label = np.bincount(subject.truth[error]).argmax()
    outside = np.pad(~(error & (subject.truth == label)), 1, constant_values=True)
    depth = distance_to(outside, subject.spacing)[1:-1, 1:-1, 1:-1]
    off_center = np.argwhere(depth >= depth.max() / 2)
    middle = off_center[rng.integers(len(off_center))]
    draw(subject, strokes, middle, int(rng.integers(2)), int(label or BACKGROUND))
    return True


def measure(folder: str, number: int, form: str) -> dict[str, Any]:
    """Return the figures of a case; those of a method are lists over the strokes."""
    subject = read(cases_of(folder)[number], form)
    found = {}
    for method, update in METHODS.items():
        rng = np.random.default_rng(sum(map(ord, subject.name)))
        strokes = np.zeros(subject.truth.shape, np.uint8)
        labels = subject.refined
        drawn = []
        figures: dict[str, list[float]] = {"dice": [subject.dice(labels)], "adds": [], "far": []}
        for _ in range(NUM_STROKES):
            before = labels != subject.truth
            old = strokes.copy()
            if correct(subject, labels, strokes, rng):
                labels = update(subject, strokes)
            change = (labels != subject.truth).astype(int) - before
            figures["dice"].append(subject.dice(labels))
            figures["adds"].append(change.sum() > 0)
            figures["far"].append(change[subject.is_far(strokes)].sum() > 0)
            drawn.append(np.where(strokes != old, strokes, 0))
        found[method] = figures
        if method == CRF:
            found |= harms(subject, strokes, drawn, rng)
    return found


def harms(subject: Subject, strokes: Labels, drawn: list[Labels], rng: Any) -> dict[str, Any]:
    """Return points that a wrong label in a stroke costs, and what strokes change if all is right.

    The latter is a percentage of the structure.
    """
    labels = np.unique(subject.truth)
    right = subject.dice(subject.refine(strokes))
    costs = []
    for stroke in drawn:
        if stroke.any():
            other = rng.choice(labels[labels != stroke.max() % BACKGROUND]) or BACKGROUND
            changed_strokes = np.where(stroke, other, strokes).astype(np.uint8)
            costs.append(right - subject.dice(subject.refine(changed_strokes)))
    decided = subject.network
    if decided.ndim > subject.truth.ndim:
        decided = decided.argmax(axis=0)
    is_right = (subject.refined == subject.truth) & (decided == subject.truth)
    places = np.argwhere(ndimage.binary_erosion(is_right, iterations=2) & (subject.truth > 0))
    shares = []
    for middle in rng.permutation(places)[:NUM_STROKES]:
        stroke = np.zeros_like(strokes)
        draw(subject, stroke, middle, int(rng.integers(2)), int(subject.truth[tuple(middle)]))
        changed = subject.refine(np.where(is_right, stroke, 0)) != subject.refined
        shares.append(100 * np.count_nonzero(changed) / np.count_nonzero(subject.truth))
    return {"costs": costs, "changed": shares}


def seconds(subject: Subject, threads: int) -> float:
    """Return the shortest of five updates with kept kernels and five strokes."""
    plan = crfrefine.Plan(subject.image, spacing=subject.spacing, threads=threads)
    strokes = np.zeros_like(subject.truth)
    times = []
    rng = np.random.default_rng(0)
    for _ in range(5):
        correct(subject, subject.refined, strokes, rng)
    for _ in range(6):
        started = time.perf_counter()
        subject.refine(strokes, plan)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def tables(found: dict[str, list[dict[str, Any]]], times: dict[str, list[float]]) -> str:
    """Return Dice by strokes, a row for each method, and the harms and times of the CRF."""
    rows = []
    others = []
    for title, cases in found.items():
        name = f"{title}, {len(cases)} cases"
        for method in METHODS:
            dice = np.array([case[method]["dice"] for case in cases])
            gains = dice[:, 5] - dice[:, 0]
            cells = [f"{value:.1f}" for value in dice.mean(axis=0)[list(SHOWN)]]
            cells += [f"{gains.mean():+.2f}", f"{gains.min():+.1f}"]
            for figure in ("adds", "far"):
                share = np.mean([case[method][figure] for case in cases])
                cells.append(f"{100 * share:.0f} %")
            rows.append([name, method, *cells])
            name = ""
        gain = float(np.mean([case[CRF]["dice"][-1] - case[CRF]["dice"][0] for case in cases]))
        costs = np.concatenate([case["costs"] for case in cases])
        changed = np.concatenate([case["changed"] for case in cases])
        cost = f"{costs.mean():.2f} of {gain:.2f} points (at most {costs.max():.1f})"
        change = f"{changed.mean():.2f} % (at most {changed.max():.1f} %)"
        milliseconds = [f"{1000 * seconds:.0f} ms" for seconds in times[title]]
        others.append([title, cost, change, *milliseconds])
    header = ["Dice, percent", "", *map(str, SHOWN), "gain of 5", "worst case"]
    header += ["strokes that add errors", f"beyond {FAR_MM:g} mm"]
    costs_header = ["", "a wrong label in ten strokes costs", "a stroke where all is right changes"]
    costs_header += ["update, one thread", "two threads"]
    return f"{markdown_table(header, rows)}\n{markdown_table(costs_header, others)}"


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="two cases of each")
    options = parser.parse_args()
    found = {}
    times = {}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for title, (folder, count, form) in SETTINGS.items():
            if not cases_of(folder):
                left_out = f"{title} left out: no cases in {folder}/ of CRFREFINE_DATA"
                sys.stderr.write(f"strokes: {left_out}\n")
                continue
            numbers = range(2 if options.quick else count)
            jobs = [pool.submit(measure, folder, number, form) for number in numbers]
            found[title] = [job.result() for job in jobs]
            subjects = [read(files, form) for files in cases_of(folder)[:3]]
            times[title] = []
            for threads in (1, 2):
                found_seconds = [seconds(subject, threads) for subject in subjects]
                times[title].append(statistics.median(found_seconds))
            sys.stderr.write(f"strokes: {title}\n")
    sys.stdout.write(f"{tables(found, times)}\n{provenance(describe())}")


if __name__ == "__main__":
    main()
