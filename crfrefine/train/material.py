"""The material that all parts of a run share: plan, cases, threads and device.

It also draws the cases of each optimizer step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from crfrefine.arrays.region_scheme import probabilities_of
from crfrefine.base.array_types import Array
from crfrefine.base.limits import available_threads
from crfrefine.base.notes import Note, NoteKind
from crfrefine.engines import get_backend, is_available
from crfrefine.errors import BackendUnavailableError
from crfrefine.layer.known_item import KnownItem
from crfrefine.parameters.sections import PostprocessParameters
from crfrefine.train.choice import Candidate, Scores
from crfrefine.train.crops import Crop
from crfrefine.train.guided import Guidance
from crfrefine.train.plan import TrainingPlan
from crfrefine.train.progress import Progress
from crfrefine.train.workers import Workers

# Most voxels of a case for a recalibration: with ten cases, more change only the third digit.
MAX_VOXELS = 65_536
# Most tiles of a crop that models are compared on. On atria of 16 to 32 tiles, eight tell gains of
# 0.2 to 0.6 points with errors of 0.2 to 0.4.
NUM_SAMPLED = 8
# A gradient takes up to 100,000 voxels, for which a GPU mostly waits for its host: an H200 took as
# long as two cores of the Xeon beside it.
FASTER_CORES = 4
KEPT_SHARE = 0.25  # of a GPU's free memory, for crops
# Share of the weights that follows the foreground, not the errors, so that each tile has a chance.
_FOREGROUND_SHARE = 0.1
# The fractional parts of its multiples fill the unit interval evenly, however many there are.
_GOLDEN = 0.6180339887498949


class CropTensors:
    """A crop, or a tile of one, as tensors on a device.

    The backward pass reads them, so they must not be overwritten.
    """

    def __init__(self, crop: Crop, device: str) -> None:
        def moved(array: Array) -> Tensor:
            return torch.from_numpy(array).to(device)

        has_reference = crop.has_reference
        image = moved(np.array(crop.image, dtype=np.float32, order="C"))
        self.logits = moved(np.array(crop.logits, order="C"))  # (L, *box) float16
        self.item = KnownItem(image, np.array(crop.mask), lambda: crop.leads)
        # (N,) in the flat box, of the voxels in the mask that have a reference
        self.places = moved(np.flatnonzero(has_reference))
        self.labels = moved(crop.labels[has_reference].astype(np.int64))  # (N,) their reference

    @property
    def num_bytes(self) -> int:
        """The bytes of the crop on a GPU, at most, without kernels of a model."""
        return self.item.num_bytes + self.logits.nbytes + self.places.nbytes + self.labels.nbytes

    def with_reference(self, channels: Tensor) -> Tensor:
        """Return the voxels of (L, *box) channels that have a reference: (L, N)."""
        return channels.reshape(len(channels), -1).index_select(1, self.places)


class TrainingDevice:
    """A device for training, and the crops that stay on it."""

    def __init__(
        self, name: str = "cpu", tensors: str = "cpu", note: Note | None = None, max_kept: int = 0
    ) -> None:
        """Name the device as the engine and as PyTorch do.

        `note` is one on the choice, `max_kept` the bytes of crops that stay there, at most.
        """
        self.name = name
        self.tensors = tensors
        self.note = note
        self._max_kept = max_kept
        self._kept: dict[int, tuple[Crop, CropTensors]] = {}

    @property
    def is_gpu(self) -> bool:
        """True for a GPU, which a single case at a time keeps busy."""
        return self.tensors.startswith("cuda")

    def crop(self, crop: Crop) -> CropTensors:
        """Return a crop on the device, moved there once if it may stay."""
        kept = self._kept.get(id(crop))
        if kept is not None:
            return kept[1]
        tensors = CropTensors(crop, self.tensors)
        if self._max_kept == 0:
            return tensors
        num_bytes = sum(of_crop.num_bytes for _, of_crop in self._kept.values())
        if num_bytes + tensors.num_bytes <= self._max_kept:
            self._kept[id(crop)] = (crop, tensors)
        return tensors


CPU = TrainingDevice()


def choose_device(requested: str) -> TrainingDevice:
    """Return the engine's device for a request, if PyTorch has it too.

    "auto" is the GPU if it is expected to be faster than the cores that this process may use. The
    number of threads does not matter, since a run may go on with another one. Raise
    BackendUnavailableError for a named device that is missing.
    """
    num_cores = available_threads()
    if requested == "auto" and num_cores >= FASTER_CORES and is_available():
        return TrainingDevice(note=NoteKind.TRAINED_ON_CORES(cores=num_cores))
    engine = get_backend(requested).name
    gpu = re.fullmatch(r"cuda(?::([0-9]+))?", engine)
    if gpu is None:
        return TrainingDevice(engine)
    number = int(gpu[1] or 0)
    if torch.cuda.is_available() and number < torch.cuda.device_count():
        free, _ = torch.cuda.mem_get_info(number)
        return TrainingDevice(engine, f"cuda:{number}", max_kept=int(KEPT_SHARE * free))

    missing = (
        f"this PyTorch ({torch.__version__}) cannot use the GPU {engine}: "
        "install one for CUDA (pytorch.org)"
    )
    if requested == "auto":
        return TrainingDevice(note=NoteKind.TRAINED_WITHOUT_GPU(problem=missing))
    raise BackendUnavailableError(f"--device {requested}: {missing}, or use --device cpu")


class Sample:
    """The data of a case that models are compared on: its crop, or tiles of a large one.

    A model's changes in the tiles are extrapolated to the case.
    """

    def __init__(self, crop: Crop, number: int | None = None) -> None:
        """Draw tiles by the network's expected errors; the number of the case decides which.

        The probability of a tile is mostly its share of the voxels likely to be wrong: in these,
        models change labels and gain. None means all of the crop, which counts exactly.
        """
        self.crop = crop
        self.tiles = [crop]  # views
        self.shares = [1.0]  # weight of each tile in the mean loss; they sum to 1
        self.factors = [1.0]  # how many times the change in each tile counts for the case
        self.is_whole = number is None or len(crop.tiles) <= NUM_SAMPLED
        if number is None or self.is_whole:
            return
        logits = crop.logits.astype(np.float32)
        probabilities = probabilities_of(logits, crop.regions)
        certain = np.float32(1.0)
        if crop.regions is None:
            doubt = certain - probabilities.max(axis=0)
        else:
            doubt = np.minimum(probabilities, certain - probabilities).sum(axis=0)
        doubt *= crop.mask
        doubt_of_tiles = np.array([doubt[tile].sum(dtype=np.float64) for tile in crop.tiles])
        total = float(doubt_of_tiles.sum())
        weights = np.array(crop.tile_weights)
        if total > 0.0:
            by_errors = (1.0 - _FOREGROUND_SHARE) * doubt_of_tiles / total
            weights = _FOREGROUND_SHARE * weights + by_errors

        # Points at equal distances in the cumulated weights draw a tile as often as its weight
        # says.
        points = ((number + 1) * _GOLDEN % 1.0 + np.arange(NUM_SAMPLED)) / NUM_SAMPLED
        places = np.searchsorted(np.cumsum(weights), points)
        drawn = np.minimum(places, len(weights) - 1)
        numbers, times = np.unique(drawn, return_counts=True)
        shares = times / NUM_SAMPLED
        self.tiles = [crop.tile(tile) for tile in numbers.tolist()]
        self.shares = shares.tolist()
        self.factors = (shares / weights[numbers]).tolist()


# A loss takes refined logits (L, N) and reference labels (N,), and returns a number.
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Material:
    """TrainingPlan, data, threads and progress that all parts of a run share."""

    plan: TrainingPlan
    crops: Sequence[Crop]
    loss: Loss
    workers: Workers
    progress: Progress
    device: TrainingDevice = CPU
    digest: str = ""  # of all that the result depends on, as it was when the run began
    starts: Sequence[Candidate] = ()
    # How good the rivals without training are.
    rules: Scores[PostprocessParameters] = field(default_factory=dict)
    guided: Scores[Guidance] = field(default_factory=dict)

    @cached_property
    def samples(self) -> list[Sample]:
        """The data that models are compared on: the crop of each case, or tiles of a large one."""
        return [Sample(crop, number) for number, crop in enumerate(self.crops)]

    @cached_property
    def voxels(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """The data that a recalibration is fitted to: logits (L, N) and labels (N,) of each crop.

        These are all voxels that have a reference, or MAX_VOXELS of them.
        """
        drawn = []
        for crop in self.crops:
            tensors = CropTensors(crop, self.device.tensors)
            logits = tensors.with_reference(tensors.logits)
            labels = tensors.labels
            number = labels.numel()
            if number > MAX_VOXELS:
                chosen = torch.arange(MAX_VOXELS, device=labels.device) * number // MAX_VOXELS
                logits = logits[:, chosen]
                labels = labels[chosen]
            drawn.append((logits.float(), labels))
        return tuple(drawn)

    def batch(self, optimizer_step: int, cases: Sequence[int], count: int) -> list[Crop]:
        """Draw some of the cases at random, and a tile of each.

        All starts get the same tiles at the same step.
        """
        random, drawn = self.draw(optimizer_step, cases, count)
        tiles = []
        for case in drawn:
            crop = self.crops[case]
            number = random.choice(len(crop.tiles), p=crop.tile_weights)
            tiles.append(crop.tile(int(number)))
        return tiles

    def draw(
        self, optimizer_step: int, cases: Sequence[int], count: int
    ) -> tuple[np.random.Generator, list[int]]:
        """Return some cases in order, drawn without repetition, and what draws their tiles.

        They are those whose tiles are in the `batch` of the step.
        """
        random = np.random.default_rng([self.plan.options.seed, optimizer_step])
        drawn = random.permutation(np.asarray(cases))[:count]
        return random, sorted(drawn.tolist())
