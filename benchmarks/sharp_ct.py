"""TotalSegmentator's fast label map on a CT of 1 mm: volumes, borders and pictures.

Usage: sharp_ct.py DATA [--network-spacing MM] [-o FOLDER] [--json FILE]

DATA holds ct_dicom/ and example_seg_dicom.nii.gz, whose header names the labels. There is no
reference. The pictures show the map before and after.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk  # noqa: N813
from environment import source_hash
from numpy.typing import NDArray
from PIL import Image
from report import markdown_table
from scipy.ndimage import binary_dilation, binary_erosion, uniform_filter
from sharp_cases import CRF, METHODS, Coarse, Labels

from crfrefine.metrics.masks import boundary

STRUCTURES = ("spleen", "liver", "aorta")
MAX_CHANGE = 0.02
"""Share of a structure's volume."""
WINDOW = (-160.0, 240.0)
"""Hounsfield units, from black to white."""
SIDE, ZOOM, GAP = 72, 7, 12
"""Voxels of a picture's side, pixels of a voxel, pixels between before and after."""


def read_data(data: Path, network_spacing: float) -> tuple[Coarse, list[str]]:
    """Read image and map, axes (z, y, x), and the names of labels, which become 0, 1, and so on."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(data / "ct_dicom")))
    file = data / "example_seg_dicom.nii.gz"
    image = sitk.DICOMOrient(reader.Execute(), "LPS")
    labels = sitk.DICOMOrient(sitk.ReadImage(str(file)), "LPS")
    spacing = tuple(reversed(image.GetSpacing()))
    extensions = nibabel.load(file).header.extensions
    tables = " ".join(str(extension.get_content()) for extension in extensions)
    found = re.findall(r'<Label Key="(\d+)".*?CDATA\[(.*?)\]', tables)
    names = {int(key): name for key, name in found}
    present, compact = np.unique(sitk.GetArrayFromImage(labels), return_inverse=True)
    factors = tuple(network_spacing / size for size in spacing)
    case = Coarse(compact.astype(np.uint8), sitk.GetArrayFromImage(image), spacing, factors)
    return case, ["background", *(names[label] for label in present[1:].tolist())]


def border_gradients(case: Coarse, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean gradient magnitude at a structure's border, in Hounsfield units per mm, in two ways.

    First by central differences in the voxels on both sides, then by the differences across the
    border, face by face. The end of the grid is no border.
    """
    image = case.image.astype(np.float64)
    squares = [part**2 for part in np.gradient(image, *case.spacing)]
    sides = binary_dilation(mask) & ~binary_erosion(mask, border_value=1)
    across = []
    for axis, size in enumerate(case.spacing):
        across.append(np.abs(np.diff(image, axis=axis))[np.diff(mask, axis=axis)] / size)
    return np.array([np.sqrt(sum(squares))[sides].mean(), np.concatenate(across).mean()])


def compare(
    case: Coarse,
    names: list[str],
    refined: Mapping[str, Labels],
) -> dict[str, dict[str, Any]]:
    """Per method: changes of volume, and the gradient at borders over that at the network's."""
    structures = {name: names.index(name) for name in STRUCTURES}
    before = np.bincount(case.labels.ravel(), minlength=len(names))
    borders = {name: border_gradients(case, case.labels == i) for name, i in structures.items()}
    result = {}
    for method, labels in refined.items():
        change = np.bincount(labels.ravel(), minlength=len(names)) / before - 1
        own = {name: border_gradients(case, labels == i) for name, i in structures.items()}
        ratios = {name: (own[name] / borders[name]).tolist() for name in structures}
        result[method] = {
            "voxels changed": float((labels != case.labels).mean()),
            "volume change": dict(zip(names[1:], change[1:].tolist(), strict=True)),
            "gradient": ratios,
        }
    return result


def summary_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A row per method."""
    rows = []
    for method, record in found.items():
        volumes = record["volume change"]
        worst = max(volumes, key=lambda name: abs(volumes[name]))
        vanished = sum(change == -1 for change in volumes.values())
        changed = sum(abs(change) > MAX_CHANGE for change in volumes.values())
        borders = [f"{both:.2f}, {across:.2f}" for both, across in record["gradient"].values()]
        cells = [str(vanished), str(changed), f"{worst} {volumes[worst]:+.1%}", *borders]
        rows.append([method, f"{record['voxels changed']:.2%}", *cells])
    head = ["", "voxels changed", "vanish", f"volume ±{MAX_CHANGE:.0%}", "largest change"]
    head += [f"gradient, {name}: on both sides, across" for name in STRUCTURES]
    return markdown_table(head, rows)


def volume_table(found: Mapping[str, Mapping[str, Any]], case: Coarse, names: list[str]) -> str:
    """A row per structure."""
    rows = []
    for label, name in enumerate(names[1:], start=1):
        volume = np.count_nonzero(case.labels == label) * np.prod(case.spacing) / 1000
        changes = [f"{record['volume change'][name]:+.1%}" for record in found.values()]
        rows.append([name, f"{volume:.1f}", *changes])
    return markdown_table(["", "network, ml", *found], rows)


def draw(case: Coarse, labels: Labels, place: tuple[int, slice, slice]) -> NDArray[np.uint8]:
    """Part of a slice, its structures outlined in colors."""
    low, high = WINDOW
    gray = np.clip((case.image[place] - low) / (high - low), 0, 1)
    small = Image.fromarray((255 * gray).astype(np.uint8))
    large = small.resize((SIDE * ZOOM, SIDE * ZOOM), Image.Resampling.BICUBIC)
    picture = np.array(large.convert("RGB"))
    enlarged = labels[place].repeat(ZOOM, 0).repeat(ZOOM, 1)
    for label in np.unique(enlarged[enlarged > 0]):
        edge = boundary(enlarged == label)
        color = colorsys.hsv_to_rgb(label * 0.618 % 1, 0.8, 1.0)
        line = binary_dilation(edge) & (enlarged == label)
        picture[line] = [round(255 * part) for part in color]
    return picture


def write_picture(case: Coarse, labels: Labels, label: int, path: Path) -> None:
    """Draw where most of a structure's border has moved, before and after."""
    moved = ((case.labels == label) != (labels == label)).astype(np.float32)
    density = uniform_filter(moved, (1, SIDE // 2, SIDE // 2), mode="constant")
    z, y, x = (int(index) for index in np.unravel_index(density.argmax(), moved.shape))
    top = min(max(y - SIDE // 2, 0), moved.shape[1] - SIDE)
    left = min(max(x - SIDE // 2, 0), moved.shape[2] - SIDE)
    place = (z, slice(top, top + SIDE), slice(left, left + SIDE))
    before, after = draw(case, case.labels, place), draw(case, labels, place)
    gap = np.full((len(before), GAP, 3), 255, np.uint8)
    Image.fromarray(np.hstack([before, gap, after])).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="TotalSegmentator's fast label map on a CT.")
    parser.add_argument("data", type=Path, help="with ct_dicom/ and example_seg_dicom.nii.gz")
    parser.add_argument("--network-spacing", type=float, default=3.0, metavar="MM")
    parser.add_argument("-o", "--output", type=Path, help="folder for pictures of liver and aorta")
    parser.add_argument("--json", type=Path, help="write the changes of every structure")
    options = parser.parse_args()
    case, names = read_data(options.data, options.network_spacing)
    refined = {name: method(case) for name, method in METHODS.items()}
    found = compare(case, names, refined)
    tables = f"{summary_table(found)}\n{volume_table(found, case, names)}"
    sys.stdout.write(f"{tables}\n*sources {source_hash()}*\n")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        for name in ("liver", "aorta"):
            path = options.output / f"{name}.png"
            write_picture(case, refined[CRF], names.index(name), path)


if __name__ == "__main__":
    main()
