"""The tables of a parameter file as checked dataclasses, one per table.

The fields' metadata hold every key's unit and meaning; files written by `CrfParameters.save` have them as comments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from crfrefine.errors import ConfigError
from crfrefine.parameters import checks

MAX_TEMPERATURE = 1e6
"""Far above any temperature that preserves the logits; the smallest one depends on the logits (`refine`)."""

MAX_BIAS = 1e3
"""Far above any useful difference between logits, and far below the logits of labels that are absent, -1e4, which must stay absent."""

OUTPUT_TEMPERATURE_RANGE = (0.01, 100.0)
"""Far beyond any that was learned; refined logits divided by it stay inside float32's range."""

_positive = checks.Range(0.0, low_open=True)
_together_or_each = checks.OneOrMany(
    checks.Choice(("none", "foreground", "each")), checks.Choice(("none", "foreground")), checks.Choice(("none", "each"))
)


def _key(default: Any, check: checks.Check, comment: str) -> Any:
    return field(default=default, metadata={"check": check, "comment": comment})


@dataclass(frozen=True)
class Section:
    """A table of the file: checks its fields on construction and turns lists into tuples."""

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if value is not None or entry.default is not None:
                # The dataclass is frozen for its users; this only converts values to their final type.
                object.__setattr__(self, entry.name, entry.metadata["check"](value, f"{self.section}.{entry.name}"))


@dataclass(frozen=True)
class IntensityParameters(Section):
    """How image intensities are normalized before the appearance kernels see them."""

    section: ClassVar[str] = "intensity"
    normalization: str | tuple[str, ...] = _key(
        "percentile",
        checks.OneOrMany(checks.Choice(("none", "zscore", "percentile", "window"))),
        "none | zscore | percentile | window; one, or one per modality; taken inside the mask",
    )
    percentiles: tuple[float, float] | tuple[tuple[float, float], ...] = _key(
        (1.0, 99.0), checks.Interval(0.0, 100.0), 'percent; for "percentile": mapped to 0 and 1, not clipped'
    )
    window: tuple[float, float] | tuple[tuple[float, float], ...] | None = _key(
        None,
        checks.Interval(),
        'intensity [low, high]; for "window": mapped to 0 and 1 and clipped, e.g. Hounsfield units',
    )
    mask: str = _key("none", checks.Choice(("none", "nonzero")), "none | nonzero (any modality); used when no mask file is given")

    def by_modality(self, num_modalities: int) -> list[tuple[str, tuple[float, float], tuple[float, float] | None]]:
        """Return normalization, percentiles and window of each modality; raise ConfigError if a list has the wrong length."""
        columns = []
        for name in ("normalization", "percentiles", "window"):
            value = getattr(self, name)
            is_list = isinstance(value, tuple) and isinstance(value[0], str | tuple)
            if is_list:
                checks.check_length(value, f"{self.section}.{name}", "modality", num_modalities)
            columns.append(value if is_list else (value,) * num_modalities)
        return list(zip(*columns, strict=True))

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = (self.normalization,) if isinstance(self.normalization, str) else self.normalization
        if "window" in kinds and self.window is None:
            raise ConfigError("intensity.window: needed by intensity.normalization = 'window'; give [low, high], e.g. [-160.0, 240.0]")


NORMALIZED = IntensityParameters(normalization="none")
"""For an image that has been normalized."""


@dataclass(frozen=True)
class BilateralParameters(Section):
    """One appearance kernel: exp(-|p_i - p_j|^2 / 2 theta_alpha^2 - sum_c |I_ic - I_jc|^2 / 2 theta_beta_c^2)."""

    section: ClassVar[str] = "bilateral"
    weight: float | tuple[float, ...] = _key(4.0, checks.OneOrMany(checks.penalty), "a number, or one per label; 0: no such term")
    theta_alpha: float | tuple[float, ...] = _key(
        1.5, checks.OneOrMany(_positive), "mm (or voxels, see positions); a number, or one per axis"
    )
    theta_beta: float | tuple[float, ...] = _key(0.05, checks.OneOrMany(_positive), "normalized intensity; a number, or one per modality")


BANDWIDTHS = ("theta_alpha", "theta_beta")
"""Of an appearance kernel: of position and of intensity."""


@dataclass(frozen=True)
class SpatialParameters(Section):
    """The smoothness kernel: exp(-|p_i - p_j|^2 / 2 theta_gamma^2)."""

    section: ClassVar[str] = "spatial"
    weight: float | tuple[float, ...] = _key(0.0, checks.OneOrMany(checks.penalty), "a number, or one per label; 0: no such term")
    theta_gamma: float | tuple[float, ...] = _key(
        1.0, checks.OneOrMany(_positive), "mm (or voxels, see positions); a number, or one per axis"
    )


@dataclass(frozen=True)
class CompatibilityParameters(Section):
    """The penalty for neighbors with different labels."""

    section: ClassVar[str] = "compatibility"
    kind: str = _key("potts", checks.Choice(("potts", "matrix")), "potts (1 for any two different labels) | matrix")
    matrix: tuple[tuple[float, ...], ...] | None = _key(
        None,
        checks.penalty_matrix,
        'for "matrix": labels x labels, zero diagonal; row: label of the neighbor, column: own label',
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "matrix" and self.matrix is None:
            raise ConfigError("compatibility.matrix: needed by compatibility.kind = 'matrix'")
        if self.kind == "potts" and self.matrix is not None:
            raise ConfigError("compatibility.matrix: not used by compatibility.kind = 'potts'; set compatibility.kind = 'matrix' too")


@dataclass(frozen=True)
class VolumeParameters(Section):
    """The term that keeps the number of voxels of each label's main body, which the other terms tend to shrink."""

    section: ClassVar[str] = "volume"
    weight: float = _key(0.0, checks.Range(0.0, 1.0), "0 = no such term; 1 = each step keeps the volumes exactly")
    match_input: bool = _key(
        False, checks.boolean, "whether each label of a label map ends with as many voxels as it has there, by a bias after the iterations"
    )


@dataclass(frozen=True)
class MeanFieldParameters(Section):
    """How the marginals are computed."""

    section: ClassVar[str] = "mean_field"
    num_iterations: int = _key(5, checks.count, "largest number of iterations")
    tolerance: float = _key(
        1e-5, checks.Range(0.0), "nats per voxel: mean KL between two iterations that counts as converged; 0 = always all iterations"
    )
    temperature: float = _key(1.0, checks.Range(0.0, MAX_TEMPERATURE, low_open=True), "divides the logits")
    bias: float | tuple[float, ...] = _key(
        0.0,
        checks.OneOrMany(checks.Range(-MAX_BIAS, MAX_BIAS)),
        "added to the logits inside the mask, before the temperature; a number, or one per label",
    )
    output_temperature: float = _key(
        1.0, checks.Range(*OUTPUT_TEMPERATURE_RANGE), "divides the refined logits where they become probabilities"
    )
    normalization: str = _key("symmetric", checks.Choice(("symmetric", "after")), "symmetric | after")
    filter: str = _key(
        "auto",
        checks.Choice(("auto", "exact", "truncated", "lattice", "grid")),
        "auto | exact | truncated | lattice | grid (at most 2 modalities): how bilateral messages are computed",
    )
    positions: str = _key(
        "mm", checks.Choice(("mm", "voxels", "network")), "mm | voxels | network (its voxels): unit of theta_alpha and theta_gamma"
    )
    label_threshold: float = _key(
        1e-4,
        checks.Range(0.0, 0.01),
        "a label whose marginals all stay below this around a tile takes no part there; 0 = all labels everywhere",
    )


@dataclass(frozen=True)
class PostprocessParameters(Section):
    """How the CRF's marginals become a label map, and its cleaning."""

    section: ClassVar[str] = "postprocess"
    keep_largest: str | tuple[str, ...] = _key(
        "none", _together_or_each, "none | foreground (all labels together) | each (label by itself); or one per label"
    )
    min_component_ml: float | tuple[float, ...] = _key(
        0.0,
        checks.OneOrMany(checks.Range(0.0)),
        "ml; smaller components (found as for keep_largest) become background; or one per label",
    )
    fill_holes: str | tuple[str, ...] = _key(
        "none", _together_or_each, "none | foreground (any hole) | each (holes inside a single label); or one per label"
    )

    @property
    def removing(self) -> dict[str, str | float | tuple[str, ...] | tuple[float, ...]]:
        """The rules that can remove components, by their dotted keys; empty if all are off."""
        rules = {"keep_largest": self.keep_largest, "min_component_ml": self.min_component_ml}
        values = {key: value if isinstance(value, tuple) else (value,) for key, value in rules.items()}
        return {f"{self.section}.{key}": rules[key] for key in rules if any(value not in ("none", 0.0) for value in values[key])}

    def check_lengths(self, num_labels: int) -> None:
        """Raise ConfigError, naming the key, if a list does not have one value per label, background included."""
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, tuple):
                checks.check_length(value, f"{self.section}.{entry.name}", "label", num_labels)


SECTIONS: dict[str, type[Section]] = {
    "intensity": IntensityParameters,
    "bilateral": BilateralParameters,
    "spatial": SpatialParameters,
    "compatibility": CompatibilityParameters,
    "volume": VolumeParameters,
    "mean_field": MeanFieldParameters,
    "postprocess": PostprocessParameters,
}


# Sections from tables, and changed copies of them.

_SectionType = TypeVar("_SectionType", bound=Section)


def suggested_key(key: str) -> str:
    """Suggest a dotted key: `theta_beta` is the last part of bilateral.theta_beta, `bilatral.weight` a misspelling."""
    known = [f"{name}.{entry.name}" for name, kind in SECTIONS.items() for entry in dataclasses.fields(kind)]
    section, _, entry = key.partition(".")
    if key and not entry:
        same = [name for name in known if name.partition(".")[2] == key]
        if same:
            return f"did you mean {' or '.join(repr(name) for name in same)}?"
    if section in SECTIONS:
        known = [name for name in known if name.startswith(f"{section}.")]
    return checks.suggestion(key, known)


def sections_from(name: str, value: Any) -> Any:
    """Return the section of a name from a table, or the appearance kernels from a table or several; errors name the key."""
    kind = SECTIONS[name]
    are_several = name == "bilateral" and not isinstance(value, Mapping | BilateralParameters)
    if are_several and (not isinstance(value, list | tuple) or not value):
        raise ConfigError(
            f"bilateral: expected a table or several, got {checks.describe(value)}; to switch the term off, set its weight to 0"
        )
    sections = []
    for index, table in enumerate(value if are_several else (value,)):
        prefix = f"bilateral.{index}" if are_several else name
        if not isinstance(table, Mapping | kind):
            raise ConfigError(f"{prefix}: expected a table of keys, got {checks.describe(table)}")
        sections.append(edited(kind, table, prefix) if isinstance(table, Mapping) else table)
    return tuple(sections) if name == "bilateral" else sections[0]


def edited(base: _SectionType | type[_SectionType], values: Mapping[str, Any], prefix: str) -> _SectionType:
    """The section `base` (for a class, its defaults) with some values changed; errors name keys by `prefix`."""
    checks.check_known(values, [entry.name for entry in dataclasses.fields(base)], f"{prefix}.")
    try:
        return base(**values) if isinstance(base, type) else dataclasses.replace(base, **values)
    except ConfigError as error:  # With several appearance kernels, the prefix has the number of the kernel.
        raise ConfigError(str(error).replace(f"{base.section}.", f"{prefix}.", 1)) from None
