"""Cases with scribbles: read from a folder and checked, or generated hearts of three structures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from study_network import Stack, read_stack

from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.discovery import Sources
from crfrefine.cases.finding import find_cases
from crfrefine.errors import InputError
from crfrefine.io.json import read_json

UNKNOWN = "ignore"
"""The name that dataset.json has for the value of voxels where nobody drew."""


@dataclass(frozen=True)
class ScribbleData:
    """The cases of a folder.

    Attributes:
        scribbled: as stacks of slices whose labels are the scribbles.
        labeled: the same with all labels.
        slice_spacing: mm between the slices of each.
        structures: label of each structure by its name.
        num_labels: L, background included.
        unknown: what scribbles hold where nobody drew.
    """

    scribbled: list[Stack]
    labeled: list[Stack]
    slice_spacing: list[float]
    structures: dict[str, int]
    num_labels: int
    unknown: int

    def require_all_labels(self, indices: Sequence[int], part: str) -> None:
        """Raise InputError if some of the cases, together, have no scribble of a label.

        No network could learn it.
        """
        seen = {
            int(label) for index in indices for label in np.unique(self.scribbled[index].labels)
        }
        for name, label in {"background": 0, **self.structures}.items():
            if label not in seen:
                raise InputError(
                    f"{part}: none of its {len(indices)} training cases has a scribble of label "
                    f"{label} ({name}); draw some"
                )


def read_data(folder: Path) -> ScribbleData:
    """Read images/ labels/ scribbles/ dataset.json.

    Raises:
        InputError: a case without scribbles file, values that are no labels, or dataset.json does
            not name the value of unknown voxels.
        GridMismatchError: labels or scribbles are on another grid than the image.
    """
    for name in ("images", "labels", "scribbles"):
        if not (folder / name).is_dir():
            raise InputError(
                f"{folder}: no folder {name}/; expected images/ labels/ scribbles/ and dataset.json"
            )
    file = folder / "dataset.json"
    content = read_json(file)
    declared = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(declared, dict) or not all(
        isinstance(label, int) for label in declared.values()
    ):
        raise InputError(
            f'{file}: no "labels"; expected names with a number each, such as '
            f'{{"background": 0, "wall": 1, "{UNKNOWN}": 2}}'
        )
    if UNKNOWN not in declared:
        raise InputError(
            f'{file}: no label "{UNKNOWN}"; give the value of scribbles where nobody drew'
        )
    unknown = int(declared[UNKNOWN])
    structures = {
        name: int(label) for name, label in declared.items() if name not in ("background", UNKNOWN)
    }
    if not structures:
        raise InputError(
            f"{file}: no label besides background and {UNKNOWN}; there is nothing to learn"
        )
    kinds = {name: _cases(folder, name) for name in ("scribbles", "labels")}
    missing = sorted(kinds["labels"].keys() ^ kinds["scribbles"].keys())
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} cases have labels or scribbles, not both: "
            f"{', '.join(missing[:5])}"
        )
    num_labels = 1 + max(structures.values())
    stacks: dict[str, list[Stack]] = {"scribbles": [], "labels": []}
    slice_spacing = []
    for case in kinds["labels"].values():
        for name, others in stacks.items():
            files = kinds[name][case.case_id]
            stack, volume = read_stack(
                files, with_labels=True, unknown=unknown if name == "scribbles" else 0
            )
            _check(stack, files, num_labels, unknown if name == "scribbles" else None)
            # Both have the same image: one copy is enough.
            others.append(
                dataclasses.replace(stack, image=stacks["scribbles"][-1].image)
                if name == "labels"
                else stack
            )
        slice_spacing.append(float(max(volume.spacing)))
    return ScribbleData(
        stacks["scribbles"], stacks["labels"], slice_spacing, structures, num_labels, unknown
    )


def _cases(folder: Path, labels: str) -> dict[str, CaseFiles]:
    found = find_cases(Sources([folder / "images"], labels=folder / labels))
    return {case.case_id: case for case in found if case.labels is not None}


def _check(stack: Stack, files: CaseFiles, num_labels: int, unknown: int | None) -> None:
    assert stack.labels is not None
    allowed = {*range(num_labels), *([] if unknown is None else [unknown])}
    other = sorted({int(value) for value in np.unique(stack.labels)} - allowed)
    if other:
        raise InputError(
            f"{files.labels}: the value {other[0]} is not one of {sorted(allowed)}, which "
            "dataset.json declares"
        )
    if unknown is not None and (stack.labels == unknown).all():
        raise InputError(f"{files.labels}: nobody drew anything; leave this case out")


def generate(folder: Path, count: int, seed: int) -> Path:
    """Write hearts of a few thick slices with labels; return the folder.

    A stroke goes through each structure on every slice.
    """
    shape = (52, 44, 3)
    spacing = (1.5, 1.7, 8.0)
    structures = {"right": 1, "wall": 2, "left": 3}
    for name in ("images", "labels", "scribbles"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, **structures, UNKNOWN: 4}}), encoding="utf-8"
    )
    affine = np.diag([*spacing, 1.0])
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        x, y = np.meshgrid(
            *((np.arange(n) * step for n, step in zip(shape[:2], spacing, strict=False))),
            indexing="ij",
        )
        labels = np.zeros(shape, np.uint8)
        scribbles = np.full(shape, 4, np.uint8)
        middle = np.array([x.mean(), y.mean()]) + rng.uniform(-6, 6, 2)
        for z in range(shape[2]):
            size = 1.0 - 0.15 * z
            left = np.hypot(x - middle[0], y - middle[1])
            right = np.hypot((x - middle[0] + 22 * size) / 1.2, y - middle[1])
            plane = labels[..., z]
            strokes = scribbles[..., z]
            plane[right < 12 * size] = 1
            plane[left < 17 * size] = 2
            plane[left < 10 * size] = 3
            for label, distance, least, most in (
                (1, right, 2, 4),
                (3, left, 2, 4),
                (2, left, 12.5, 14.5),
            ):
                strokes[(plane == label) & (distance > least * size) & (distance < most * size)] = (
                    label
                )
            strokes[(left > 25) & (left < 27) & (plane == 0)] = 0
        brightness = np.array([40.0, 105.0, 60.0, 110.0])[labels]
        image = brightness * (
            1 + 0.1 * smooth_noise(rng, shape, spacing, 20.0)
        ) + 8.0 * rng.standard_normal(shape)
        for name, values in (
            ("images", image.astype(np.float32)),
            ("labels", labels),
            ("scribbles", scribbles),
        ):
            file = f"heart_{number}{'_0000' if name == 'images' else ''}.nii.gz"
            nibabel.Nifti1Image(values, affine).to_filename(folder / name / file)
    return folder


def smooth_noise(
    rng: np.random.Generator, grid_shape: Sequence[int], spacing: Sequence[float], length_mm: float
) -> NDArray[np.float32]:
    """Noise with mean 0, variance 1 and structures of about `length_mm`."""
    noise = gaussian_filter(
        rng.standard_normal(grid_shape, np.float32),
        [length_mm / step for step in spacing],
        mode="wrap",
    )
    return np.asarray((noise - noise.mean()) / noise.std(), np.float32)
