"""What is compared: a network, trained on, with a CRF that learns with it, with a CRF added at the end; measured on held-out cases."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from end_to_end_cases import VolumeCase, as_seen, read_case
from end_to_end_network import INFERENCE_ITERATIONS, TRAINING_ITERATIONS, Segmenter, VolumeUNet, make_crf, predict
from end_to_end_training import Phase, TimeIsUpError, Watch, train
from numpy.typing import NDArray
from study_stages import Stages, listing

from crfrefine import CrfParameters, refine
from crfrefine.cases.case_files import CaseFiles
from crfrefine.io.atomic import atomic_files
from crfrefine.io.json import without_nonfinite
from crfrefine.metrics.calibration import measure_calibration
from crfrefine.metrics.overlap import measure_case
from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.statistics.comparison import Measurement, measurements_of

NETWORK, LONGER, END_TO_END, ADDED = "network", "network trained on", "end to end", "CRF added at the end"
FEWER, ADDED_FEWER = (f"{name}, {TRAINING_ITERATIONS} steps" for name in (END_TO_END, ADDED))
OWN, ADDED_OWN = f"{END_TO_END}, the network's own logits", f"{ADDED}, the network's own logits"
METRICS = ("dice", "surface_dice")
CERTAINTY = "certainty"
"""Mean of the highest probability over the voxels of all structures; in the region ALL_LABELS, as is the negative log-likelihood."""
LEAST_TOLERANCE_MM = 1.0
"""Of the surface Dice; a voxel, if voxels are larger."""
RESULT, PARAMETERS = "result.json", "params.toml"


@dataclass(frozen=True)
class Setup:
    """How a data set's network and CRF are trained.

    Attributes:
        sides: of a patch, in voxels.
        shrink: voxels of the file along each side of a voxel here.
        num_steps: of the network alone, to begin with.
        num_further_steps: after that, of the network trained on, and of the CRF in the other arms.
        num_crf_steps: those of them, the first ones, in which the network is frozen while it learns end to end.
        width: channels of the network's finest level.
        rate: largest learning rate of the network alone.
        further_rate: of the network in the further steps.
        crf_rate: of the CRF alone, times the step lengths of train-crf.
        joint_crf_rate: of the CRF while the network learns, too.
    """

    sides: tuple[int, int, int]
    shrink: int = 1
    num_steps: int = 400
    num_further_steps: int = 200
    num_crf_steps: int = 40
    width: int = 8
    rate: float = 4e-3
    further_rate: float = 1e-3
    crf_rate: float = 0.3
    joint_crf_rate: float = 0.1

    @property
    def num_joint_steps(self) -> int:
        """Further steps in which the network learns, with the CRF or before it is added."""
        return self.num_further_steps - self.num_crf_steps


@dataclass(frozen=True)
class Unit:
    """A network's training cases in a fold, and everything that is made from them.

    Attributes:
        name: for messages, such as "hippocampus, 8 cases, fold 1".
        folder: gets a folder per stage.
        seen: the cases to train on.
        held_out: the cases to measure on.
        label_names: of all labels, background first.
        setup: how.
        seed: of weights and patches.
    """

    name: str
    folder: Path
    seen: tuple[CaseFiles, ...]
    held_out: tuple[CaseFiles, ...]
    label_names: tuple[str, ...]
    setup: Setup
    seed: int


def run_unit(unit: Unit, watch: Watch) -> None:
    """Train and measure each arm that is not there yet.

    Raises:
        TimeIsUpError: the time is up; what is done is kept.
        CrfRefineError: a case cannot be used, or a step was not finite.
    """
    torch.set_num_threads(1)  # The sums of several threads are in another order, and so are the roundings.
    setup, data = unit.setup, unit.seen[0].images[0].parent.parent
    stages = Stages(unit.folder, unit.name)
    names = [case.case_id for case in (*unit.seen, *unit.held_out)]
    inputs = [
        setup.sides,
        setup.shrink,
        setup.width,
        unit.seed,
        len(unit.seen),
        *names,
        *listing(data / "images"),
        *listing(data / "labels"),
    ]
    alone = [Phase("network", setup.num_steps, setup.rate)]
    further = [Phase("network trained on", setup.num_further_steps, setup.further_rate)]
    joint, crf_rate = setup.num_joint_steps, setup.crf_rate
    end_to_end = [Phase("CRF", setup.num_crf_steps, 0.0, crf_rate), Phase("both", joint, setup.further_rate, setup.joint_crf_rate)]
    # As many steps of the network, and as many of the CRF, as end to end: one after the other, in about the same time.
    added = [Phase("network", joint, setup.further_rate), Phase("CRF", setup.num_further_steps, 0.0, crf_rate)]
    for stage, phases, own, refined, fewer in (
        ("network", alone, NETWORK, None, None),
        ("longer", further, LONGER, None, None),
        ("end_to_end", end_to_end, OWN, END_TO_END, FEWER),
        ("added", added, ADDED_OWN, ADDED, ADDED_FEWER),
    ):
        work = partial(_train_and_measure, unit, phases, (own, refined, fewer), watch)
        stages.run(stage, [*(inputs if stage == "network" else []), *map(asdict, phases)], work)


def _train_and_measure(
    unit: Unit, phases: Sequence[Phase], methods: tuple[str, str | None, str | None], watch: Watch, folder: Path
) -> None:
    """Train an arm from where the network alone ended, and write its weights, its parameters and its measurements."""
    if watch.is_over():
        raise TimeIsUpError("the time is up before this training; the same command goes on with it")
    own, refined, fewer = methods
    num_labels = len(unit.label_names)
    cases = [read_case(files, unit.setup.shrink, num_labels) for files in unit.seen]
    segmenter = _make(unit, cases[0], with_crf=refined is not None)
    if own != NETWORK:
        state = torch.load(folder.parent / "network" / "model.pt", weights_only=True)
        segmenter.network.load_state_dict({name.removeprefix("network."): value for name, value in state.items()})
    seed = unit.seed + (own != NETWORK)
    seconds = train(segmenter, cases, phases, unit.setup.sides, seed, folder / "checkpoint.pt", watch)
    with atomic_files(folder / "model.pt") as (stream,):
        torch.save(segmenter.state_dict(), stream)
    learned = None
    if segmenter.crf is not None:
        learned = segmenter.crf.to_parameters()
        learned.save(folder / PARAMETERS, comment=f"{refined}: {unit.name}.")
    found: list[Measurement] = []
    for files in unit.held_out:
        case = read_case(files, unit.setup.shrink, num_labels)
        logits = predict(segmenter.network, as_seen(torch.from_numpy(case.image))).numpy()
        found += _measured(unit, case, logits, None, own)
        for method, iterations in ((refined, INFERENCE_ITERATIONS), (fewer, TRAINING_ITERATIONS)):
            if method is not None and learned is not None:
                found += _measured(unit, case, logits, learned.replace(**{"mean_field.num_iterations": iterations}), method)
    result = {"processor_seconds": round(seconds, 1), "measurements": [asdict(one) for one in found]}
    with atomic_files(folder / RESULT) as (stream,):
        stream.write(json.dumps(without_nonfinite(result), indent=1).encode())
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    dice = {name: np.nanmean([one.value for one in found if one.method == name and one.metric == "dice"]) for name in methods if name}
    watch.tell(", ".join(f"{method} {mean:.4f}" for method, mean in dice.items()))


def _make(unit: Unit, case: VolumeCase, *, with_crf: bool) -> Segmenter:
    torch.manual_seed(unit.seed)
    num_labels, num_modalities = len(unit.label_names), len(case.image)
    pooled = [step < 2.0 * min(case.spacing) for step in case.spacing]
    network = VolumeUNet(num_modalities, num_labels, unit.setup.width, pooled).to(memory_format=torch.channels_last_3d)
    return Segmenter(network, make_crf(num_labels, num_modalities) if with_crf else None)


def _measured(
    unit: Unit, case: VolumeCase, logits: NDArray[np.float32], parameters: CrfParameters | None, method: str
) -> list[Measurement]:
    """Return the metrics of a held-out case: of each structure, and of the probabilities in the region ALL_LABELS."""
    label_map, scores = logits.argmax(0), logits
    if parameters is not None:
        result = refine(logits, case.raw, spacing=case.spacing, parameters=parameters, threads=1)
        label_map, scores = result.label_map, result.logits
    regions = {name: (label,) for label, name in enumerate(unit.label_names) if label}
    tolerance = max(LEAST_TOLERANCE_MM, min(case.spacing))
    found = measure_case(label_map, case.labels, regions, case.spacing, tolerance_mm=tolerance, metrics=METRICS)
    probabilities = torch.from_numpy(scores).softmax(0).numpy()
    likelihood = measure_calibration(probabilities, case.labels, {})[ALL_LABELS]["nll"]
    certainty = float(probabilities.max(axis=0)[case.labels > 0].mean())
    return measurements_of(case.case_id, method, {**found, ALL_LABELS: {"nll": likelihood, CERTAINTY: certainty}})
