"""The folds of a trained network: the cases that each has validated, and the missing files, with the command that makes them.

A case's probabilities count only from the fold that held the case out: its network has not seen the case.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from crfrefine.base.text import listed
from crfrefine.cases.discovery import list_files
from crfrefine.cases.nnunet.datasets import Split
from crfrefine.cases.nnunet.layout import TrainedNetwork
from crfrefine.errors import InputError
from crfrefine.io.paths import SCORES_SUFFIXES, VOLUME_SUFFIXES, stem_of

ALL = "all"
"""The fold whose network is trained on all cases."""

DEFAULT_NUM_FOLDS = 5


@dataclass(frozen=True)
class Fold:
    """A fold of a trained network."""

    name: str  # "0", "1", ...
    archives: dict[str, Path]  # of the validated cases with probabilities
    predicted: frozenset[str]  # cases that the validation has a label map of
    is_trained: bool
    is_started: bool

    @property
    def lacks_probabilities(self) -> bool:
        """Whether a validated case has no probabilities, as after a validation without `--npz`."""
        return bool(self.predicted - self.archives.keys())


@dataclass(frozen=True)
class Folds:
    """The folds of a trained network, and which case each has held out."""

    network: TrainedNetwork
    folds: dict[str, Fold]
    expected: tuple[str, ...]  # names of those that there should be
    fold_of: dict[str, str]  # the fold that held each case out, where it is known
    twice: dict[str, str]  # cases that several folds have validated, with the fold that is used
    seen: frozenset[str]  # cases whose only probabilities are of networks that were trained on them

    def archive(self, case_id: str) -> Path | None:
        """Return the probabilities of a case by the network that has not seen it; None without any."""
        fold = self.folds.get(self.fold_of.get(case_id, ""))
        return None if fold is None else fold.archives.get(case_id)

    def reason(self, case_id: str) -> str:
        """Return why a case has no probabilities, for a list of missing files."""
        name = self.fold_of.get(case_id)
        if case_id in self.seen:
            return "validated by a fold that was trained on it, by splits_final.json"
        if name is None:
            there = f"fold{'' if len(self.folds) == 1 else 's'} {listed(list(self.folds), DEFAULT_NUM_FOLDS)}"
            return f"not validated by {there}" if self.folds else "no fold is trained"
        fold = self.folds.get(name)
        if fold is None or not fold.is_trained:
            return f"fold {name} is not trained"
        if case_id in fold.predicted:
            return f"no probabilities in fold_{name}/validation"
        return f"not validated by fold {name}"

    def advice(self, without: Iterable[str]) -> list[str]:
        """Return one sentence per fold that lacks something, with the command that makes it, for cases without probabilities."""
        names = {self.fold_of.get(case_id) for case_id in without if case_id not in self.seen}
        asked = [name for name in self.expected if name in names or (None in names and name not in self.folds)]
        sentences = []
        for name in asked:
            fold = self.folds.get(name)
            if fold is None or not fold.is_started:
                sentences.append(f"fold {name} is not trained: {self.network.training_command(name, '--npz')}")
            elif not fold.is_trained:
                sentences.append(f"fold {name} is not trained to its end: {self.network.training_command(name, '--npz', '--c')}")
            else:
                what = "was validated without --npz" if fold.lacks_probabilities else "is not validated to its end"
                sentences.append(f"fold {name} {what}: {self.network.training_command(name, '--val', '--npz')}")
        return sentences


def find_folds(network: TrainedNetwork, splits: Sequence[Split]) -> Folds:
    """Look for the validated cases of every fold; `splits` are the cases of each fold, if they are known."""
    folders = network.fold_folders()
    if list(folders) == [ALL]:
        raise InputError(
            f"{folders[ALL]}: this network was trained on all cases, also on those of its validation: it is far too sure of them\n"
            f"  Train folds that hold cases out, for all of the folds 0 to 4: {network.training_command('0', '--npz')}"
        )
    folds = {name: _read_fold(name, folder) for name, folder in folders.items() if name != ALL}
    by_splits = {case_id: str(number) for number, split in enumerate(splits) for case_id in split.held_out - split.training}
    trained_on = {str(number): split.training for number, split in enumerate(splits)}
    found: dict[str, list[str]] = {}
    for fold in folds.values():
        for case_id in fold.predicted | fold.archives.keys():
            found.setdefault(case_id, []).append(fold.name)
    fold_of, twice, seen = dict(by_splits), {}, set()
    for case_id, names in found.items():
        unseen = [name for name in names if case_id not in trained_on.get(name, ())]
        planned = by_splits.get(case_id)
        if unseen:
            fold_of[case_id] = planned if planned in unseen else unseen[0]
        elif planned is None:
            seen.add(case_id)
        if len(unseen) > 1:
            twice[case_id] = fold_of[case_id]
    num_folds = len(splits) or max([DEFAULT_NUM_FOLDS, *(int(name) + 1 for name in folds)])
    expected = dict.fromkeys([*map(str, range(num_folds)), *folds])
    return Folds(network, folds, tuple(expected), fold_of, twice, frozenset(seen))


def _read_fold(name: str, folder: Path) -> Fold:
    validation = folder / "validation"
    archives = {stem_of(path): path for path in list_files(validation, SCORES_SUFFIXES)} if validation.is_dir() else {}
    predicted = frozenset(stem_of(path) for path in list_files(validation, VOLUME_SUFFIXES)) if validation.is_dir() else frozenset()
    checkpoints = {path.name for path in folder.glob("checkpoint_*.pth")}
    # Without its checkpoints, which are large, a copy of the folder still has the validation of a finished training.
    is_trained = "checkpoint_final.pth" in checkpoints or bool(predicted or archives)
    return Fold(name, archives, predicted, is_trained, is_started=is_trained or bool(checkpoints))
