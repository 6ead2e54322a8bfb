"""The options of a training run, as of `crfrefine train-crf`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from crfrefine.parameters.model import CrfParameters
from crfrefine.runs.execution.placement import HERE, Placement

LEARNABLE = ("weights", "compatibility", "theta", "temperature", "bias")
"""What gradients move."""

VOLUME_GROUP = "volume"
"""The volume term: chosen once the rest is trained; where the model begins with one, gradients move its weight."""

DEFAULT_LEARN = (*LEARNABLE, VOLUME_GROUP)

RULES_GROUP = "postprocess"
"""The small-object rules: chosen only if asked for, by a search that needs no gradient."""

LOSSES = ("ce+dice", "ce", "dice")


@dataclass(frozen=True)
class DataFolders:
    """Where the labeled cases are.

    Attributes:
        images: folder of images.
        labels: folder of reference label maps.
        logits: folder of the network's logits or label maps, of cases that it was not trained on.
        masks: folder of masks; None: as the parameters' `intensity.mask` says.
        nnunet: folder of a trained network of nnU-Net, in whose folds the logits are; None: they are in `logits`.
    """

    images: Path
    labels: Path
    logits: Path
    masks: Path | None = None
    nnunet: Path | None = None


@dataclass(frozen=True)
class TrainingOptions:
    """What to train, on what, and where to write.

    Attributes:
        data: the labeled cases.
        output: the parameter file to write; the report, the curves and the checkpoint go beside it.
        parameters: the model to start from; None: the built-in starts.
        config: the file that the parameters came from, so that it is not written over.
        learn: which of LEARNABLE and VOLUME_GROUP are learned, the others stay as they start; RULES_GROUP: the small-object rules are
            chosen too.
        num_folds: parts of the cross-validation; None: 5, or the number of cases where that is smaller.
        loss: one of LOSSES.
        num_optimizer_steps: for the start that is trained to its end; None: the built-in number.
        regions: `NAME=1+3+4`, what the comparison reports and the Dice loss weighs; empty: each foreground label.
        seed: order of the cases and their folds; the same seed gives the same result.
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: CPU threads; None: the cores this process may use. The result does not depend on it.
        max_minutes: the run ends within this time, with its result so far; None: no limit.
        resume: go on from the checkpoint of a run that was stopped.
        input_type: "auto", "logits", "probabilities" or "labels".
        resample: whether logits, labels and masks on another grid are interpolated onto the image's.
        allow_mismatched_dicom: whether DICOM files of one patient may be of different studies and frames of reference.
        strict: refuse cases that lack a file, which are left out otherwise.
        placement: whether folds are trained on a cluster, each on one worker; not with `max_minutes`.
    """

    data: DataFolders
    output: Path
    parameters: CrfParameters | None = None
    config: Path | None = None
    learn: tuple[str, ...] = DEFAULT_LEARN
    num_folds: int | None = None
    loss: str = LOSSES[0]
    num_optimizer_steps: int | None = None
    regions: tuple[str, ...] = ()
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    max_minutes: float | None = None
    resume: bool = False
    input_type: str = "auto"
    resample: bool = False
    allow_mismatched_dicom: bool = False
    strict: bool = False
    placement: Placement = HERE

    @property
    def report(self) -> Path:
        """The JSON file with all results."""
        return self._beside(".report.json")

    @property
    def curves(self) -> Path:
        """The picture of the training curves."""
        return self._beside(".curves.png")

    @property
    def checkpoint(self) -> Path:
        """The file in which a stopped run saves its state; it is removed when the run has ended."""
        return self._beside(".checkpoint.json")

    def _beside(self, ending: str) -> Path:
        return self.output.with_name(self.output.name.removesuffix(".toml") + ending)
