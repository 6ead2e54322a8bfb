"""The parameters of a refinement: read from and written to TOML, addressed by dotted keys, resolved for a case.

sections.py defines the tables and their keys; docs/reference/math.md defines the model.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crfrefine.base.plain import to_plain
from crfrefine.base.text import listed, shorten
from crfrefine.errors import ConfigError, CrfRefineError
from crfrefine.parameters import checks
from crfrefine.parameters.presets import find_config
from crfrefine.parameters.sections import (
    SECTIONS,
    BilateralParameters,
    CompatibilityParameters,
    IntensityParameters,
    MeanFieldParameters,
    PostprocessParameters,
    Section,
    SpatialParameters,
    VolumeParameters,
    edited,
    sections_from,
    suggested_key,
)
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec, MeanFieldSpec, ModelSpec
from crfrefine.parameters.toml import toml_entry, toml_problem, toml_value

SCHEMA = 1
TRAINED_ON = "trained_on"
_MAX_BYTES = 1 << 24  # Largest size of a file; one with a penalty for each pair of a thousand labels has five megabytes.
_MAX_DIGITS = 9  # Most digits of a kernel number.


@dataclass(frozen=True, match_args=False)  # Fields have names, no promised order.
class CrfParameters:
    """All parameters of a refinement; `CrfParameters()` is the `default` preset.

    Attributes:
        intensity: normalization of the image.
        bilateral: the appearance kernels, at least one.
        spatial: the smoothness kernel.
        compatibility: the penalty matrix.
        volume: the term that keeps each label's volume.
        mean_field: the iteration.
        postprocess: the cleaning of the label map.
        trained_on: names of the cases that `train-crf` learned the values on; empty if nothing is known.

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

    intensity: IntensityParameters = field(default_factory=IntensityParameters)
    bilateral: tuple[BilateralParameters, ...] = field(default_factory=lambda: (BilateralParameters(),))
    spatial: SpatialParameters = field(default_factory=SpatialParameters)
    compatibility: CompatibilityParameters = field(default_factory=CompatibilityParameters)
    volume: VolumeParameters = field(default_factory=VolumeParameters)
    mean_field: MeanFieldParameters = field(default_factory=MeanFieldParameters)
    postprocess: PostprocessParameters = field(default_factory=PostprocessParameters)
    trained_on: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        kernels = self.bilateral
        if isinstance(kernels, BilateralParameters):
            kernels = (kernels,)
        if not isinstance(kernels, list | tuple) or not kernels or not all(isinstance(k, BilateralParameters) for k in kernels):
            raise ConfigError("bilateral: expected one kernel or several; to switch the term off, set bilateral.weight = 0")
        object.__setattr__(self, "bilateral", tuple(kernels))
        for name, kind in SECTIONS.items():
            if name != "bilateral" and not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name}: expected {kind.__name__}, got {checks.describe(getattr(self, name))}")
        if not isinstance(self.trained_on, list | tuple) or not all(isinstance(name, str) for name in self.trained_on):
            raise ConfigError(f"{TRAINED_ON}: expected a list of names of cases, got {checks.describe(self.trained_on)}")
        object.__setattr__(self, TRAINED_ON, tuple(self.trained_on))

    @classmethod
    def load(cls, name_or_path: str | Path) -> CrfParameters:
        """Read a preset by its name, or a TOML file; missing keys have their default values.

        Args:
            name_or_path: a name that `list_presets` returns, or the path of a file.

        Raises:
            ConfigError: the preset or file does not exist, is not TOML, or has a wrong key or value.
        """
        from crfrefine.base.inputs import add_inputs

        path = find_config(name_or_path)
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise ConfigError(f"{path}: too large for a parameter file; at most {_MAX_BYTES / 1e6:.0f} MB are read")
            add_inputs(path)
            text = path.read_text(encoding="utf-8-sig")  # Some editors begin a file with a byte order mark.
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read as a parameter file: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: cannot be read as a parameter file: it is not UTF-8 text (byte {error.start})") from error
        try:
            return cls.from_toml(text)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_toml(cls, text: str) -> CrfParameters:
        """Parameters from the text of a TOML file; raises ConfigError like `load`."""
        try:
            table = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"not valid TOML: {toml_problem(error)}") from error
        return cls.from_dict(table)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> CrfParameters:
        """Parameters from nested mappings, as `to_dict` returns and TOML gives; raises ConfigError like `load`."""
        checks.refuse_gone(table)
        checks.check_known(table, ("schema", TRAINED_ON, *SECTIONS), "")
        schema = table.get("schema", SCHEMA)
        if isinstance(schema, bool) or not isinstance(schema, int):
            raise ConfigError(f"schema: expected a whole number, got {checks.describe(schema)}")
        if schema != SCHEMA:
            raise ConfigError(
                f"schema: this version reads schema {SCHEMA}, got {checks.describe(schema)}; the file is from another version of crfrefine"
            )
        trained_on = table.get(TRAINED_ON, ())
        return cls(**{name: sections_from(name, value) for name, value in table.items() if name in SECTIONS}, trained_on=trained_on)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain Python values with the keys of the file; unset keys are left out."""
        tables: dict[str, list[dict[str, Any]]] = {}
        for name, _, section in self._tables():
            tables.setdefault(name, []).append({key: to_plain(entry) for key, entry in vars(section).items() if entry is not None})
        names = {TRAINED_ON: list(self.trained_on)} if self.trained_on else {}
        return {"schema": SCHEMA} | names | {name: found if name == "bilateral" else found[0] for name, found in tables.items()}

    def to_toml(self, comment: str = "") -> str:
        """The text of a TOML file with a comment for each key; `comment` is for its head, without the comment sign."""
        text = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines()) + ("\n" if comment else "")
        text += f"schema = {SCHEMA}\n"
        if self.trained_on:
            names = "".join(f"  {toml_value(name)},\n" for name in self.trained_on)
            text += "# The cases that the values were learned on, which are no evidence for new cases.\n"
            text += f"{TRAINED_ON} = [\n{names}]\n"
        for name, index, section in self._tables():
            about = (section.__doc__ or "").splitlines()[0]
            text += f"\n# {about}\n" if index == 0 else "\n"
            text += f"[[{name}]]\n" if name == "bilateral" and len(self.bilateral) > 1 else f"[{name}]\n"
            for key in dataclasses.fields(section):
                text += toml_entry(key.name, getattr(section, key.name), key.metadata["comment"])
        return text

    def save(self, path: str | Path, comment: str = "") -> None:
        """Write a TOML file that `load` reads back to equal parameters; an existing file is replaced atomically.

        Args:
            path: the file to write.
            comment: lines for the head of the file, without the comment sign.

        Raises:
            ConfigError: the file cannot be written.
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
        whole = {name: sections_from(name, value) for name, value in changes.items() if name in SECTIONS}
        base = dataclasses.replace(self, **whole)
        edits: dict[tuple[str, int], dict[str, Any]] = {}
        for key, value in changes.items():
            if key not in SECTIONS:
                name, index, entry = base._address(key)
                edits.setdefault((name, index), {})[entry] = value
        sections: dict[str, Any] = {}
        kernels = list(base.bilateral)
        for (name, index), values in edits.items():
            if name == "bilateral":
                kernels[index] = edited(kernels[index], values, base._kernel_key(index))
                continue
            if name == "compatibility" and values.get("kind") == "potts":
                values.setdefault("matrix", None)
            sections[name] = edited(getattr(base, name), values, name)
        return dataclasses.replace(base, bilateral=tuple(kernels), **sections)

    def _tables(self) -> Iterator[tuple[str, int, Section]]:
        """Yield the tables of the file in their order: name, number among those of the name, content."""
        for name in SECTIONS:
            value = getattr(self, name)
            for index, section in enumerate(value if name == "bilateral" else (value,)):
                yield name, index, section

    def _kernel_key(self, index: int) -> str:
        """Prefix of the keys of an appearance kernel: numbered if there are several."""
        return f"bilateral.{index}" if len(self.bilateral) > 1 else "bilateral"

    def _address(self, key: str) -> tuple[str, int, str]:
        """Split a dotted key into section, kernel number and entry."""
        name, *rest = key.split(".")
        if name not in SECTIONS:
            checks.refuse_key(key, suggested_key(key))
        index = 0
        if name == "bilateral":
            count = len(self.bilateral)
            if rest and rest[0].isdecimal():
                number = rest.pop(0)
                index = int(number) if len(number) <= _MAX_DIGITS else count
                if index >= count:
                    raise ConfigError(f"{shorten(key)}: there {'is 1 kernel' if count == 1 else f'are {count} kernels'}, counted from 0")
            elif count > 1:
                names = listed([f"bilateral.{number}.{'.'.join(rest)}" for number in range(count)])
                raise ConfigError(f"{shorten(key)}: there are {count} kernels; say which: {names}")
        known = [entry.name for entry in dataclasses.fields(SECTIONS[name])]
        if len(rest) != 1 or rest[0] not in known:
            checks.refuse_key(key, suggested_key(key))
        return name, index, rest[0]

    @property
    def num_labels(self) -> int | None:
        """L, if a value per label or a matrix fixes it; None if all values hold for any number of labels."""
        values = (*(kernel.weight for kernel in self.bilateral), self.spatial.weight, self.mean_field.bias)
        lists: tuple[Any, ...] = (*(value for value in values if isinstance(value, tuple)), self.compatibility.matrix)
        return next((len(values) for values in lists if values is not None), None)

    @property
    def has_weight(self) -> bool:
        """Whether any term has a weight: without one, there is no CRF."""
        weights = [kernel.weight for kernel in self.bilateral] + [self.spatial.weight, self.volume.weight]
        return any(any(weight) if isinstance(weight, tuple) else weight for weight in weights)

    def select_labels(self, labels: Sequence[int], num_labels: int) -> CrfParameters:
        """A copy for a case in which only some labels take part: values per label are those of these labels.

        Args:
            labels: which labels, in the order of the case's channels.
            num_labels: L, background included, as the values per label have it.

        Raises:
            ConfigError: a list has the wrong length; the message names the key.
        """

        def chosen(value: Any, key: str) -> Any:
            if not isinstance(value, tuple):
                return value
            checks.check_length(value, key, "label", num_labels)
            return tuple(value[label] for label in labels)

        kernels = tuple(
            dataclasses.replace(kernel, weight=chosen(kernel.weight, f"{self._kernel_key(index)}.weight"))
            for index, kernel in enumerate(self.bilateral)
        )
        matrix = self.compatibility.matrix
        if matrix is not None:
            _check_matrix_size(len(matrix), num_labels)
            matrix = tuple(tuple(matrix[row][column] for column in labels) for row in labels)
        return dataclasses.replace(
            self,
            bilateral=kernels,
            spatial=dataclasses.replace(self.spatial, weight=chosen(self.spatial.weight, "spatial.weight")),
            compatibility=dataclasses.replace(self.compatibility, matrix=matrix),
            mean_field=dataclasses.replace(self.mean_field, bias=chosen(self.mean_field.bias, "mean_field.bias")),
            postprocess=dataclasses.replace(
                self.postprocess, **{key: chosen(value, f"postprocess.{key}") for key, value in vars(self.postprocess).items()}
            ),
        )

    def resolve(self, num_labels: int, num_modalities: int, num_dims: int) -> ModelSpec:
        """Return the model for a case: single numbers spread over its labels, modalities and axes, and terms without weight left out.

        Args:
            num_labels: L, background included.
            num_modalities: M, channels of the image.
            num_dims: axes of the grid.

        Raises:
            CapacityError: more labels than `crfrefine.base.labels.MAX_LABELS`.
            ConfigError: a list has the wrong length; the message names the key.
        """
        import numpy as np

        from crfrefine.base.labels import require_few_labels

        require_few_labels(num_labels, "the case")
        sizes = {"label": num_labels, "modality": num_modalities, "axis": num_dims}

        def spread(value: float | tuple[float, ...], key: str, what: str) -> tuple[float, ...]:
            if isinstance(value, tuple):
                checks.check_length(value, key, what, sizes[what])
                return value
            return (value,) * sizes[what]

        self.intensity.by_modality(num_modalities)  # checks the lengths
        terms = []
        for index, kernel in enumerate(self.bilateral):
            prefix = self._kernel_key(index)
            weight = spread(kernel.weight, f"{prefix}.weight", "label")
            alpha = spread(kernel.theta_alpha, f"{prefix}.theta_alpha", "axis")
            beta = spread(kernel.theta_beta, f"{prefix}.theta_beta", "modality")
            terms.append((np.array(weight, dtype=np.float32), KernelSpec(alpha, beta)))
        weight = spread(self.spatial.weight, "spatial.weight", "label")
        gamma = spread(self.spatial.theta_gamma, "spatial.theta_gamma", "axis")
        terms.append((np.array(weight, dtype=np.float32), KernelSpec(gamma)))
        terms = [(weights, kernel) for weights, kernel in terms if weights.any()]
        if self.compatibility.matrix is None:
            compatibility = np.ones((num_labels, num_labels), dtype=np.float32)
            np.fill_diagonal(compatibility, 0.0)
        else:
            _check_matrix_size(len(self.compatibility.matrix), num_labels)
            compatibility = np.asarray(self.compatibility.matrix, dtype=np.float32)
        self.postprocess.check_lengths(num_labels)
        settings = self.mean_field
        bias = np.array(spread(settings.bias, "mean_field.bias", "label"), dtype=np.float32)
        return ModelSpec(
            KernelSetSpec(
                tuple(kernel for _, kernel in terms),
                normalization=settings.normalization,
                filter=settings.filter,
                num_labels=num_labels,
                num_iterations=settings.num_iterations,
                positions=settings.positions,
            ),
            MeanFieldSpec(
                np.array([weights for weights, _ in terms], dtype=np.float32).reshape(len(terms), num_labels),
                compatibility,
                num_iterations=settings.num_iterations,
                temperature=settings.temperature,
                tolerance=settings.tolerance,
                bias=bias if bias.any() else None,
                volume_weight=self.volume.weight,
            ),
        )


def _check_matrix_size(size: int, num_labels: int) -> None:
    if size != num_labels:
        raise ConfigError(f"compatibility.matrix: it is {size} x {size}, but the case has {num_labels} labels")


def as_parameters(parameters: CrfParameters | str | Path | None) -> CrfParameters:
    """Return parameters from an argument: CrfParameters, a preset's name, a file's path, or None for `default`.

    Raises:
        ConfigError: another type, or the preset or file does not exist.
    """
    if parameters is None:
        return CrfParameters()
    if isinstance(parameters, CrfParameters):
        return parameters
    if isinstance(parameters, str | Path):
        return CrfParameters.load(parameters)
    raise ConfigError(
        f"parameters: expected CrfParameters, a preset's name or a file's path, got {checks.describe(parameters)}; "
        "CrfParameters.from_dict takes nested dictionaries"
    )
