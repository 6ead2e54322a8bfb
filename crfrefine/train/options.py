"""The options of a training run, as of `crfrefine train-crf`, and the files that it writes."""

import textwrap
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from crfrefine.base.label_options import (
    MAP,
    MAP_OF_REFERENCE,
    InputOptions,
    Mapped,
    parse_mapped,
)
from crfrefine.base.lesion_rules import LESION_RULES
from crfrefine.base.limits import MAX_PARTS
from crfrefine.base.option import INPUT, MODEL, OUTPUT, STRICT, Option
from crfrefine.errors import InputError
from crfrefine.version import __version__

if TYPE_CHECKING:
    from crfrefine.parameters.model import CrfParameters

# The groups of parameters that gradients move.
LEARNABLE = ("weights", "compatibility", "theta", "temperature", "bias")
# The groups that gradients move for a coarser network, except for theta_alpha.
COARSE_LEARN = ("weights", "theta", "temperature")
# The volume term is chosen once the rest is trained; if the model begins with one, gradients move
# its weight.
VOLUME_GROUP = "volume"
DEFAULT_LEARN = (*LEARNABLE, VOLUME_GROUP)
LOSSES = ("ce+dice", "ce", "dice")
MAX_SEED = 2**63 - 1  # accepted by all random number generators
WRITTEN_BY = "Written by crfrefine"  # the first words of a parameter file


@dataclass(frozen=True)
class TrainingOptions(InputOptions):
    """The options of `train-crf`.

    Choosing parameters without labels, `--unlabeled`, takes only those up to `threads`.
    """

    images: Path
    labels: Path | None  # reference label maps; without labels to learn from, they are not read
    logits: Path  # the network's logits or label maps, of cases that it was not trained on
    masks: Path | None = None  # None means that `intensity.mask` decides
    nnunet: Path | None = None  # the folder of a trained nnU-Net, whose folds hold the logits
    _: KW_ONLY
    # The parameter file; the report goes beside it, and so do finished folds until the run has
    # ended.
    output: Path
    strict: Annotated[bool, STRICT] = False
    seed: Annotated[
        int,
        Option(
            "--seed",
            "The same seed gives the same result.",
            "N",
            limits=(0, MAX_SEED),
            show_default=True,
        ),
    ] = 0
    # None means the cores this process may use; the result does not depend on it
    threads: int | None = None
    # The model to start from; None means the built-in starts.
    parameters: "CrfParameters | None" = None
    config: Path | None = None  # the file that the parameters came from
    mapped: Annotated[
        tuple[Mapped, ...],
        Option(
            "--map", f"{MAP} {MAP_OF_REFERENCE}", "[reference:]OLD=NEW", parse_mapped, panel=INPUT
        ),
    ] = ()
    # The groups that are learned; the others stay as they start.
    learn: tuple[str, ...] = DEFAULT_LEARN
    num_folds: Annotated[
        int | None,
        Option(
            "--folds",
            "Folds of cases. Default: 5, or the number of cases if that is smaller.",
            "K",
            limits=(2, MAX_PARTS),
            panel=MODEL,
        ),
    ] = None
    loss: Annotated[
        str,
        Option(
            "--loss",
            "Cross-entropy, soft Dice, or both.",
            choices=LOSSES,
            show_default=True,
            panel=MODEL,
        ),
    ] = LOSSES[0]
    num_optimizer_steps: Annotated[
        int | None,
        Option(
            "--num-iterations",
            "Most optimizer steps of a start. Default: 40. With fewer, fewer starts are tried.",
            "N",
            limits=(1, MAX_PARTS),
        ),
    ] = None
    # For the comparison and the Dice loss.
    regions: Annotated[
        tuple[str, ...],
        Option(
            "--regions",
            "Labels that count together; repeatable. Default: each foreground label.",
            "NAME=1+3+4",
            panel=INPUT,
        ),
    ] = ()
    lesions: Annotated[
        str | None,
        Option(
            "--lesions",
            "Score each lesion, too, by the rules of a challenge, and try the smallest volume of a "
            "component in place of the largest component. A bare --lesions has those of isles.",
            choices=tuple(LESION_RULES),
            may_stand_alone=True,
            panel=MODEL,
        ),
    ] = None
    device: str = "auto"  # or "cpu", "cuda" or "cuda:N"
    resume: Annotated[
        bool,
        Option("--continue --resume", "Take the finished folds of a stopped run.", panel=OUTPUT),
    ] = False

    def beside(self, ending: str) -> Path:
        """Return a path beside the parameter file, with its name but another ending."""
        return self.output.with_name(self.output.name.removesuffix(".toml") + ending)

    @property
    def report(self) -> Path:
        """The JSON file with all results."""
        return self.beside(".report.json")

    @property
    def files(self) -> tuple[Path, ...]:
        """All files to write, the parameters last."""
        return self.report, self.output

    def check_files(self) -> None:
        """Raise InputError for files that cannot be written."""
        from crfrefine.io.writing import check_output

        if self.output.suffix != ".toml" or self.output.is_dir():
            raise InputError(f"{self.output}: name a file for the parameters, ending in .toml")
        for path in self.files:
            check_output(path)

    def write(
        self, schema: int, report: Mapping[str, Any], parameters: "CrfParameters", origin: str
    ) -> None:
        """Write the report and, last, the parameters with a sentence on their origin.

        Each is written whole or not at all.
        """
        from crfrefine.io.json import to_json
        from crfrefine.io.writing import write_small_file

        written = datetime.now(UTC).isoformat(timespec="seconds")
        content = {"schema": schema, "version": __version__, "written": written, **report}
        write_small_file(self.report, to_json(content, indent=2).encode())
        comment = f"{WRITTEN_BY} {__version__}{origin}"
        write_small_file(self.output, parameters.to_toml(textwrap.fill(comment, 98)).encode())
