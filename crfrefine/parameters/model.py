"""The parameters of a refinement (tables in sections.py): TOML, dotted keys, and their resolution for a case."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crfrefine.base.inputs import add_inputs
from crfrefine.base.plain import to_plain
from crfrefine.base.text import MAX_OF_A_REASON, listed, shorten, shorten_value
from crfrefine.errors import ConfigError, CrfRefineError
from crfrefine.parameters.checks import unknown_key
from crfrefine.parameters.presets import find_config
from crfrefine.parameters.sections import (
    KEYS,
    SECTIONS,
    BilateralParameters,
    CompatibilityParameters,
    IntensityParameters,
    MeanFieldParameters,
    PostprocessParameters,
    Section,
    SpatialParameters,
    StrokesParameters,
    VolumeParameters,
    section_of,
)
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec, MeanFieldSpec, ModelSpec

SCHEMA = 1
TRAINED_ON = "trained_on"
_MAX_BYTES = (
    1 << 24
)  # Largest size of a file; one with a penalty for each pair of a thousand labels has five megabytes.
_DOTTED_KEY = re.compile(r"(\w+)\.(?:([0-9]+)\.)?(\w+)")


@dataclass(frozen=True, match_args=False)  # Fields have names, no promised order.
class CrfParameters:
    """All parameters of a refinement; `CrfParameters()` is the `default` preset.

    Raises:
        ConfigError: a value is of the wrong type or outside its range; the message names its dotted key.

    Examples:
        >>> import crfrefine
        >>> parameters = crfrefine.CrfParameters.load("brats")
        >>> parameters = parameters.replace(**{"bilateral.theta_alpha": 2.0, "mean_field.num_iterations": 10})
        >>> parameters.bilateral[0].theta_alpha, parameters.mean_field.num_iterations
        (2.0, 10)
        >>> parameters.replace(theta_alpha=2.0)
        Traceback (most recent call last):
        crfrefine.errors.ConfigError: theta_alpha: unknown key; did you mean 'bilateral.theta_alpha'?
    """

    intensity: IntensityParameters = field(
        default_factory=IntensityParameters
    )  # normalization of the image
    bilateral: tuple[BilateralParameters, ...] = field(
        default_factory=lambda: (BilateralParameters(),)
    )  # the appearance kernels
    spatial: SpatialParameters = field(default_factory=SpatialParameters)  # the smoothness kernel
    compatibility: CompatibilityParameters = field(
        default_factory=CompatibilityParameters
    )  # the penalty matrix
    volume: VolumeParameters = field(
        default_factory=VolumeParameters
    )  # the term that keeps each label's volume
    mean_field: MeanFieldParameters = field(default_factory=MeanFieldParameters)  # the iteration
    postprocess: PostprocessParameters = field(
        default_factory=PostprocessParameters
    )  # the cleaning of the label map
    strokes: StrokesParameters = field(default_factory=StrokesParameters)  # the reach of strokes
    trained_on: tuple[
        str, ...
    ] = ()  # names of the cases that `train-crf` learned the values on; empty if unknown

    def __post_init__(self) -> None:
        kernels = (
            (self.bilateral,) if isinstance(self.bilateral, BilateralParameters) else self.bilateral
        )
        if (
            not isinstance(kernels, list | tuple)
            or not kernels
            or not all(isinstance(k, BilateralParameters) for k in kernels)
        ):
            raise ConfigError(
                "bilateral: expected one kernel or several; to switch the term off, set bilateral.weight = 0"
            )
        object.__setattr__(self, "bilateral", tuple(kernels))
        for name, kind in SECTIONS.items():
            if name != "bilateral" and not isinstance(getattr(self, name), kind):
                raise ConfigError(
                    f"{name}: expected {kind.__name__}, got {shorten_value(getattr(self, name))}"
                )
        if self.compatibility.kind == "potts" and self.compatibility.matrix is not None:
            raise ConfigError(
                "compatibility.matrix: not used by compatibility.kind = 'potts'; set compatibility.kind = 'matrix' too"
            )
        if not isinstance(self.trained_on, list | tuple) or not all(
            isinstance(name, str) for name in self.trained_on
        ):
            raise ConfigError(
                f"{TRAINED_ON}: expected a list of names of cases, got {shorten_value(self.trained_on)}"
            )
        object.__setattr__(self, TRAINED_ON, tuple(self.trained_on))

    @classmethod
    def load(cls, name_or_path: str | Path) -> CrfParameters:
        """Read a preset by its name, or a TOML file; missing keys have their default values.

        Args:
            name_or_path: a name that `list_presets` returns, or the path of a file.

        Raises:
            ConfigError: the preset or file does not exist, is not TOML, or has a wrong key or value.
        """
        path = find_config(name_or_path)
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise ConfigError(
                    f"too large for a parameter file; at most {_MAX_BYTES / 1e6:.0f} MB are read"
                )
            add_inputs(path)
            return cls.from_toml(
                path.read_text(encoding="utf-8-sig")
            )  # Some editors begin a file with a byte order mark.
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read as a parameter file: {error}") from error

    @classmethod
    def from_toml(cls, text: str) -> CrfParameters:
        """Parameters from the text of a TOML file; raises ConfigError like `load`."""
        try:
            table = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"not valid TOML: {_toml_problem(error)}") from error
        return cls.from_dict(table)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> CrfParameters:
        """Parameters from nested mappings, as `to_dict` returns and TOML gives; raises ConfigError like `load`."""
        if not isinstance(table, Mapping):
            raise ConfigError(
                f"expected a dictionary of sections, as to_dict returns, got {shorten_value(table)}"
            )
        schema = table.get("schema", SCHEMA)
        if type(schema) is not int or schema != SCHEMA:
            raise ConfigError(
                f"schema: expected {SCHEMA}, got {shorten_value(schema)}; the file is from another version of crfrefine"
            )
        sections: dict[str, Any] = {}
        for name, value in table.items():
            if name == "bilateral":
                kernels = value if isinstance(value, list | tuple) else (value,)
                prefixes = (
                    [name]
                    if len(kernels) == 1
                    else [f"{name}.{number}" for number in range(len(kernels))]
                )
                sections[name] = tuple(
                    map(section_of, [BilateralParameters] * len(kernels), kernels, prefixes)
                )
            elif name in SECTIONS:
                sections[name] = section_of(SECTIONS[name], value, name)
            elif name not in ("schema", TRAINED_ON):
                raise unknown_key(name, [*SECTIONS, *KEYS])
        return cls(**sections, trained_on=table.get(TRAINED_ON, ()))

    def to_dict(self) -> dict[str, Any]:
        """Nested plain Python values with the keys of the file; unset keys are left out."""
        table: dict[str, Any] = {"schema": SCHEMA} | (
            {TRAINED_ON: list(self.trained_on)} if self.trained_on else {}
        )
        for name, _, section in self._tables():
            values = {
                key: to_plain(value) for key, value in vars(section).items() if value is not None
            }
            table[name] = [*table.get(name, ()), values] if name == "bilateral" else values
        return table

    def to_toml(self, comment: str = "") -> str:
        """The text of a TOML file with a comment for each key; `comment` is for its head, without the comment sign."""
        text = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines()) + (
            "\n" if comment else ""
        )
        text += f"schema = {SCHEMA}\n"
        if self.trained_on:
            names = "".join(f"  {_toml_value(name)},\n" for name in self.trained_on)
            text += "# The cases that the values were learned on, which are no evidence for new cases.\n"
            text += f"{TRAINED_ON} = [\n{names}]\n"
        for name, prefix, section in self._tables():
            is_first = prefix in (name, f"{name}.0")
            text += f"\n# {(section.__doc__ or '').splitlines()[0]}\n" if is_first else "\n"
            text += (
                f"[[{name}]]\n"
                if name == "bilateral" and len(self.bilateral) > 1
                else f"[{name}]\n"
            )
            for key in dataclasses.fields(section):
                value, comment = getattr(section, key.name), key.metadata["comment"]
                # A key without a value is shown commented out, with its meaning.
                entry = (
                    f"# {key.name}: not set"
                    if value is None
                    else f"{key.name} = {_toml_value(value)}"
                )
                text += f"# {comment}\n{entry}\n" if "\n" in entry else f"{entry:<31} # {comment}\n"
        return text

    def save(self, path: str | Path, comment: str = "") -> None:
        """Write a TOML file that `load` reads back to equal parameters; an existing file is replaced atomically.

        `comment` has lines for the head of the file, without the comment sign. Raises ConfigError if the file cannot be written.
        """
        from crfrefine.io.atomic import write_small_file

        try:
            write_small_file(Path(path), self.to_toml(comment).encode())
        except CrfRefineError as error:
            raise ConfigError(str(error)) from error

    def replace(self, **changes: Any) -> CrfParameters:
        """A copy with some entries changed.

        Args:
            changes: dotted keys as in `--set`, e.g. `**{"bilateral.theta_alpha": 2.0}`; `bilateral.1.weight` is the second kernel's.
                A whole section is changed by its bare name, e.g. `spatial=SpatialParameters(weight=1.0)`.

        Raises:
            ConfigError: a key is unknown or a value is not allowed; the message names the key.
        """
        table = self.to_dict()
        if sections := {name: changes[name] for name in SECTIONS if name in changes}:
            table = self.from_dict(table | sections).to_dict()
        for key, value in changes.items():
            if key in SECTIONS:
                continue
            match = _DOTTED_KEY.fullmatch(key)
            name, number, entry = match.groups() if match else ("", None, "")
            if f"{name}.{entry}" not in KEYS or (number and name != "bilateral"):
                raise unknown_key(key, KEYS)
            tables = table[name] if name == "bilateral" else [table[name]]
            if number is None and len(tables) > 1:
                names = listed([f"{name}.{number}.{entry}" for number in range(len(tables))])
                raise ConfigError(
                    f"{shorten(key)}: there are {len(tables)} kernels; say which: {names}"
                )
            if len(number or "") > 9 or int(number or 0) >= len(tables):
                raise ConfigError(
                    f"{shorten(key)}: expected the number of a kernel from 0 to {len(tables) - 1}"
                )
            tables[int(number or 0)][entry] = value
        if changes.get("compatibility.kind") == "potts" and "compatibility.matrix" not in changes:
            table["compatibility"].pop("matrix", None)
        return self.from_dict(table)

    def _tables(self) -> Iterator[tuple[str, str, Section]]:
        """Yield the tables of the file in their order: name, prefix of its keys, content."""
        for name in SECTIONS:
            kernels = self.bilateral if name == "bilateral" else (getattr(self, name),)
            for number, section in enumerate(kernels):
                yield name, name if len(kernels) == 1 else f"{name}.{number}", section

    @property
    def num_labels(self) -> int | None:
        """L, if a value per label or a matrix fixes it; None if all values hold for any number of labels."""
        lists = (
            values
            for name, _, section in self._tables()
            if name != "postprocess"
            for values in section.label_lists.values()
        )
        return next(map(len, lists), None)

    @property
    def has_weight(self) -> bool:
        """Whether any term has a weight: without one, there is no CRF."""
        weights = [kernel.weight for kernel in self.bilateral] + [
            self.spatial.weight,
            self.volume.weight,
        ]
        return any(any(weight) if isinstance(weight, tuple) else weight for weight in weights)

    @property
    def counts_network_voxels(self) -> bool:
        """Whether bandwidths count voxels of a network that is coarser than the image."""
        return self.mean_field.positions == "network"

    def select_labels(self, labels: Sequence[int], num_labels: int) -> CrfParameters:
        """Return the parameters of a case in which only some labels take part: lists with a value per label keep those.

        `labels` are in the order of the case's channels; lists have `num_labels` values, background included. Raises ConfigError, with the
        key, for a list of another length.
        """
        sections: dict[str, Any] = {"bilateral": []}
        for name, prefix, section in self._tables():
            section.spread({"label": num_labels}, prefix)  # checks the lengths
            lists = {
                key: tuple(values[label] for label in labels)
                for key, values in section.label_lists.items()
            }
            if "matrix" in lists:
                lists["matrix"] = tuple(
                    tuple(row[label] for label in labels) for row in lists["matrix"]
                )
            chosen = dataclasses.replace(section, **lists)
            sections[name] = [*sections[name], chosen] if name == "bilateral" else chosen
        return dataclasses.replace(self, **sections)

    def resolve(self, num_labels: int, num_modalities: int, num_dims: int) -> ModelSpec:
        """Return the model for a case: single numbers spread over its labels, modalities and axes, and terms without weight left out.

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
        tables = [(name, section.spread(sizes, prefix)) for name, prefix, section in self._tables()]
        values, run, matrix = dict(tables), self.mean_field, self.compatibility.matrix
        terms = [
            (table["weight"], KernelSpec(table["theta_alpha"], table["theta_beta"]))
            for name, table in tables
            if name == "bilateral"
        ]
        terms.append((values["spatial"]["weight"], KernelSpec(values["spatial"]["theta_gamma"])))
        terms = [
            (weights, kernel) for weights, kernel in terms if np.array(weights, np.float32).any()
        ]
        weights = np.array([weights for weights, _ in terms], np.float32).reshape(
            len(terms), num_labels
        )
        compatibility = (
            1 - np.eye(num_labels, dtype=np.float32)
            if matrix is None
            else np.asarray(matrix, np.float32)
        )
        bias = np.array(values["mean_field"]["bias"], np.float32)
        shift, kernels = bias if bias.any() else None, tuple(kernel for _, kernel in terms)
        return ModelSpec(
            KernelSetSpec(
                kernels,
                run.normalization,
                run.filter,
                num_labels,
                run.num_iterations,
                run.positions,
            ),
            MeanFieldSpec(
                weights,
                compatibility,
                run.num_iterations,
                run.temperature,
                run.tolerance,
                shift,
                self.volume.weight,
            ),
        )


def as_parameters(parameters: CrfParameters | str | Path | None) -> CrfParameters:
    """Return the parameters of an argument: themselves, a preset's name, a file's path, or None for `default`; raises like `load`."""
    if isinstance(parameters, str | Path):
        return CrfParameters.load(parameters)
    if isinstance(parameters, CrfParameters | None):
        return parameters or CrfParameters()
    raise ConfigError(
        f"parameters: expected CrfParameters, a preset's name or a file's path, got {shorten_value(parameters)}; "
        "CrfParameters.from_dict takes nested dictionaries"
    )


def _toml_value(value: object) -> str:
    """TOML text of a string, number, or nested sequence of these; a matrix takes a line for each row."""
    if isinstance(value, Sequence) and value and isinstance(value[0], list | tuple):
        return "[\n" + "".join(f"  {_toml_value(row)},\n" for row in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def _toml_problem(error: ValueError | RecursionError) -> str:
    """Return the fault of a text that `tomllib` could not read; Python's messages on other faults than syntax are not for users."""
    if isinstance(error, tomllib.TOMLDecodeError):
        return shorten(error, MAX_OF_A_REASON)
    return "too many digits in a number, an invalid date, or too many nested lists"


_BARE_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")


def parse_override(text: str) -> tuple[str, Any]:
    """Split `KEY=VALUE` into a dotted key and a value for `CrfParameters.replace`; raise ConfigError if it cannot be read.

    The value is in TOML's syntax; a single word needs no quotes.
    """
    key, sign, raw = text.partition("=")
    key, raw = key.strip(), raw.strip()
    if not sign or not key or not raw:
        raise ConfigError(
            f"{shorten_value(text)}: expected KEY=VALUE, e.g. bilateral.theta_alpha=6"
        )
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError) as error:
        if _BARE_WORD.fullmatch(raw):
            return key, raw
        raise ConfigError(
            f"{shorten(key)}: cannot read the value {shorten_value(raw)}: {_toml_problem(error)}; "
            'numbers, [lists], and in lists words in "quotes"'
        ) from error
    if set(parsed) != {"value"}:
        raise ConfigError(f"{shorten(key)}: expected one value, got {shorten_value(raw)}")
    return key, parsed["value"]
