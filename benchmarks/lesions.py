"""Lesions of brain tumors that the CRF and its rivals find, lose and make.

Usage: lesions.py [DATA]

DATA holds images/ labels/ masks/ logits/ and logits_weak/ of brain tumors. Writes a table into
docs/reference/results.md. The tuned smallest volume is the best one on these same cases.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from report import markdown_table, write_between_markers
from scripts import DATA, ROOT, case_names, new_parser

import crfrefine
from crfrefine.arrays.components import clean
from crfrefine.metrics.lesion_scores import LesionSums, measure_lesions
from crfrefine.parameters.sections import PostprocessParameters

DOCUMENT = ROOT / "docs" / "reference" / "results.md"
NETWORKS = {"logits": "strong", "logits_weak": "weak"}
REGIONS = {"whole": (1, 2, 3, 4), "enhancing": (4,)}
RULES = ("isles", "brats")
SMALLEST_ML = 0.05  # 50 voxels
CANDIDATES_ML = (0.05, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
PROTECTION = {"postprocess.protect_probability": 0.95, "postprocess.protect_min_ml": 0.2}

Map = NDArray[np.unsignedinteger[Any]]
# Of a case: results of each rule, region by region.
Scores = dict[str, dict[str, LesionSums]]


def read(path: Path) -> NDArray[np.float32]:
    """The values of a file, (x, y, z) or (x, y, z, channel)."""
    return np.asanyarray(nibabel.load(path).dataobj, np.float32)


def drop(label_map: Map, least_ml: float) -> Map:
    """A label map without components of the foreground below a volume; voxels have 1 mm³."""
    return clean(label_map, PostprocessParameters(min_component_ml=least_ml), (1, 1, 1)).label_map


def maps_of_case(folder: Path, network: str, name: str) -> dict[str, Map]:
    """The label maps of a case: the network's, the CRF's, and the protected one."""
    channels = np.moveaxis(read(folder / network / f"{name}.nii.gz"), -1, 0)
    images = [read(folder / "images" / f"{name}_{number:04}.nii.gz") for number in (0, 1)]
    mask = read(folder / "masks" / f"{name}.nii.gz")
    parameters = crfrefine.CrfParameters.load("brats")
    maps: dict[str, Map] = {}
    for method, changes in (("CRF", {}), ("CRF, protected", PROTECTION)):
        result = crfrefine.refine(
            channels,
            np.stack(images),
            spacing=(1, 1, 1),
            parameters=parameters.replace(**changes),
            mask=mask,
        )
        maps["network"] = result.network_label_map
        maps[method] = result.label_map
    return maps


def score(label_map: Map, reference: Map, sets: Sequence[str] = RULES) -> Scores:
    """The lesions of a label map by some sets of rules."""
    return {rules: measure_lesions(label_map, reference, REGIONS, 1.0, rules) for rules in sets}


def f1_of(cases: Sequence[Scores]) -> float:
    """The mean lesion F1 over cases and regions, by the rules without dilation."""
    values = []
    for scores in cases:
        values += [results.values["lesion_f1"] for results in scores["isles"].values()]
    return float(np.mean(values))


def found_in(results: LesionSums) -> set[int]:
    """The numbers of the reference's lesions that are found."""
    return {lesion.number for lesion in results.lesions if lesion.outcome == "found"}


def row(method: str, region: str, cases: Sequence[Scores], networks: Sequence[Scores]) -> list[str]:
    """A row of the table: sums and means over the cases."""
    lost = 0
    regained = 0
    for scores, network in zip(cases, networks, strict=True):
        found = found_in(scores["isles"][region])
        before = found_in(network["isles"][region])
        lost += len(before - found)
        regained += len(found - before)

    def values(rules: str, metric: str) -> list[float]:
        return [scores[rules][region].values[metric] for scores in cases]

    found_of = f"{sum(values('isles', 'lesions_found')):.0f}"
    false = [f"{number:.0f}" for number in values("isles", "lesions_false")]
    return [
        method,
        f"{found_of} of {sum(values('isles', 'lesions')):.0f}",
        f"{lost} / {regained}",
        ", ".join(false),
        f"{np.mean(values('isles', 'lesion_f1')):.3f}",
        f"{np.mean(values('brats', 'lesion_dice')):.3f}",
        f"{np.mean(values('brats', 'lesion_hd95_mm')):.0f}",
        f"{np.mean(values('isles', 'pq')):.3f}",
    ]


def best_volume(maps: Sequence[Map], references: Sequence[Map]) -> float:
    """The smallest volume, in ml, with the largest mean F1 on these cases."""
    f1_by_volume = {}
    for least_ml in CANDIDATES_ML:
        pairs = zip(maps, references, strict=True)
        cases = [score(drop(one, least_ml), right, ("isles",)) for one, right in pairs]
        f1_by_volume[least_ml] = f1_of(cases)
    return max(f1_by_volume, key=f1_by_volume.__getitem__)


def rows_of_network(folder: Path, network: str) -> list[list[str]]:
    """The rows of a network."""
    names = case_names(folder)
    references = [read(folder / "labels" / f"{name}.nii.gz").astype(np.uint8) for name in names]
    maps: dict[str, list[Map]] = {}
    for name in names:
        for method, label_map in maps_of_case(folder, network, name).items():
            maps.setdefault(method, []).append(label_map)
        sys.stderr.write(f"lesions: {network} {name}\n")
    plain = dict(maps)
    for method, label_maps in plain.items():
        maps[f"{method}, ≥ {SMALLEST_ML:g} ml"] = [drop(one, SMALLEST_ML) for one in label_maps]
    for method in ("network", "CRF"):
        least_ml = best_volume(plain[method], references)
        maps[f"{method}, ≥ {least_ml:g} ml (tuned)"] = [
            drop(one, least_ml) for one in plain[method]
        ]

    scores: Mapping[str, list[Scores]] = {
        method: [score(one, right) for one, right in zip(label_maps, references, strict=True)]
        for method, label_maps in maps.items()
    }
    rows = []
    for region in REGIONS:
        for method, cases in scores.items():
            head = f"{NETWORKS[network]}, {region}"
            rows.append([head, *row(method, region, cases, scores["network"])])
    return rows


def main() -> None:
    """Write the table."""
    parser = new_parser(__doc__)
    parser.add_argument("data", type=Path, nargs="?", default=DATA / "brats2015")
    folder = parser.parse_args().data
    rows = []
    for network in NETWORKS:
        rows += rows_of_network(folder, network)
    heads = [
        *("network, region", "method", "found", "lost / regained", "false, by case", "F1"),
        *("lesion-wise Dice", "lesion-wise HD95, mm", "PQ"),
    ]
    write_between_markers(DOCUMENT, "lesions", markdown_table(heads, rows))


if __name__ == "__main__":
    main()
