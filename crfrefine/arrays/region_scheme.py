"""The overlapping regions of a network's sigmoid channels: their log-odds and label map."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.arrays.softmax import sigmoid, softmax
from crfrefine.base.limits import MAX_LABEL
from crfrefine.base.text import listed, shorten, shorten_value
from crfrefine.errors import ConfigError
from crfrefine.parameters.sections import PostprocessParameters
from crfrefine.parameters.specs import ModelSpec

if TYPE_CHECKING:
    from crfrefine.base.array_types import Array, Float32, Labels
    from crfrefine.parameters.model import CrfParameters


@dataclass(frozen=True)
class RegionScheme:
    """The regions of a network with one sigmoid channel per region, in the order of its channels.

    Raises:
        ConfigError: the names, labels and class order do not fit each other.

    Examples:
        >>> scheme = RegionScheme.of({"whole": [1, 2, 3], "core": [2, 3], "enhancing": 3})
        >>> scheme.class_order
        (1, 2, 3)
        >>> log_odds = [[4.0, 4.0, 4.0, -4.0], [-4.0, 4.0, 4.0, -4.0], [-4.0, -4.0, 4.0, -4.0]]
        >>> scheme.decode(np.array(log_odds))
        array([1, 2, 3, 0], dtype=uint8)
    """

    names: tuple[str, ...]
    labels: tuple[tuple[int, ...], ...]  # of each region, ascending; regions may overlap
    # The label that each region writes into the label map, `regions_class_order` of nnU-Net: later
    # regions overwrite earlier ones.
    class_order: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check that names, labels and order fit each other."""
        num_regions = len(self.names)
        num_sets = len(self.labels)
        if num_regions == 0 or num_regions != num_sets:
            raise ConfigError(
                "regions: expected a name and labels for each region, "
                f"got {num_regions} names, {num_sets} sets"
            )
        num_written = len(self.class_order)
        if num_written != num_regions:
            raise ConfigError(
                f"the class order has {num_written} labels for {num_regions} regions "
                f"({listed(self.names)}); expected the label that each region writes into the "
                "label map"
            )
        for number, name in enumerate(self.names):
            if name in self.names[:number]:
                raise ConfigError(f"{_region(name)} appears twice")
            region = _region(name)
            labels = self.labels[number]
            if not labels or min(labels) < 1:
                found = "it has label 0, the background" if labels else "it has no labels"
                raise ConfigError(f"{region}: {found}; expected labels from 1 on")
            if max(labels) > MAX_LABEL:
                raise ConfigError(
                    f"{region}: label {shorten(max(labels), 20)}: label maps hold labels up to "
                    f"{MAX_LABEL}"
                )
            written = self.class_order[number]
            if written not in labels:
                raise ConfigError(
                    f"the class order has label {written} for {region}, which has "
                    f"{_joined(labels)}; expected one of these"
                )

    @classmethod
    def of(cls, regions: GivenRegions, class_order: Sequence[int] | None = None) -> RegionScheme:
        """Return the scheme of some regions.

        Args:
            regions: names and their label or labels, a dictionary or pairs, in the order of the
                channels; or a scheme, which is returned.
            class_order: the label that each region writes; None means the only label that belongs
                to the region and to no later one.

        Raises:
            ConfigError: the arguments do not fit each other, or a region does not have exactly one
                label that no later region has.
        """
        if isinstance(regions, RegionScheme):
            return regions
        labels_by_name = _labels_by_name(regions)
        names = tuple(name for name, _ in labels_by_name)
        labels = tuple(labels for _, labels in labels_by_name)
        if class_order is not None:
            return cls(names, labels, tuple(int(label) for label in class_order))

        written = []
        for number, (name, members) in enumerate(labels_by_name):
            remaining = sorted(set(members).difference(*labels[number + 1 :]))
            if len(remaining) != 1:
                raise ConfigError(
                    f"{_region(name)} = {_joined(members)}: the label that it writes is not clear: "
                    "expected exactly one label that belongs to no later region, it has "
                    f"{_joined(remaining) or 'none'}\n"
                    "  Give the label of each region, in the order of the regions: "
                    "regions_class_order of a dataset.json, or class_order=(1, 2, 3) in Python."
                )
            written.append(remaining[0])
        return cls(names, labels, tuple(written))

    @property
    def num_regions(self) -> int:
        """R, channels of the network's output."""
        return len(self.names)

    @property
    def num_labels(self) -> int:
        """Labels of a label map, background included: one more than the largest."""
        return 1 + max(max(labels) for labels in self.labels)

    @property
    def label_names(self) -> dict[int, str]:
        """Names of the labels in a label map: of a region of several labels, what others leave."""
        names = {}
        for name, labels, label in zip(self.names, self.labels, self.class_order, strict=True):
            names[label] = name if labels == (label,) else f"rest of {name}"
        return names

    def decode(self, log_odds: Array) -> Labels:
        """Return the label map of log-odds, (R, *grid), in their memory layout.

        Each region in turn writes its label over the background and earlier regions, where its
        probability is above one half, and so its log-odds above 0.

        Source: nnU-Net version 2, `convert_probabilities_to_segmentation`.
        """
        dtype = np.min_scalar_type(self.num_labels - 1)
        label_map: Labels = np.zeros_like(log_odds[0], dtype=dtype)
        for channel, label in zip(log_odds, self.class_order, strict=True):
            np.copyto(label_map, dtype.type(label), where=channel > 0)
        return label_map

    def describe(self) -> str:
        """Return the regions in one line, such as "whole = 1+2+3, core = 2+3; written as 1, 2"."""
        regions = []
        for name, labels in zip(self.names, self.labels, strict=True):
            regions.append(f"{name} = {_joined(labels)}")
        return f"{listed(regions, 8)}; written as {listed(self.class_order, 8)}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as in a `dataset.json`."""
        labels = {}
        for name, members in zip(self.names, self.labels, strict=True):
            labels[name] = list(members)
        return {"labels": labels, "regions_class_order": list(self.class_order)}


# Regions as callers may give them, and the labels of one of them.
GivenLabels = int | Sequence[int]
GivenRegions = RegionScheme | Mapping[str, GivenLabels] | Sequence[tuple[str, GivenLabels]]


def _region(name: str) -> str:
    return f"region {shorten_value(name)}"


def _joined(labels: Sequence[int]) -> str:
    return "+".join(map(str, labels))


def _labels_by_name(regions: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Return names and ascending labels of regions as a caller gives them.

    Raises ConfigError for anything but names and numbers of labels.
    """
    pairs = regions.items() if isinstance(regions, Mapping) else regions
    if not isinstance(pairs, Iterable):
        pairs = [pairs]
    found = []
    for pair in pairs:
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2
        if not is_pair or not isinstance(pair[0], str):
            raise ConfigError(
                "regions: expected a dictionary of names and their labels, pairs of these, or a "
                'RegionScheme, such as RegionScheme.of({"whole": [1, 2, 3], "core": [2, 3], '
                f'"enhancing": 3}}); got {shorten_value(regions)}'
            )
        name, value = pair
        values = value if isinstance(value, list | tuple) else [value]
        for label in values:
            if isinstance(label, bool) or not isinstance(label, int | np.integer):
                raise ConfigError(
                    f"{_region(name)}: {shorten_value(label)} is not the number of a label"
                )
        found.append((name, tuple(sorted({int(label) for label in values}))))
    return found


MAX_LOG_ODDS = 1e4  # far beyond those of any probability; larger ones, as in padding, mean the same


def decode(channels: Array, regions: RegionScheme | None) -> Labels:
    """Return the label map, (*grid), in the smallest unsigned type.

    The channels are (L, *grid) logits, or the (R, *grid) log-odds of regions.
    """
    if regions is None:
        return argmax_labels(channels)
    return regions.decode(channels)


def probabilities_of(channels: Float32, regions: RegionScheme | None) -> Float32:
    """Return the softmax of (L, *grid) logits, or the sigmoid of (R, *grid) log-odds of regions."""
    if regions is None:
        return softmax(channels)
    return sigmoid(channels)


def resolve_regions(
    parameters: CrfParameters, num_regions: int, num_modalities: int, num_dims: int
) -> ModelSpec:
    """Return the model of regions, each of two labels with the weights and bias of its channel.

    Raises ConfigError if values are not as many as regions or modalities, or if there is a matrix.
    """
    if parameters.compatibility.kind != "potts":
        raise ConfigError(
            f"compatibility.kind: {parameters.compatibility.kind!r} cannot be used with "
            "overlapping regions, each of which is a problem of two labels; set "
            'compatibility.kind = "potts" and leave the other keys of [compatibility] out'
        )
    # The small-object rules are about the labels of the map, not about regions.
    without_rules = dataclasses.replace(parameters, postprocess=PostprocessParameters())
    try:
        together = without_rules.resolve(num_regions, num_modalities, num_dims)
    except ConfigError as error:
        raise ConfigError(str(error).replace("label", "region")) from None

    kernels = dataclasses.replace(together.kernels, num_labels=2)
    potts = parameters.compatibility.penalties(2, np.float32)
    biases = together.mean_field.bias
    runs = []
    for region in range(num_regions):
        weights = together.mean_field.weights[:, [region, region]]
        bias = None
        if biases is not None and biases[region] != 0.0:
            bias = np.array([0.0, biases[region]], np.float32)
        runs.append(
            dataclasses.replace(
                together.mean_field, weights=weights, compatibility=potts, bias=bias
            )
        )
    return ModelSpec(kernels, runs[0], tuple(runs))
