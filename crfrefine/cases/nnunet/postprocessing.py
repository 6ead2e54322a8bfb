"""nnU-Net's own postprocessing: the rules that `nnUNetv2_find_best_configuration` has chosen, read from `postprocessing.json`.

The `postprocessing.pkl` beside it holds the same rules; it is never read, since unpickling runs what a file says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from crfrefine.base.labels import LARGEST_LABEL
from crfrefine.base.text import shorten_value
from crfrefine.cases.nnunet.layout import TrainedNetwork, read_table
from crfrefine.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FILE = "postprocessing.json"
_KEEP_LARGEST = "remove_all_but_largest_component_from_segmentation"
_GATHERED = re.compile(r"crossval_results_folds_(?P<folds>[0-9]+(?:_[0-9]+)*)")

Label = TypeVar("Label", bound=np.integer[Any])


@dataclass(frozen=True)
class KeepLargest:
    """A rule: of the voxels with one of the labels, only the largest component stays."""

    labels: tuple[int, ...]  # they count together
    background: int = 0  # what the other components become

    def apply(self, label_map: NDArray[Label]) -> NDArray[Label]:
        """Return a copy of a label map (*grid) after the rule.

        As in nnU-Net, components are connected over faces, edges and corners, and all of the largest size stay if several have it.
        """
        from scipy import ndimage

        group = np.isin(label_map, self.labels)
        components, count = ndimage.label(group, structure=np.ones((3,) * label_map.ndim, dtype=bool))
        sizes = np.bincount(components.ravel(), minlength=count + 1)
        result = label_map.copy(order="K")
        if count > 1:
            small = sizes < sizes[1:].max()
            small[0] = False
            result[small[components]] = self.background
        return result


@dataclass(frozen=True)
class NnunetPostprocessing:
    """The postprocessing that nnU-Net has chosen for a trained network."""

    path: Path
    rules: tuple[KeepLargest, ...]  # applied one after the other; none: nnU-Net found that none helps

    def apply(self, label_map: NDArray[Label]) -> NDArray[Label]:
        """Return a label map (*grid) after all rules."""
        for rule in self.rules:
            label_map = rule.apply(label_map)
        return label_map

    def plain_rules(self) -> list[dict[str, Any]]:
        """Return the rules as plain values."""
        return [{"labels": list(rule.labels), "background": rule.background} for rule in self.rules]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"file": str(self.path), "rules": self.plain_rules()}

    def describe(self) -> str:
        """Return a sentence about the rules, for a note."""
        kept = ", then ".join(f"of {'+'.join(map(str, rule.labels))}" for rule in self.rules)
        return f"{self.path}: {f'the largest component {kept} is kept' if kept else 'no rule: nnU-Net found that none helps'}"


def find_postprocessing(network: TrainedNetwork) -> NnunetPostprocessing | None:
    """Return nnU-Net's postprocessing of a trained network; None if none was determined.

    If several sets of folds have one, that of the most folds counts.
    """
    found: list[tuple[int, Path]] = []
    for path in sorted(network.folder.glob(f"*/{_FILE}")):
        match = _GATHERED.fullmatch(path.parent.name)
        if match is not None:
            found.append((len(match["folds"].split("_")), path))
    return read_postprocessing(max(found)[1]) if found else None


def describe_missing(network: TrainedNetwork) -> str:
    """Return a note for a network without postprocessing, with the command that determines it."""
    folds = " ".join(name for name in network.fold_folders() if name != "all")
    return f"not determined, so it is not among the methods: nnUNetv2_find_best_configuration {network.options} -f {folds}"


def read_postprocessing(path: Path) -> NnunetPostprocessing:
    """Read a `postprocessing.json`; raises like `find_postprocessing`."""
    content = read_table(path)
    functions, arguments = content.get("postprocessing_fns"), content.get("postprocessing_kwargs")
    if not isinstance(functions, list) or not isinstance(arguments, list) or len(functions) != len(arguments):
        raise InputError(f"{path}: expected the lists postprocessing_fns and postprocessing_kwargs, equally long, as nnU-Net writes them")
    return NnunetPostprocessing(path, tuple(_rule(path, *pair) for pair in zip(functions, arguments, strict=True)))


def _rule(path: Path, function: Any, arguments: Any) -> KeepLargest:
    if function != _KEEP_LARGEST:
        raise InputError(f"{path}: the function {shorten_value(function)} is not known here; expected {_KEEP_LARGEST}")
    if not isinstance(arguments, Mapping) or not arguments.keys() <= {"labels_or_regions", "background_label"}:
        raise InputError(f"{path}: expected labels_or_regions and background_label for {_KEEP_LARGEST}, got {shorten_value(arguments)}")
    labels = _labels(path, arguments.get("labels_or_regions"))
    return KeepLargest(tuple(dict.fromkeys(labels)), _label(path, arguments.get("background_label", 0)))


def _labels(path: Path, value: Any) -> list[int]:
    """Return the labels of a label, a region, or a list of both: nnU-Net joins them."""
    if not isinstance(value, list):
        return [_label(path, value)]
    return [_label(path, label) for entry in value for label in (entry if isinstance(entry, list) else [entry])]


def _label(path: Path, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_LABEL:
        raise InputError(f"{path}: expected labels from 0 to {LARGEST_LABEL}, got {shorten_value(value)}")
    return value
