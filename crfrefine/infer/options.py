"""The options of `crfrefine infer`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from crfrefine.base.label_options import InputOptions
from crfrefine.base.limits import MAX_PARTS, parse_jobs, parse_size
from crfrefine.base.numerics import MAX_THREADS
from crfrefine.base.option import (
    CLUSTER,
    INPUT,
    OUTPUT,
    RESOURCES,
    Option,
    parse_path,
    path_text,
)

if TYPE_CHECKING:
    from crfrefine.arrays.region_scheme import RegionScheme
    from crfrefine.parameters.model import CrfParameters


def _path_or_nonzero(text: str) -> Path | str:
    if text == "nonzero":
        return text
    return parse_path(text)


def _default_parameters() -> "CrfParameters":
    from crfrefine.parameters.model import CrfParameters

    return CrfParameters()


@dataclass(frozen=True)
class InferenceOptions(InputOptions):
    """Options of `crfrefine infer`: what to refine, how, and where to write."""

    images: Annotated[
        tuple[Path, ...],
        Option(
            "-i --images",
            "Folder, file or pattern; repeat the option for the modalities of one case.",
            "PATH",
            panel=INPUT,
            unless="--nnunet or --manifest",
        ),
    ]
    logits: Annotated[
        tuple[Path, ...],
        Option(
            "-p --logits",
            "Folder, file or pattern: 4-D or vector volume, .npz, label map; repeat the option for "
            "one file per label.",
            "PATH",
            panel=INPUT,
            unless="--nnunet or --manifest",
        ),
    ]
    output: Annotated[
        Path,
        Option(
            "-o --output",
            "Folder, or for one case a file. Written on the image's grid, in its format.",
            "PATH",
            panel=OUTPUT,
        ),
    ]
    masks: Annotated[
        Path | str | None,
        Option(
            "-m --masks",
            "Folder, file or pattern; 'nonzero': where any modality is not 0. Default: as in the "
            "config. Outside the mask: the plain argmax.",
            "PATH|nonzero",
            _path_or_nonzero,
            panel=INPUT,
        ),
    ] = None
    parameters: "CrfParameters" = field(default_factory=_default_parameters)
    # of sigmoid channels; None means those of a `dataset.json` beside logits or images
    regions: "RegionScheme | None" = None
    device: Annotated[
        str,
        Option(
            "--device",
            "Where to compute.",
            "auto|cpu|cuda|torch|torch:cuda",
            show_default=True,
            panel=RESOURCES,
        ),
    ] = "auto"
    threads: Annotated[
        int | None,
        Option(
            "--threads",
            "CPU threads. Default: the cores this process may use.",
            "N",
            limits=(1, MAX_THREADS),
            panel=RESOURCES,
        ),
    ] = None
    num_jobs: Annotated[
        int | None,
        Option(
            "--jobs",
            "Cases in work at a time, which share the threads; auto: as many as there are threads "
            "and memory for; a GPU refines them one after the other. The results are the same.",
            "N|auto",
            parse_jobs,
            panel=RESOURCES,
        ),
    ] = None  # auto
    max_memory: Annotated[
        int | None,
        Option(
            "--max-memory",
            "Most memory to take, such as 8GiB or 512M; a case that needs more fails before it is "
            "read. Default, and at most: what the system allows.",
            "SIZE",
            parse_size,
            panel=RESOURCES,
        ),
    ] = None  # bytes
    save_probabilities: Annotated[
        bool,
        Option(
            "--save-probabilities",
            "Also write the marginals: CASE_probabilities.nii.gz; if the input is CASE.npz of "
            "nnU-Net, also CASE.npz for nnUNetv2_ensemble.",
            panel=OUTPUT,
        ),
    ] = False
    save_logits: Annotated[
        bool,
        Option("--save-logits", "Also write the refined logits: CASE_logits.nii.gz.", panel=OUTPUT),
    ] = False
    save_structures: Annotated[
        bool,
        Option(
            "--save-structures",
            "Also write one binary file per label, CASE/NAME.nii.gz.",
            panel=OUTPUT,
        ),
    ] = False
    preview: Annotated[
        bool,
        Option(
            "--preview", "Also write a picture of what changed: CASE_preview.png.", panel=OUTPUT
        ),
    ] = False
    resume: Annotated[
        bool,
        Option(
            "--continue --resume",
            "Skip cases whose output exists and is complete; refine a case again if its output is "
            "of other parameters.",
            panel=OUTPUT,
        ),
    ] = False
    num_parts: Annotated[
        int,
        Option(
            "--num-parts",
            "Number of processes that share the cases.",
            "N",
            limits=(1, MAX_PARTS),
            show_default=True,
        ),
    ] = 1
    part_id: Annotated[
        int | None,
        Option(
            "--part-id",
            "Number of this process, from 0: it takes every N-th case, from case K on.",
            "K",
            limits=(0, MAX_PARTS),
        ),
    ] = None  # None means 0
    fail_fast: Annotated[
        bool,
        Option(
            "--fail-fast", "Stop at the first bad case; otherwise list the failures at the end."
        ),
    ] = False
    summary: Annotated[
        Path | None,
        Option(
            "--summary",
            "Write the record of each case as JSON when the run ends; of a part, FILE-K-of-N.json.",
            "FILE.json",
            panel=OUTPUT,
        ),
    ] = None
    statistics: Annotated[
        bool,
        Option(
            "--statistics",
            "Also write a table of each label's volume before and after, and its mean intensities: "
            "statistics.csv.",
            panel=OUTPUT,
        ),
    ] = False
    strokes: Annotated[
        tuple[Path, ...],
        Option(
            "--strokes",
            "Folder, file or pattern of voxels that somebody drew to correct the result: 0 "
            "nothing, a label, or 255 background.",
            "PATH",
            panel=INPUT,
        ),
    ] = ()
    # how `-c auto` chose the parameters, for the record; None means that they were given
    choice: Mapping[str, Any] | None = None
    nnunet: Annotated[
        Path | None,
        Option(
            "--nnunet",
            "Folder of nnU-Net v2: a trained network, or predictions. The other files are found "
            "by it.",
            "FOLDER",
            panel=INPUT,
        ),
    ] = None
    manifest: Annotated[
        Path | None,
        Option(
            "--manifest",
            "Table of cases instead of -i and -p, with the columns case, images, logits and, if "
            "needed, mask, output, spacing.",
            "FILE.csv",
            panel=INPUT,
        ),
    ] = None
    # by the case, the fold of a training that held it out, and the parameters of this fold
    held_out: Mapping[str, tuple[str, "CrfParameters"]] = field(default_factory=dict)
    command: tuple[str, ...] = ()  # the arguments of the command line, for the record
    dask: Annotated[
        str | None,
        Option(
            "--dask",
            "Compute on a Dask cluster: tcp://HOST:PORT, tls://HOST:PORT, or its scheduler file.",
            "ADDRESS|FILE",
            path_text,
            panel=CLUSTER,
        ),
    ] = None
    allow_vanishing: Annotated[
        bool,
        Option(
            "--allow-vanishing",
            "Let rules of [postprocess] remove more than a tenth of a structure, which is an error "
            "otherwise, unless --set gives these rules.",
        ),
    ] = False
    output_format: Annotated[
        str | None,
        Option(
            "--output-format",
            "Format of the label maps, such as .nii.gz or .seg.nrrd. Default: the image's.",
            "SUFFIX",
            str.lower,
            panel=OUTPUT,
        ),
    ] = None

    @property
    def writes_file(self) -> bool:
        """Whether the output is a file, by its suffix, and not a folder."""
        from crfrefine.io.paths import suffix_of  # It imports numpy, which `--help` does without.

        return bool(suffix_of(self.output)) and not self.output.is_dir()

    def with_absolute_paths(self) -> Self:
        """Return the options with paths that do not depend on the current folder."""
        paths: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Path):
                paths[name] = value.absolute()
        for name in ("images", "logits", "strokes"):
            paths[name] = tuple(path.absolute() for path in getattr(self, name))
        return replace(self, **paths)
