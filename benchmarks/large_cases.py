"""The large cases: whole bodies of 118 labels, CT of some labels, a label map. Made once, into `.bench/data` or the folder that is named.

A case is a folder: `image_0000.nii.gz` (int16, HU), `truth.nii.gz` (uint8), `network.nii.gz` (the network's label map, uint8), and, unless
the label map is the input, `logits.npz` (float16).
By itself, `large_cases.py FOLDER [NAME ...]` makes cases there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from body import ORGANS
from body_logits import channels, labels_of, write_npz
from body_maps import Grid, ct_image, draw
from numpy.typing import NDArray

VERSION = 1  # of what is drawn: cases made by another version are made again


@dataclass(frozen=True)
class LargeCase:
    """One case; shape and spacing in storage order (z, y, x), spacing in mm; `organs` are the labels besides background."""

    name: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    organs: tuple[str, ...]
    has_logits: bool = True
    seed: int = 118
    version: int = VERSION

    @property
    def num_labels(self) -> int:
        """Background included."""
        return len(self.organs) + 1

    @property
    def num_voxels(self) -> int:
        """Of the grid."""
        return self.shape[0] * self.shape[1] * self.shape[2]


_ALL = tuple(organ.name for organ in ORGANS)
_FEW = {
    2: ("liver",),
    5: ("liver", "spleen", "kidney_right", "kidney_left"),
    25: (
        *("lung_upper_lobe_right", "lung_middle_lobe_right", "lung_lower_lobe_right", "lung_upper_lobe_left", "lung_lower_lobe_left"),
        *("liver", "spleen", "stomach", "pancreas", "gallbladder", "kidney_right", "kidney_left", "kidney_cyst_right", "duodenum"),
        *("adrenal_gland_right", "adrenal_gland_left", "small_bowel", "colon", "urinary_bladder", "aorta", "inferior_vena_cava"),
        *("portal_vein", "heart_myocardium", "heart_ventricle_left"),
    ),
}
_CT_SPACING = (1.0, 0.8, 0.8)
_BODIES = {"2.7M": (150, 120, 150), "30M": (400, 250, 300), "100M": (700, 330, 434)}


def _cases() -> list[LargeCase]:
    bodies = [LargeCase(f"body-{size}", shape, (1.5, 1.5, 1.5), _ALL) for size, shape in _BODIES.items()]
    ct = [
        LargeCase(f"ct-{slices}-{count}", (slices, 512, 512), _CT_SPACING, organs)
        for slices in (400, 800)
        for count, organs in _FEW.items()
    ]
    return [*bodies, *ct, LargeCase("labels-700", (700, 512, 512), _CT_SPACING, _ALL, has_logits=False)]


CASES = {case.name: case for case in _cases()}


def _save(path: Path, array: NDArray[Any], spacing: tuple[float, float, float]) -> None:
    """A (z, y, x) array as a NIfTI of (x, y, z), x fastest in both."""
    image = nibabel.Nifti1Image(array.T, np.diag([*spacing[::-1], 1.0]))
    image.header.set_data_dtype(array.dtype)
    nibabel.save(image, path)


def _with_label_map(
    arrays: Iterator[NDArray[np.float16]], best: NDArray[np.float32], label_map: NDArray[np.uint8]
) -> Iterator[NDArray[np.float16]]:
    """Pass channels on; `label_map` becomes their argmax, `best` their maximum."""
    best[...], label_map[...] = -np.inf, 0
    for number, array in enumerate(arrays):
        for row, largest, labels in zip(array, best, label_map, strict=True):
            higher = row.astype(np.float32) > largest
            largest[higher] = row[higher]
            labels[higher] = number
        yield array


def store(case: LargeCase, root: Path) -> Path:
    """The folder of a case, made when it is not there."""
    folder = root / case.name
    marker, description = folder / "case.json", json.loads(json.dumps(asdict(case)))
    if marker.exists() and json.loads(marker.read_text()) == description:
        return folder
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    labels = [_ALL.index(name) + 1 for name in case.organs]
    drawn = draw(Grid(case.shape, case.spacing), labels, case.seed)
    _save(folder / "image_0000.nii.gz", ct_image(drawn.truth, case.seed), case.spacing)
    _save(folder / "truth.nii.gz", labels_of(drawn.truth, labels), case.spacing)
    if case.has_logits:
        best, network = np.empty(case.shape, np.float32), np.empty(case.shape, np.uint8)
        shape = (case.num_labels, *case.shape)
        write_npz(folder / "logits.npz", shape, _with_label_map(channels(drawn, labels, case.seed), best, network))
    else:
        network = labels_of(drawn.network, labels)
    _save(folder / "network.nii.gz", network, case.spacing)
    marker.write_text(json.dumps(description))
    sys.stderr.write(f"  made {case.name} in {time.perf_counter() - start:.0f} s\n")
    return folder


if __name__ == "__main__":
    for name in sys.argv[2:] or list(CASES):
        store(CASES[name], Path(sys.argv[1]))
