"""The options of a training run, as of `crfrefine train-crf`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crfrefine.base.text import listed
from crfrefine.cases.nnunet import locate_images, locate_labels, require_trained
from crfrefine.errors import ConfigError, InputError
from crfrefine.parameters.model import CrfParameters

LEARNABLE = ("weights", "compatibility", "theta", "temperature", "bias")
"""What gradients move."""

VOLUME_GROUP = "volume"
"""The volume term: chosen once the rest is trained; where the model begins with one, gradients move its weight."""

DEFAULT_LEARN = (*LEARNABLE, VOLUME_GROUP)

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


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """What parameters are found with, whether they are trained or chosen.

    Attributes:
        output: the parameter file to write; the report goes beside it, and so do finished folds until the run has ended.
        input_type: "auto", "logits", "probabilities" or "labels".
        resample: whether logits, labels and masks on another grid are interpolated onto the image's.
        strict: refuse cases that lack a file, which are left out otherwise.
        seed: of all that is drawn; the same seed gives the same result.
        threads: CPU threads; None: the cores this process may use. The result does not depend on it.
    """

    output: Path
    input_type: str = "auto"
    resample: bool = False
    strict: bool = False
    seed: int = 0
    threads: int | None = None

    def beside(self, ending: str) -> Path:
        """Return a file beside the parameter file, of its name with another ending."""
        return self.output.with_name(self.output.name.removesuffix(".toml") + ending)

    @property
    def report(self) -> Path:
        """The JSON file with all results."""
        return self.beside(".report.json")

    @property
    def files(self) -> tuple[Path, ...]:
        """All files to write, the parameters last."""
        return self.report, self.output


@dataclass(frozen=True)
class TrainingOptions(CommonOptions):
    """What to train, on what, and where to write, beside the options of CommonOptions.

    Attributes:
        data: the labeled cases.
        parameters: the model to start from; None: the built-in starts.
        config: the file that the parameters came from.
        learn: which of LEARNABLE and VOLUME_GROUP are learned; the others stay as they start.
        num_folds: parts of the cross-validation; None: 5, or the number of cases where that is smaller.
        loss: one of LOSSES.
        num_optimizer_steps: of each start; None means the built-in number.
        regions: `NAME=1+3+4`, what the comparison reports and the Dice loss weighs; empty: each foreground label.
        device: "auto", "cpu", "cuda" or "cuda:N".
        resume: take the finished folds of a run that was stopped.
    """

    data: DataFolders
    parameters: CrfParameters | None = None
    config: Path | None = None
    learn: tuple[str, ...] = DEFAULT_LEARN
    num_folds: int | None = None
    loss: str = LOSSES[0]
    num_optimizer_steps: int | None = None
    regions: tuple[str, ...] = ()
    device: str = "auto"
    resume: bool = False


@dataclass(frozen=True)
class UnlabeledOptions(CommonOptions):
    """What to choose parameters for without labels (`train-crf --unlabeled`), beside the options of CommonOptions.

    Attributes:
        images: folder of images, or the file of one case; so are the following.
        logits: the network's logits or probabilities.
        masks: None: as the preset's `intensity.mask` says.
        unread: a folder of labels, which are not read.
    """

    images: Path
    logits: Path
    masks: Path | None = None
    unread: Path | None = None


_NAMES = {
    "images": ("images", "imagesTr"),
    "labels": ("labels", "labelsTr"),
    "logits": ("logits",),
    "masks": ("masks",),
}


def locate_folders(folder: Path | None, **named: Path | None) -> DataFolders:
    """Return the folders of images, labels, logits and masks: those in `folder`, unless they are named.

    Raises:
        InputError: one of them does not exist.
    """
    return DataFolders(**locate(folder, ("images", "labels", "logits"), named))


def locate(folder: Path | None, needed: Sequence[str], named: Mapping[str, Path | None], *, takes_files: bool = False) -> dict[str, Path]:
    """Return where images, labels, logits and masks are, by these names: in `folder`, unless they are named.

    With `takes_files`, names may be those of the files of one case.

    Raises:
        InputError: a path does not exist, or one of those that are needed is not found.
    """
    found: dict[str, Path] = {}
    if folder is not None and not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one that holds {', '.join(f'{what}/' for what in needed)}")
    for what, names in _NAMES.items():
        path = named.get(what)
        if path is None and folder is not None:
            path = next((folder / name for name in names if (folder / name).is_dir()), None)
        elif path is not None and not (path.is_dir() or (takes_files and path.exists())):
            raise InputError(f"{path}: no such folder; --{what} names the folder of {what}")
        if path is not None:
            found[what] = path
    if missing := [what for what in needed if what not in found]:
        options = " and ".join(f"--{what}" for what in missing)
        advice = f"name {options} too, or the folder that holds all"
        if folder is not None:
            advice = f"expected {' and '.join(f'{folder / what}/' for what in missing)}; or name them with {options}"
        raise InputError(f"{folder or 'the data'}: no folder of {' and '.join(missing)}: {advice}")
    return found


def locate_nnunet(folder: Path, *, images: Path | None = None, labels: Path | None = None, masks: Path | None = None) -> DataFolders:
    """Return where nnU-Net has images, labels and probabilities of a trained network, unless they are named.

    `folder` is `nnUNet_results/DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION`.

    Raises:
        InputError: it is not such a folder, or images or labels are not found.
    """
    network = require_trained(folder)
    if masks is not None and not masks.is_dir():
        raise InputError(f"{masks}: no such folder; --masks names the folder of masks")
    found_images = locate_images(network, images)
    return DataFolders(found_images, locate_labels(network, found_images, labels), network.folder, masks, network.folder)


def check_options(options: TrainingOptions) -> None:
    """Raise ConfigError or InputError for invalid options, before anything is read."""
    known = (*LEARNABLE, VOLUME_GROUP)
    unknown = [name for name in options.learn if name not in known]
    if unknown or not options.learn:
        given = listed(options.learn) or "nothing"
        raise ConfigError(f"--learn: expected some of {', '.join(known)}, separated by commas; got {given}")
    check_outputs(options)


def check_outputs(options: CommonOptions) -> None:
    """Raise InputError for files that cannot be written."""
    from crfrefine.io.atomic import check_small_output

    if options.output.suffix != ".toml" or options.output.is_dir():
        raise InputError(f"{options.output}: name a file for the parameters, ending in .toml")
    for path in options.files:
        check_small_output(path)
