"""Lesions against plain transcriptions of what challenges define, on random studies.

The transcriptions go voxel by voxel and lesion by lesion over the whole grid.
"""

import itertools
import math

import numpy as np
import pytest

from crfrefine import metrics
from crfrefine.base.lesion_rules import LesionRules
from crfrefine.errors import ConfigError, GridMismatchError
from crfrefine.metrics import lesion_matching
from crfrefine.metrics.lesion_scores import PENALTY_MM, measure_lesions
from crfrefine.metrics.registry import LESION_METRICS

ROUNDING = 1e-12
BLOBS = (0, 1, 2, 4, 9)


def random_study(seed):
    """Return a label map, its reference and their spacing: few voxels, so that all cases occur."""
    rng = np.random.default_rng(seed)
    shape = ((17, 12), (9, 11, 7), (12, 5, 9), (7, 9, 1))[seed % 4]
    spacing = tuple(rng.uniform(0.4, 3.0, len(shape)).tolist())
    maps = [np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)]
    for labels, num_blobs in zip(maps, rng.choice(BLOBS, 2), strict=True):
        for _ in range(num_blobs):
            first = [rng.integers(-1, size) for size in shape]  # -1 is more often at the border
            box = tuple(slice(max(f, 0), f + rng.integers(1, 4)) for f in first)
            labels[box] = 1
    prediction, reference = maps
    if seed % 3 == 0:  # a prediction that resembles the reference
        noise = rng.random(shape) < 0.03
        prediction = (np.roll(reference, seed % 2, axis=0) ^ noise).astype(np.uint8)
    return prediction, reference, spacing


def neighbors_of(voxel, shape, most_axes):
    """Yield the neighbors of a voxel, a step along at most so many axes away."""
    for step in itertools.product((-1, 0, 1), repeat=len(shape)):
        place = tuple(index + by for index, by in zip(voxel, step, strict=True))
        inside = all(0 <= index < size for index, size in zip(place, shape, strict=True))
        if inside and 1 <= sum(map(abs, step)) <= most_axes:
            yield place


def parts_of(voxels, shape, most_axes):
    """Return the connected sets of a set of voxels."""
    parts = []
    left = set(voxels)
    while left:
        part = set()
        waiting = [min(left)]
        while waiting:
            voxel = waiting.pop()
            if voxel in left:
                left.remove(voxel)
                part.add(voxel)
                waiting += neighbors_of(voxel, shape, most_axes)
        parts.append(part)
    return parts


def grown(voxels, shape, steps):
    """Return a set of voxels dilated by scipy's structure of rank 2, as BraTS does."""
    for _ in range(steps):
        voxels = voxels | {n for voxel in voxels for n in neighbors_of(voxel, shape, 2)}
    return voxels


def set_of(mask):
    return set(map(tuple, np.argwhere(mask).tolist()))


def dice(first, second):
    return 2 * len(first & second) / (len(first) + len(second))


def boundary(voxels, shape):
    """Return the voxels that share a face with a voxel outside; axes of one voxel do not count."""
    axes = [axis for axis, size in enumerate(shape) if size > 1]
    edge = []
    for voxel in sorted(voxels):
        faces = []
        for axis, by in itertools.product(axes, (-1, 1)):
            faces.append((*voxel[:axis], voxel[axis] + by, *voxel[axis + 1 :]))
        if not all(face in voxels for face in faces):
            edge.append(voxel)
    return np.array(edge)


def hd95(first, second, shape, spacing):
    places = [boundary(voxels, shape) * np.array(spacing) for voxels in (first, second)]
    distances = np.linalg.norm(places[0][:, None] - places[1][None], axis=-1)
    return max(np.percentile(distances.min(axis=axis), 95) for axis in (0, 1))


def brats(prediction, reference, spacing, dilation, threshold):
    """BraTS 2023: lesion-wise Dice and HD95, lesions found, missed and false."""
    shape = prediction.shape
    volume = math.prod(spacing)
    predicted = parts_of(set_of(prediction), shape, 3)
    wanted = set_of(reference)
    touched = set()
    scores = []
    found = missed = 0
    for region in parts_of(grown(wanted, shape, dilation), shape, 3):
        lesion = region & wanted
        around = grown(lesion, shape, dilation)
        touching = [number for number, part in enumerate(predicted) if part & around]
        touched.update(touching)
        score = (0.0, PENALTY_MM)
        if touching:
            union = set().union(*(predicted[number] for number in touching))
            score = (dice(union, lesion), hd95(union, lesion, shape, spacing))
        if len(lesion) * volume > threshold:
            scores.append(score)
            found += bool(touching)
            missed += not touching
    false = len(predicted) - len(touched)
    scores += [(0.0, PENALTY_MM)] * false
    values = {"lesions_found": found, "lesions_missed": missed, "lesions_false": false}
    values["lesion_dice"] = 1.0
    values["lesion_hd95_mm"] = 0.0
    if scores:
        values["lesion_dice"], values["lesion_hd95_mm"] = np.mean(scores, axis=0)
    return values


def isles(prediction, reference, spacing):
    """ISLES'22: absolute difference of volume (ml) and of the number of lesions, lesion F1."""
    shape = prediction.shape
    predicted, wanted = set_of(prediction), set_of(reference)
    predicted_parts, wanted_parts = parts_of(predicted, shape, 3), parts_of(wanted, shape, 3)
    found = sum(bool(part & predicted) for part in wanted_parts)
    missed = len(wanted_parts) - found
    false = sum(not part & wanted for part in predicted_parts)
    f1 = 1.0
    if found + missed + false:
        f1 = found / (found + (false + missed) / 2)
    difference = abs(len(predicted) - len(wanted)) * math.prod(spacing) / 1000
    return {
        "lesion_f1": f1,
        "lesion_count_difference": abs(len(predicted_parts) - len(wanted_parts)),
        "absolute_volume_difference_ml": difference,
    }


def autopet(prediction, reference, spacing):
    """Volumes (ml) of the components that the other mask does not touch, as autoPET defines."""
    shape = prediction.shape
    predicted, wanted = set_of(prediction), set_of(reference)
    ml = math.prod(spacing) / 1000
    false = sum(len(part) for part in parts_of(predicted, shape, 2) if not part & wanted)
    missed = sum(len(part) for part in parts_of(wanted, shape, 2) if not part & predicted)
    return {"false_positive_ml": false * ml, "false_negative_ml": missed * ml}


def panoptic(prediction, reference, most_axes):
    """Panoptic quality by intersections over unions of more than a half (Kirillov 2019)."""
    shape = prediction.shape
    predicted = parts_of(set_of(prediction), shape, most_axes)
    wanted = parts_of(set_of(reference), shape, most_axes)
    ious = []
    for first, second in itertools.product(predicted, wanted):
        iou = len(first & second) / len(first | second)
        if iou > 0.5:
            ious.append(iou)
    if not predicted and not wanted:
        return dict.fromkeys(("rq", "sq", "pq"), math.nan)
    rq = len(ious) / (len(ious) + (len(predicted) + len(wanted) - 2 * len(ious)) / 2)
    sq = sum(ious) / max(len(ious), 1)
    return {"rq": rq, "sq": sq, "pq": rq * sq}


def check_study(seed):
    prediction, reference, spacing = random_study(seed)

    def measured(rules):
        return measure_lesions(prediction, reference, {"tumor": (1,)}, spacing, rules)["tumor"]

    threshold = float(np.median(spacing)) * 4
    dilation = seed % 4
    rules = LesionRules(min_volume_mm3=threshold, dilation=dilation)
    expected = [
        (measured(rules), brats(prediction, reference, spacing, dilation, threshold)),
        (measured("isles"), isles(prediction, reference, spacing)),
        (measured("autopet"), autopet(prediction, reference, spacing)),
    ]
    for connectivity, most_axes in ((6, 1), (18, 2), (26, 3)):
        results = measured(LesionRules(connectivity))
        expected.append((results, panoptic(prediction, reference, most_axes)))
    for results, values in expected:
        assert list(results.values) == list(LESION_METRICS)
        for metric, value in values.items():
            assert results.values[metric] == pytest.approx(value, abs=ROUNDING, nan_ok=True), metric


@pytest.fixture(
    params=[(4, 3000), (4, 5), (32, 3000)], ids=["in parts", "in few parts", "in one part"]
)
def _block(request, monkeypatch):
    """The grids of the studies are searched in several blocks, or in one."""
    block, most_boxes = request.param
    monkeypatch.setattr(lesion_matching, "_BLOCK", block)
    monkeypatch.setattr(lesion_matching, "_MAX_BOXES", most_boxes)


@pytest.mark.usefixtures("_block")
def test_random_studies():
    for seed in range(40):
        check_study(seed)


@pytest.mark.long
@pytest.mark.usefixtures("_block")
def test_a_thousand_random_studies():
    for seed in range(1000):
        check_study(seed)


def test_rows():
    """One prediction over two lesions, two over one, a missed lesion and a false one."""
    reference = np.zeros((40, 30, 1), np.uint8)
    reference[2:4, 2:10] = 3  # two predictions
    reference[10, 2:6] = 3  # with the next one, a single prediction
    reference[14, 2:6] = 3
    reference[30, 20:23] = 3
    first = np.zeros_like(reference)
    first[2, 2:4] = 3
    first[2, 6:8] = 3
    first[9:16, 3:5] = 3
    first[37:39, 28:30] = 3
    second = np.zeros_like(reference)
    second[30, 20:22] = 3
    spacing = (2.0, 1.0, 5.0)

    rows = metrics.lesions(first, reference, spacing)
    assert {row.region for row in rows} == {"3"}
    assert [row.outcome for row in rows] == ["found", "found", "found", "missed", "false"]
    assert [row.number for row in rows[:4]] == [1, 2, 3, 4]
    assert [round(1000 * row.volume_ml) for row in rows] == [160, 40, 40, 30, 40]
    assert rows[0].center_mm == (5.0, 5.5, 0.0)
    assert len(rows[0].matched_to) == 2
    assert rows[1].matched_to == rows[2].matched_to
    assert [round(row.dice, 6) for row in rows[:4]] == [0.4, 0.222222, 0.222222, 0.0]
    assert rows[4].center_mm == (75.0, 28.5, 0.0)

    # The numbers of the reference's lesions do not depend on what is compared with them.
    others = metrics.lesions(second, reference, spacing)
    assert [row.center_mm for row in others] == [row.center_mm for row in rows[:4]]
    assert [row.outcome for row in others] == ["missed", "missed", "missed", "found"]

    # Half of the union is not enough, and small lesions neither count nor are predictions of them
    # false.
    rules = LesionRules(match="iou")
    outcomes = [row.outcome for row in metrics.lesions(second, reference, spacing, rules=rules)]
    assert outcomes == ["missed", "missed", "missed", "found"]
    rules = LesionRules(match="iou", min_volume_mm3=30.0)
    outcomes = [row.outcome for row in metrics.lesions(second, reference, spacing, rules=rules)]
    assert outcomes == ["missed", "missed", "missed", "small"]


def test_masks_are_label_maps():
    """Masks of bools have the rows of label 1, as a map of any other label has."""
    reference = np.zeros((7, 5, 4), np.uint16)
    reference[1:3, 1:3, 2] = 1
    label_map = np.roll(reference, 1, axis=0)
    rows = metrics.lesions(label_map, reference, 1.5)
    assert metrics.lesions(label_map > 0, reference > 0, 1.5) == rows
    high = metrics.lesions(label_map * 65535, reference * 65535, 1.5)
    assert [row._replace(region="1") for row in high] == rows
    assert lesion_matching.boxes_by_label(reference, [2, 65535]) == {2: [], 65535: []}


def test_refusals():
    labels = np.zeros((4, 5, 6), np.uint8)
    with pytest.raises(GridMismatchError, match="4×5×6 voxels"):
        metrics.lesions(labels, labels[:3], 1.0)
    with pytest.raises(ConfigError, match="expected isles, brats, brats-met, autopet, got 'luna'"):
        metrics.lesions(labels, labels, 1.0, rules="luna")
    with pytest.raises(ConfigError, match=r"expected isles, .*, got None"):
        metrics.lesions(labels, labels, 1.0, rules=None)
    for rules in ({"connectivity": 8}, {"match": "dice"}, {"dilation": -1}, {"min_volume_mm3": -1}):
        with pytest.raises(ConfigError, match=r"of lesions: expected .*, got"):
            LesionRules(**rules)
