"""The tables of a parameter file as dataclasses; each field's metadata have the key's rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from crfrefine.base.numerics import SPATIAL_RADIUS, TRUNCATION_RADIUS
from crfrefine.errors import ConfigError
from crfrefine.parameters.checks import MAX_COUNT, MAX_PENALTY, Rule

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

    from crfrefine.base.array_types import Array

# Far above any temperature that preserves the logits; the smallest usable one depends on these.
MAX_TEMPERATURE = 1e6
# Far above any useful difference between logits, and far below those of absent labels, 1e4.
MAX_BIAS = 1e3
OUTPUT_TEMPERATURE_RANGE = (0.01, 100.0)  # refined logits divided by it stay inside float32's range
FILTERS = ("auto", "exact", "truncated", "lattice", "grid")  # how messages are computed
_PENALTY = Rule(low=-MAX_PENALTY, high=MAX_PENALTY, per="label")
_BANDWIDTH = Rule(low=0.0, low_open=True, per="axis")
_COMPONENTS = Rule(
    str,
    words=("none", "foreground", "each"),
    words_of_list=(("none", "foreground"), ("none", "each")),
    per="label",
)


def _key(default: Any, rule: Rule, comment: str, needed_by: tuple[str, str] | None = None) -> Any:
    """A key of a table; `needed_by` is another key, and its word that does not allow None here."""
    metadata = {"rule": rule, "comment": comment, "needed_by": needed_by}
    return field(default=default, metadata=metadata)


class Section:
    """A table of the file: checks its fields on construction and turns lists into tuples."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]  # Each table is a dataclass.
    section: ClassVar[str] = ""
    comment: ClassVar[str] = ""  # above the table in files; if it is empty, the docstring is there

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            key = f"{self.section}.{entry.name}"
            value = getattr(self, entry.name)
            if value is not entry.default:
                # The dataclass is frozen for its users; this only gives values their final type.
                value = entry.metadata["rule"].check(value, key)
                object.__setattr__(self, entry.name, value)
            if entry.metadata["needed_by"] is None:
                continue
            other_key, word = entry.metadata["needed_by"]
            other_value = getattr(self, other_key)
            if value is None and word in values_of(other_value):
                raise ConfigError(
                    f"{key}: needed by {self.section}.{other_key} = {word!r}; "
                    f"{entry.metadata['comment']}"
                )
            # A kind has only its own keys; some modality may or may not use a key of modalities.
            if value is not None and other_key == "kind" and other_value != word:
                raise ConfigError(
                    f"{key}: not used by {self.section}.{other_key} = {other_value!r}; "
                    f"set {self.section}.{other_key} = {word!r} too"
                )

    def spread(self, sizes: Mapping[str, int], prefix: str = "") -> dict[str, Any]:
        """Return the values by key, with a value per "label", "modality" or "axis" of `sizes`.

        Raises ConfigError for a list of another length. Errors name the section by `prefix`, or
        without one by its name.
        """
        values = {}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            rule: Rule = entry.metadata["rule"]
            if rule.per is not None and rule.per in sizes:
                key = f"{prefix or self.section}.{entry.name}"
                size = sizes[rule.per]
                if not rule.is_list(value):
                    if rule.shape != "matrix":
                        value = (value,) * size
                elif len(value) != size:
                    raise rule.wrong_length(len(value), size, key)
            values[entry.name] = value
        return values

    @property
    def has_values_per_modality(self) -> bool:
        """Whether a key has a list with several values, one per modality."""
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            rule: Rule = entry.metadata["rule"]
            if rule.per == "modality" and rule.is_list(value) and len(value) > 1:
                return True
        return False

    @property
    def label_lists(self) -> dict[str, tuple[Any, ...]]:
        """The lists with a value per label, by key."""
        lists = {}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.metadata["rule"].per == "label" and isinstance(value, tuple):
                lists[entry.name] = value
        return lists

    def select_labels(self, labels: Sequence[int]) -> Self:
        """Return the section with the values of these labels in its lists, in this order."""
        lists = {}
        for key, values in self.label_lists.items():
            lists[key] = tuple(values[label] for label in labels)
        return dataclasses.replace(self, **lists)


class KernelParameters(Section):
    """A table of a kernel: its weight, its bandwidth of position, and that of intensity if any.

    Its keys are in this order. The model, the engines and the layer are made from them.
    """

    # Bandwidths of position at which engines end it.
    reach: ClassVar[float]
    weight: float | tuple[float, ...]

    @classmethod
    def bandwidths(cls) -> dict[str, str]:
        """Return the keys of the bandwidths with what they are per: "axis", then "modality"."""
        per = {entry.name: entry.metadata["rule"].per for entry in dataclasses.fields(cls)}
        del per["weight"]
        return per


def values_of(value: Any) -> tuple[Any, ...]:
    """Return the entries of a list as a tuple, and a single value as a tuple of one."""
    if isinstance(value, list | tuple):
        return tuple(value)
    return (value,)


@dataclass(frozen=True)
class IntensityParameters(Section):
    """How image intensities are normalized before the appearance kernels see them."""

    section: ClassVar[str] = "intensity"
    normalization: str | tuple[str, ...] = _key(
        "percentile",
        Rule(str, words=("none", "zscore", "percentile", "window"), per="modality"),
        "none | zscore | percentile | window; one, or one per modality; taken inside the mask",
    )
    percentiles: tuple[float, float] | tuple[tuple[float, float], ...] = _key(
        (1.0, 99.0),
        Rule(low=0.0, high=100.0, per="modality", shape="pair"),
        'percent; for "percentile": mapped to 0 and 1, not clipped',
    )
    window: tuple[float, float] | tuple[tuple[float, float], ...] | None = _key(
        None,
        Rule(per="modality", shape="pair"),
        'intensity [low, high]; for "window": mapped to 0 and 1 and clipped, e.g. Hounsfield units',
        needed_by=("normalization", "window"),
    )
    mask: str = _key(
        "none",
        Rule(str, words=("none", "nonzero")),
        "none | nonzero (any modality); used when no mask file is given",
    )


@dataclass(frozen=True)
class BilateralParameters(KernelParameters):
    """One appearance kernel, of position and intensity."""

    section: ClassVar[str] = "bilateral"
    reach: ClassVar[float] = TRUNCATION_RADIUS
    comment: ClassVar[str] = (
        "One appearance kernel: "
        "exp(-|p_i - p_j|^2 / 2 theta_alpha^2 - sum_c |I_ic - I_jc|^2 / 2 theta_beta_c^2)."
    )
    weight: float | tuple[float, ...] = _key(
        4.0, _PENALTY, "a number, or one per label; 0: no such term"
    )
    theta_alpha: float | tuple[float, ...] = _key(
        1.5, _BANDWIDTH, "mm (or voxels, see positions); a number, or one per axis"
    )
    theta_beta: float | tuple[float, ...] = _key(
        0.05,
        Rule(low=0.0, low_open=True, per="modality"),
        "normalized intensity; a number, or one per modality",
    )


@dataclass(frozen=True)
class SpatialParameters(KernelParameters):
    """The smoothness kernel: exp(-|p_i - p_j|^2 / 2 theta_gamma^2)."""

    section: ClassVar[str] = "spatial"
    reach: ClassVar[float] = SPATIAL_RADIUS
    weight: float | tuple[float, ...] = _key(
        0.0, _PENALTY, "a number, or one per label; 0: no such term"
    )
    theta_gamma: float | tuple[float, ...] = _key(
        1.0, _BANDWIDTH, "mm (or voxels, see positions); a number, or one per axis"
    )


@dataclass(frozen=True)
class CompatibilityParameters(Section):
    """The penalty for neighbors with different labels."""

    section: ClassVar[str] = "compatibility"
    kind: str = _key(
        "potts",
        Rule(str, words=("potts", "matrix")),
        "potts (1 for any two different labels) | matrix",
    )
    matrix: tuple[tuple[float, ...], ...] | None = _key(
        None,
        Rule(per="label", shape="matrix"),
        'for "matrix": labels x labels, zero diagonal; '
        "row: label of the neighbor, column: own label",
        needed_by=("kind", "matrix"),
    )

    def penalties(self, num_labels: int, dtype: DTypeLike = float) -> Array:
        """Return the penalties (L, L); row: label of the neighbor, column: own label."""
        import numpy as np

        if self.matrix is not None:
            return np.array(self.matrix, dtype)
        return 1 - np.eye(num_labels, dtype=dtype)

    def select_labels(self, labels: Sequence[int]) -> CompatibilityParameters:
        """Return the penalties among these labels, in this order."""
        if self.kind == "potts":
            return self
        rows = self.penalties(max(labels) + 1)[list(labels)]
        return matrix_of(rows[:, list(labels)])


def matrix_of(penalties: Array) -> CompatibilityParameters:
    """Return the section of penalties (L, L)."""
    return CompatibilityParameters("matrix", penalties.tolist())


@dataclass(frozen=True)
class VolumeParameters(Section):
    """The term that keeps the number of voxels of each label's main body."""

    section: ClassVar[str] = "volume"
    comment: ClassVar[str] = (
        "The term that keeps the number of voxels of each label's main body, "
        "which the other terms tend to shrink."
    )
    weight: float = _key(
        0.0, Rule(low=0.0, high=1.0), "0 = no such term; 1 = each step keeps the volumes exactly"
    )
    match_input: bool = _key(
        False,
        Rule(bool),
        "whether each label of a label map ends with as many voxels as it has there, "
        "by a bias after the iterations",
    )


@dataclass(frozen=True)
class MeanFieldParameters(Section):
    """How the marginals are computed."""

    section: ClassVar[str] = "mean_field"
    num_iterations: int = _key(5, Rule(int, low=1, high=MAX_COUNT), "largest number of iterations")
    tolerance: float = _key(
        1e-5,
        Rule(low=0.0),
        "nats per voxel: mean KL between two iterations that counts as converged; "
        "0 = always all iterations",
    )
    temperature: float = _key(
        1.0, Rule(low=0.0, low_open=True, high=MAX_TEMPERATURE), "divides the logits"
    )
    bias: float | tuple[float, ...] = _key(
        0.0,
        Rule(low=-MAX_BIAS, high=MAX_BIAS, per="label"),
        "added to the logits inside the mask, before the temperature; a number, or one per label",
    )
    output_temperature: float = _key(
        1.0,
        Rule(float, *OUTPUT_TEMPERATURE_RANGE),
        "divides the refined logits where they become probabilities",
    )
    normalization: str = _key(
        "symmetric", Rule(str, words=("symmetric", "after")), "symmetric | after"
    )
    filter: str = _key(
        "auto",
        Rule(str, words=FILTERS),
        "auto | exact | truncated | lattice | grid (at most 2 modalities): "
        "how bilateral messages are computed",
    )
    positions: str = _key(
        "mm",
        Rule(str, words=("mm", "voxels", "network")),
        "mm | voxels | network (its voxels): unit of theta_alpha and theta_gamma",
    )
    label_threshold: float = _key(
        1e-4,
        Rule(low=0.0, high=0.01),
        "a label whose marginals all stay below this around a tile takes no part there; "
        "0 = all labels everywhere",
    )


@dataclass(frozen=True)
class PostprocessParameters(Section):
    """How the CRF's marginals become a label map, and its cleaning."""

    section: ClassVar[str] = "postprocess"
    keep_largest: str | tuple[str, ...] = _key(
        "none",
        _COMPONENTS,
        "none | foreground (all labels together) | each (label by itself); or one per label",
    )
    min_component_ml: float | tuple[float, ...] = _key(
        0.0,
        Rule(low=0.0, per="label"),
        "ml; smaller components (found as for keep_largest) become background; or one per label",
    )
    fill_holes: str | tuple[str, ...] = _key(
        "none",
        _COMPONENTS,
        "none | foreground (any hole) | each (holes inside a single label); or one per label",
    )
    protect_probability: float = _key(
        0.0,
        Rule(low=0.0, high=1.0),
        "0 = off; else voxels that the network finds at least so probable keep its label",
    )
    protect_min_ml: float = _key(
        0.0,
        Rule(low=0.0),
        "ml; only in components of the network's map that are at least so large",
    )

    @property
    def protects(self) -> bool:
        """Whether components of the network's map keep their core."""
        return self.protect_probability > 0.0

    @property
    def removing(self) -> dict[str, str | float | tuple[str, ...] | tuple[float, ...]]:
        """The rules that can remove components, by their dotted keys; empty if all are off."""
        rules = {}
        for key in ("keep_largest", "min_component_ml"):
            rule = getattr(self, key)
            if set(values_of(rule)) - {"none", 0.0}:
                rules[f"{self.section}.{key}"] = rule
        return rules


@dataclass(frozen=True)
class StrokesParameters(Section):
    """How far strokes that correct a result reach."""

    section: ClassVar[str] = "strokes"
    reach: float = _key(
        6.0,
        Rule(low=0.0),
        "mm; a stroke reaches as far as the error that it corrects, and at most this",
    )
    likeness: float = _key(
        0.2,
        Rule(low=0.0, low_open=True),
        "normalized intensity; smaller: only voxels like the drawn ones follow",
    )


# In the order of the file. The first kernel's table may be there several times.
KERNELS: dict[str, type[KernelParameters]] = {
    kind.section: kind for kind in KernelParameters.__subclasses__()
}
SECTIONS: dict[str, type[Section]] = {
    "intensity": IntensityParameters,
    **KERNELS,
    "compatibility": CompatibilityParameters,
    "volume": VolumeParameters,
    "mean_field": MeanFieldParameters,
    "postprocess": PostprocessParameters,
    "strokes": StrokesParameters,
}

# All dotted keys, in the order of the file.
KEYS: list[str] = []
for _section in SECTIONS.values():
    KEYS += [f"{_section.section}.{_entry.name}" for _entry in dataclasses.fields(_section)]
