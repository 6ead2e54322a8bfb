"""The parameters of a refinement: their file, dotted keys, and the model of a case."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crfrefine.base.inputs import add_inputs
from crfrefine.base.text import printable, shorten_value
from crfrefine.errors import ConfigError, CrfRefineError
from crfrefine.parameters.checks import require_names, unknown_key
from crfrefine.parameters.files import (
    find_config,
    kernel_prefixes,
    parse_toml,
    section_of,
    set_entry,
    toml_entry,
    toml_lines,
)
from crfrefine.parameters.sections import (
    KEYS,
    SECTIONS,
    BilateralParameters,
    CompatibilityParameters,
    IntensityParameters,
    KernelParameters,
    MeanFieldParameters,
    PostprocessParameters,
    Section,
    SpatialParameters,
    StrokesParameters,
    VolumeParameters,
    values_of,
)
from crfrefine.parameters.specs import (
    KernelSetSpec,
    KernelSpec,
    MeanFieldSpec,
    ModelSpec,
    own_fields,
)

SCHEMA = 1
TRAINED_ON = "trained_on"
MODALITIES = "modalities"
# Lists of names beside the tables, each with its comment.
_LISTS_OF_NAMES = {
    MODALITIES: "The modalities that the values are for, in this order.",
    TRAINED_ON: "The cases that the values were learned on, which are no evidence for new cases.",
}
# Largest size of a file: one with a penalty for each pair of a thousand labels has five megabytes.
_MAX_BYTES = 1 << 24


@dataclass(frozen=True, match_args=False)  # The order of the fields may change.
class CrfParameters:
    """All parameters of a refinement; `CrfParameters()` is the `default` preset.

    Raises:
        ConfigError: a value is of the wrong type or outside its range; the message names its key.

    Examples:
        >>> import crfrefine
        >>> parameters = crfrefine.CrfParameters.load("brats")
        >>> changes = {"bilateral.theta_alpha": 2.0, "mean_field.num_iterations": 10}
        >>> parameters = parameters.replace(**changes)
        >>> parameters.bilateral[0].theta_alpha, parameters.mean_field.num_iterations
        (2.0, 10)
        >>> parameters.replace(theta_beta=0.1)
        Traceback (most recent call last):
        crfrefine.errors.ConfigError: theta_beta: unknown key; did you mean 'bilateral.theta_beta'?
    """

    intensity: IntensityParameters = field(default_factory=IntensityParameters)
    bilateral: tuple[BilateralParameters, ...] = (BilateralParameters(),)
    spatial: SpatialParameters = field(default_factory=SpatialParameters)
    compatibility: CompatibilityParameters = field(default_factory=CompatibilityParameters)
    volume: VolumeParameters = field(default_factory=VolumeParameters)
    mean_field: MeanFieldParameters = field(default_factory=MeanFieldParameters)
    postprocess: PostprocessParameters = field(default_factory=PostprocessParameters)
    strokes: StrokesParameters = field(default_factory=StrokesParameters)
    # Names of the cases that `train-crf` learned the values on; empty if unknown.
    trained_on: tuple[str, ...] = ()
    # Names of the modalities that the values are for, in order; empty if unknown.
    modalities: tuple[str, ...] = ()
    # The tables of the file in their order, by the prefix of their keys, and only the kernels.
    tables: dict[str, Section] = field(init=False, repr=False, compare=False)
    kernels: dict[str, KernelParameters] = field(init=False, repr=False, compare=False)
    # Whether any term has a weight; without one, there is no CRF.
    has_weight: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        kernels = values_of(self.bilateral)
        if not kernels or not all(isinstance(kernel, BilateralParameters) for kernel in kernels):
            raise ConfigError(
                "bilateral: expected one kernel or several; "
                "to switch the term off, set bilateral.weight = 0"
            )
        object.__setattr__(self, "bilateral", kernels)

        tables: dict[str, Section] = {}
        for name, kind in SECTIONS.items():
            section = getattr(self, name)
            if name == "bilateral":
                tables.update(zip(kernel_prefixes(len(kernels)), kernels, strict=True))
            elif isinstance(section, kind):
                tables[name] = section
            else:
                raise ConfigError(f"{name}: expected {kind.__name__}, got {shorten_value(section)}")
        for key in _LISTS_OF_NAMES:
            object.__setattr__(self, key, require_names(key, getattr(self, key)))

        kernels_by_prefix = {}
        weights = [self.volume.weight]
        for prefix, table in tables.items():
            if isinstance(table, KernelParameters):
                kernels_by_prefix[prefix] = table
                weights += values_of(table.weight)
        object.__setattr__(self, "tables", tables)
        object.__setattr__(self, "kernels", kernels_by_prefix)
        object.__setattr__(self, "has_weight", any(weights))

    @property
    def can_leave_out_labels(self) -> bool:
        """Whether labels may take no part where they cannot matter.

        The volume term needs all labels everywhere.
        """
        return self.mean_field.label_threshold > 0.0 and self.volume.weight == 0.0

    @classmethod
    def load(cls, name_or_path: str | Path) -> CrfParameters:
        """Read a preset by its name, or a TOML file; missing keys have their default values.

        Args:
            name_or_path: a name that `list_presets` returns, or the path of a file.

        Raises:
            ConfigError: the file does not exist, is not TOML, or has a wrong key or value.
        """
        if name_or_path == "default":  # Its file has the values of the classes.
            return cls()
        path = find_config(name_or_path)
        try:
            if path.stat().st_size > _MAX_BYTES:
                limit = f"{_MAX_BYTES / 1e6:.0f} MB"
                raise ConfigError(f"too large for a parameter file; at most {limit} are read")
            add_inputs(path)
            # Some editors begin a file with a byte order mark.
            return cls.from_toml(path.read_text(encoding="utf-8-sig"))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read as a parameter file: {error}") from error

    @classmethod
    def from_toml(cls, text: str) -> CrfParameters:
        """Parameters from the text of a TOML file; raises ConfigError like `load`."""
        try:
            table = parse_toml(text)
        except ConfigError as error:
            raise ConfigError(f"not valid TOML: {error}") from error
        return cls.from_dict(table)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> CrfParameters:
        """Parameters from nested mappings, as of `to_dict`; raises ConfigError like `load`."""
        if not isinstance(table, Mapping):
            raise ConfigError(
                f"expected a dictionary of sections, as to_dict returns, got {shorten_value(table)}"
            )
        schema = table.get("schema", SCHEMA)
        if type(schema) is not int or schema != SCHEMA:
            raise ConfigError(
                f"schema: expected {SCHEMA}, got {shorten_value(schema)}; "
                "the file is from another version of crfrefine"
            )
        sections: dict[str, Any] = {}
        for name, value in table.items():
            if name == "bilateral":
                kernels = values_of(value)
                prefixes = kernel_prefixes(len(kernels))
                named = zip(kernels, prefixes, strict=True)
                sections[name] = [section_of(BilateralParameters, *kernel) for kernel in named]
            elif name in SECTIONS:
                sections[name] = section_of(SECTIONS[name], value, name)
            elif name in _LISTS_OF_NAMES:
                sections[name] = value
            elif name != "schema":
                raise unknown_key(name, [*SECTIONS, *KEYS])
        return cls(**sections)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain Python values with the keys of the file; unset keys are left out."""
        table: dict[str, Any] = {"schema": SCHEMA}
        for key in _LISTS_OF_NAMES:
            if getattr(self, key):
                table[key] = getattr(self, key)
        for section in self.tables.values():
            values = {key: value for key, value in vars(section).items() if value is not None}
            if section.section == "bilateral":
                table.setdefault("bilateral", []).append(values)
            else:
                table[section.section] = values
        return json.loads(json.dumps(table))  # with lists instead of tuples

    def to_toml(self, comment: str = "") -> str:
        """The text of a TOML file with a comment for each key; `comment` is for its head."""
        text = ""
        for line in comment.splitlines():
            text += f"# {printable(line)}".rstrip() + "\n"
        if comment:
            text += "\n"
        text += f"schema = {SCHEMA}\n"
        for name, meaning in _LISTS_OF_NAMES.items():
            if getattr(self, name):
                text += f"# {meaning}\n{name} = {toml_lines(getattr(self, name))}\n"

        for prefix, section in self.tables.items():
            name = section.section
            text += "\n"
            if prefix in (name, f"{name}.0"):
                text += f"# {section.comment or section.__doc__}\n"
            is_one_of_several = prefix != name
            text += f"[[{name}]]\n" if is_one_of_several else f"[{name}]\n"
            for key in dataclasses.fields(section):
                value = getattr(section, key.name)
                text += toml_entry(key.name, value, key.metadata["comment"])
        return text

    def save(self, path: str | Path, comment: str = "") -> None:
        """Write a TOML file that `load` reads back to equal parameters.

        An existing file is replaced atomically. `comment` has lines for the head of the file,
        without the comment sign. Raises ConfigError if the file cannot be written.
        """
        from crfrefine.io.writing import write_small_file

        try:
            write_small_file(Path(path), self.to_toml(comment).encode())
        except CrfRefineError as error:
            raise ConfigError(str(error)) from error

    def replace(self, **changes: Any) -> CrfParameters:
        """A copy with some entries changed: sections first, then entries.

        Args:
            changes: dotted keys as in `--set`, e.g. `**{"bilateral.theta_alpha": 2.0}`;
                `bilateral.1.weight` is the second kernel's. A whole section is changed by its bare
                name, e.g. `spatial=SpatialParameters(weight=1.0)`.

        Raises:
            ConfigError: a key is unknown or a value is not allowed; the message names the key.
        """
        sections = {name: changes[name] for name in SECTIONS if name in changes}
        table = self.to_dict()
        if sections:
            table.update(sections)
            table = self.from_dict(table).to_dict()
        for key, value in changes.items():
            if key not in sections:
                set_entry(table, key, value)
        if "compatibility.kind" in changes:
            for entry in dataclasses.fields(CompatibilityParameters):
                needed_by = entry.metadata["needed_by"]
                is_needed = needed_by is None or needed_by[1] == changes["compatibility.kind"]
                if not is_needed and f"compatibility.{entry.name}" not in changes:
                    table["compatibility"].pop(entry.name, None)
        return self.from_dict(table)

    @property
    def num_labels(self) -> int | None:
        """The number of labels that a list or matrix fixes; None if all values fit any number."""
        for name, section in self.tables.items():
            if name == "postprocess":
                continue
            for values in section.label_lists.values():
                return len(values)
        return None

    @property
    def bandwidths(self) -> dict[str, Any]:
        """The bandwidths by key: of all appearance kernels, and of others that have a weight."""
        bandwidths = {}
        for prefix, kernel in self.kernels.items():
            if kernel.section == "bilateral" or kernel.weight:
                for key in kernel.bandwidths():
                    bandwidths[f"{prefix}.{key}"] = getattr(kernel, key)
        return bandwidths

    @property
    def counts_network_voxels(self) -> bool:
        """True if bandwidths count voxels of a network that is coarser than the image."""
        return self.mean_field.positions == "network"

    def select_labels(self, labels: Sequence[int], num_labels: int) -> CrfParameters:
        """Return the parameters of a case in which only some labels take part.

        Lists with a value per label, `num_labels` with the background, keep the values of `labels`,
        in the order of the case's channels. Raises ConfigError, with the key, for a list of another
        length.
        """
        sections: dict[str, Any] = {}
        kernels: list[Any] = []
        for prefix, section in self.tables.items():
            section.spread({"label": num_labels}, prefix)  # checks the lengths
            selected = section.select_labels(labels)
            if section.section == "bilateral":
                kernels.append(selected)
            else:
                sections[prefix] = selected
        return dataclasses.replace(self, bilateral=tuple(kernels), **sections)

    @property
    def has_values_per_modality(self) -> bool:
        """Whether an entry has several values, one per modality."""
        return any(section.has_values_per_modality for section in self.tables.values())

    def resolve(self, num_labels: int, num_modalities: int, num_dims: int) -> ModelSpec:
        """Return the model for a case.

        Single numbers are spread over its labels, modalities and axes; terms without weight are
        left out.

        Args:
            num_labels: L, background included.
            num_modalities: M, channels of the image.
            num_dims: axes of the grid.

        Raises:
            CapacityError: more labels than `crfrefine.base.limits.MAX_LABELS`.
            ConfigError: a list has the wrong length; the message names the key.
        """
        import numpy as np

        from crfrefine.base.limits import require_few_labels

        require_few_labels(num_labels, "the case")
        sizes = {"label": num_labels, "modality": num_modalities, "axis": num_dims}
        tables = {prefix: table.spread(sizes, prefix) for prefix, table in self.tables.items()}
        kernels = []
        weights = []
        for prefix, kernel in self.kernels.items():
            weight, *bandwidths = tables[prefix].values()
            if np.array(weight, np.float32).any():
                kernels.append(KernelSpec(kernel.section, *bandwidths))
                weights.append(weight)

        bias = np.array(tables["mean_field"]["bias"], np.float32)
        kernel_fields = own_fields(KernelSetSpec, vars(self.mean_field))
        run_fields = own_fields(MeanFieldSpec, vars(self.mean_field))
        run_fields["bias"] = bias if bias.any() else None
        return ModelSpec(
            KernelSetSpec(tuple(kernels), num_labels=num_labels, **kernel_fields),
            MeanFieldSpec(
                np.array(weights, np.float32).reshape(len(kernels), num_labels),
                self.compatibility.penalties(num_labels, np.float32),
                volume_weight=self.volume.weight,
                **run_fields,
            ),
        )


def as_parameters(parameters: CrfParameters | str | Path | None) -> CrfParameters:
    """Return the parameters of an argument, which may be a preset's name or a file's path.

    None means the preset `default`. Raises like `CrfParameters.load`.
    """
    if parameters is None:
        return CrfParameters()
    if isinstance(parameters, CrfParameters):
        return parameters
    if isinstance(parameters, str | Path):
        return CrfParameters.load(parameters)
    raise ConfigError(
        "parameters: expected CrfParameters, a preset's name or a file's path, "
        f"got {shorten_value(parameters)}; CrfParameters.from_dict takes nested dictionaries"
    )
