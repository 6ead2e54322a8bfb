"""The options of `crfrefine evaluate`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from crfrefine.base.label_options import (
    MAP,
    MAP_OF_REFERENCE,
    REFERENCE,
    Mapped,
    mapping_of,
    parse_mapped,
)
from crfrefine.base.lesion_rules import LESION_RULES, LesionRules
from crfrefine.base.numerics import MAX_THREADS
from crfrefine.base.option import INPUT, LESIONS, OUTPUT, RESOURCES, STRICT, Option, parse_path
from crfrefine.base.text import shorten, shorten_value
from crfrefine.errors import InputError

# Names in the output folder.
METRICS_NAME = "metrics.csv"
SUMMARY_NAME = "summary.json"
REPORT_NAME = "report.html"
DEFAULT_NAME = "prediction"
LESIONS_NAME = "lesions.csv"
VOXEL = "voxel"  # The tolerance that is one voxel of the reference.

MAX_OF_A_NAME = 200  # Most characters of a method's name, which appears in tables.


def parse_method(text: str) -> tuple[str, Path]:
    """Return name and path of "NAME=FOLDER"; raise InputError for another text."""
    name, equals, path = text.partition("=")
    if not equals or not name.strip() or not path:
        raise InputError(
            f"{shorten_value(text)}: expected NAME=FOLDER, such as network=predictions"
        )
    return parse_name(name), parse_path(path)


def parse_name(text: str) -> str:
    """Return the name of a method, without tabs and line breaks.

    Raise InputError if it is too long for a table.
    """
    if len(text) > MAX_OF_A_NAME:
        raise InputError(
            f"{shorten(text)}: a name of {len(text)} characters; at most {MAX_OF_A_NAME}"
        )
    return " ".join(text.split())


def parse_tolerance(text: str) -> float | str:
    """Return a number of mm, or VOXEL; raise InputError for another text."""
    if text == VOXEL:
        return text
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{shorten_value(text)}: expected mm, or {VOXEL}") from None


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation: what to measure, against what, and where to write the results."""

    predictions: Path  # the judged method
    labels: Path  # the reference
    output: Annotated[
        Path,
        Option(
            "-o --output",
            "Folder for metrics.csv, summary.json and report.html.",
            "FOLDER",
            panel=OUTPUT,
        ),
    ]
    name: Annotated[
        str,
        Option(
            "--name",
            "Name of PREDICTIONS in results.",
            "NAME",
            parse_name,
            show_default=True,
            panel=OUTPUT,
        ),
    ] = DEFAULT_NAME
    baselines: Annotated[
        tuple[tuple[str, Path], ...],
        Option(
            "-b --baseline",
            "Method to compare PREDICTIONS with; repeatable: "
            "the verdict says whether they beat the others too.",
            "NAME=FOLDER",
            parse_method,
            panel=INPUT,
        ),
    ] = ()
    probabilities: Annotated[
        tuple[tuple[str, Path], ...],
        Option(
            "--probabilities",
            "Logits or probabilities of a method, for its calibration, "
            "if they are not beside its label maps; repeatable.",
            "NAME=FOLDER",
            parse_method,
            panel=INPUT,
        ),
    ] = ()
    # as in `InputOptions`
    add_background: bool = False
    scale: float | None = None
    channel_labels: tuple[int, ...] | None = None
    mapped: Annotated[
        tuple[Mapped, ...],
        Option(
            "--map",
            f"{MAP} It is about PREDICTIONS; NAME:OLD=NEW is about a baseline, {MAP_OF_REFERENCE}",
            "[NAME:]OLD=NEW",
            parse_mapped,
            panel=INPUT,
        ),
    ] = ()
    images: Annotated[
        Path | None,
        Option("-i --images", "Folder, file or pattern, shown in the report.", "PATH", panel=INPUT),
    ] = None
    regions: Annotated[
        tuple[str, ...],
        Option(
            "-r --regions",
            "Labels that count together, such as core=1+3+4; repeatable. "
            "The verdict is then about these.",
            "NAME=1+3+4",
            panel=INPUT,
        ),
    ] = ()
    ceiling: Annotated[
        str | None,
        Option(
            "--ceiling",
            "The baseline that is the best possible, such as the network at the image's "
            "resolution. It is no rival: the share of its lead over the first baseline that "
            "PREDICTIONS recover is reported.",
            "NAME",
            parse_name,
        ),
    ] = None
    tolerance_mm: Annotated[
        float | str,
        Option(
            "--tolerance",
            "Tolerance of the surface Dice; voxel: the shortest side of the reference's voxels.",
            "MM|voxel",
            parse_tolerance,
            show_default=True,
        ),
    ] = 1.0
    lesions: Annotated[
        str | None,
        Option(
            "--lesions",
            "Score each lesion, a connected component of a label or region, by the rules of a "
            "challenge. A bare --lesions has those of isles: one common voxel finds a lesion.",
            choices=tuple(LESION_RULES),
            may_stand_alone=True,
            panel=LESIONS,
        ),
    ] = None
    lesion_min_volume: Annotated[
        float | None,
        Option(
            "--lesion-min-volume",
            "Lesions of the reference of at most this volume do not count. Default: as of "
            "--lesions.",
            "MM3",
            float,
            panel=LESIONS,
        ),
    ] = None
    lesion_match: Annotated[
        str | None,
        Option(
            "--lesion-match",
            "A lesion is found by one common voxel (overlap), or by an intersection of more than "
            "half of the union (iou). Default: as of --lesions.",
            choices=("overlap", "iou"),
            panel=LESIONS,
        ),
    ] = None
    lesion_connectivity: Annotated[
        int | None,
        Option(
            "--lesion-connectivity",
            "Neighbors of a voxel: over faces (6), edges too (18), or corners too (26). Default: "
            "as of --lesions.",
            "6|18|26",
            panel=LESIONS,
        ),
    ] = None
    ignore_label: Annotated[
        int | None,
        Option(
            "--ignore-label",
            "Voxels where the reference has this label are ignored. Default: as in dataset.json.",
            "N",
        ),
    ] = None
    processes: Annotated[
        int | None,
        Option(
            "--threads --processes",
            "CPU threads: each measures a case at a time. Default: the cores this process may use.",
            "N",
            limits=(1, MAX_THREADS),
            panel=RESOURCES,
        ),
    ] = None
    structures: Annotated[
        bool | None,
        Option(
            "--structures/--no-structures",
            "Folders hold one binary file per structure of a case, or a folder per case of such "
            "files. Default: where it is clear.",
        ),
    ] = None
    resample: Annotated[
        bool,
        Option(
            "--resample",
            "Interpolate predictions and images that are on another grid of the same world; "
            "otherwise they are an error.",
            panel=INPUT,
        ),
    ] = False
    report: Annotated[
        bool,
        Option(
            "--report/--no-report", "Whether to write report.html.", show_default=True, panel=OUTPUT
        ),
    ] = True
    fail_fast: Annotated[
        bool,
        Option(
            "--fail-fast",
            "Stop at the first bad case; otherwise continue, and list the failures at the end.",
        ),
    ] = False
    strict: Annotated[bool, STRICT] = False
    command_line: str = ""  # As typed, for the report.

    @property
    def methods(self) -> dict[str, Path]:
        """Folder or file of each method by its name, the judged method first."""
        return {self.name: self.predictions, **dict(self.baselines)}

    def mapping_of(self, method: str) -> dict[int, int]:
        """Return the new labels of values in the label maps of a method, or of REFERENCE.

        Raise ConfigError if a value has two.
        """
        return mapping_of(self.mapped, "" if method == self.name else method)

    @property
    def lesion_rules(self) -> LesionRules | None:
        """The rules by which lesions match; None without --lesions."""
        if self.lesions is None:
            return None
        given: dict[str, Any] = {
            "min_volume_mm3": self.lesion_min_volume,
            "match": self.lesion_match,
            "connectivity": self.lesion_connectivity,
        }
        changed = {name: value for name, value in given.items() if value is not None}
        return replace(LESION_RULES[self.lesions], **changed)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The folders and files in which cases are found."""
        paths = [self.labels, *self.methods.values()]
        paths += [path for _, path in self.probabilities]
        if self.images is not None:
            paths.append(self.images)
        return tuple(paths)

    @property
    def baseline(self) -> str | None:
        """Name of the method that the judged one is compared with; None without any."""
        if not self.baselines:
            return None
        name, _ = self.baselines[0]
        return name

    def to_dict(self) -> dict[str, Any]:
        """Return the settings of the results, for `summary.json`."""
        settings = {
            "predictions": self.predictions,
            "labels": self.labels,
            "method": self.name,
            "baseline": self.baseline,
            "baselines": dict(self.baselines),
            "probabilities": dict(self.probabilities),
            "images": self.images,
            "ceiling": self.ceiling,
            "tolerance_mm": self.tolerance_mm,
            "ignore_label": self.ignore_label,
            "mapping": {method: self.mapping_of(method) for method in self.methods},
            "reference_mapping": self.mapping_of(REFERENCE),
            "resample": self.resample,
            "add_background": self.add_background,
            "scale": self.scale,
            "channel_labels": self.channel_labels,
            "processes": self.processes,
            "command_line": self.command_line,
            # The link is readable even if the folder was removed.
            "working_folder": str(Path("/proc/self/cwd").readlink()),
        }
        if self.lesions is not None:
            settings["lesions"] = {"rules_of": self.lesions, **vars(self.lesion_rules)}
        return settings
