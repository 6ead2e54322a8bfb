"""The recipe: train a small U-Net, freeze it, train the CRF behind it for an epoch, then train both. A minute on one core.

    python examples/unet_then_crf.py [--output DIR] [--quick] [--seed N] [--epochs N] [--wrong-labels]

Everything is generated: noisy volumes of two modalities with a body in a body, and small things around that look like them. On volumes
that nothing was trained on: mean Dice, and the number of islands, for the network; its largest component; the CRF behind the frozen
network; both trained end to end; and, as a check, the network alone trained for as many further epochs as end to end.

It shows how it is done and that gradients pass through the CRF into the network. It does not show what a CRF is worth: the network is small
and trained briefly, and intensities tell the labels apart better than in most real images. With --wrong-labels it is trained, and so is the
CRF, on displaced and blurred labels with holes and islands, as hasty annotators make them: see what the CRF can then still learn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import figures
import numpy as np
import torch
from generated import NUM_LABELS, FloatArray, LabelMap, distorted_logits, make_volume
from reporting import Scores, mean_scores, measure, parser, print_table, values_of
from small_unet import SmallUNet
from torch import Tensor, nn

from crfrefine import CrfParameters, CrfRnn, refine

SPACING = (1.0, 1.2, 2.0)  # mm
NUM_MODALITIES = 2
START = CrfParameters().replace(
    **{
        "bilateral.weight": 1.0,
        "bilateral.theta_alpha": 3.0,
        "bilateral.theta_beta": 0.15,
        "spatial.weight": 1.0,
        "spatial.theta_gamma": 1.5,
    }
)
# No CRF at all, only what comes after it.
LARGEST_COMPONENT = CrfParameters().replace(**{"bilateral.weight": 0.0, "postprocess.keep_largest": "foreground"})
NETWORK, LARGEST, FROZEN, END_TO_END = "network", "network + largest component", "frozen network + CRF", "network + CRF, end to end"
LONGER = "network trained on, no CRF"

Segmenter = Callable[[Tensor], Tensor]
Volume = tuple[FloatArray, LabelMap]


@dataclass(frozen=True)
class Outcome:
    """Results.

    Attributes:
        scores: the table, means over held-out volumes.
        dice: of each held-out volume.
        learned: the CRF's parameters at the end.
        volume: the held-out volume that the network got most wrong.
        label_maps: of this volume.
    """

    scores: dict[str, Scores]
    dice: dict[str, list[float]]
    learned: CrfParameters
    volume: Volume
    label_maps: dict[str, LabelMap]


def make_volumes(first_seed: int, count: int, *, quick: bool, wrong_labels: bool = False) -> list[Volume]:
    """Images and labels; wrong ones if asked for."""
    grid_shape = (28, 24, 16) if quick else (40, 36, 24)
    volumes = []
    for seed in range(first_seed, first_seed + count):
        image, labels = make_volume(seed, grid_shape, SPACING, num_distractors=12, noise=1.8)
        if wrong_labels:
            labels = distorted_logits(seed, labels, SPACING, error_mm=2.5, num_blobs=4).argmax(0).astype(np.uint8)
        volumes.append((image, labels))
    return volumes


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy plus one minus the soft Dice of labels 1 and 2."""
    marginals = logits.softmax(1)
    truth = nn.functional.one_hot(labels, NUM_LABELS).movedim(-1, 1).to(logits.dtype)
    overlap, size = (marginals * truth).sum((2, 3, 4)), (marginals + truth).sum((2, 3, 4))
    dice = (2 * overlap + 1) / (size + 1)
    return nn.functional.cross_entropy(logits, labels) + 1 - dice[:, 1:].mean()


def train(segmenter: Segmenter, volumes: list[Volume], rates: dict[nn.Module, float], num_epochs: int, name: str) -> None:
    """Train with Adam, one volume per step, in random order."""
    optimizer = torch.optim.Adam([{"params": list(module.parameters()), "lr": rate} for module, rate in rates.items()])
    for epoch in range(num_epochs):
        losses = []
        for index in torch.randperm(len(volumes)).tolist():
            image, labels = (torch.from_numpy(values)[None] for values in volumes[index])
            optimizer.zero_grad()
            loss = loss_of(segmenter(image), labels.long())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"  {name}, epoch {epoch + 1} of {num_epochs}: loss {sum(losses) / len(losses):.3f}", flush=True)


def predict(segmenter: Segmenter, volumes: list[Volume]) -> list[FloatArray]:
    """Logits (L, *grid) of each volume."""
    with torch.no_grad():
        return [segmenter(torch.from_numpy(image)[None])[0].numpy() for image, _ in volumes]


def run(seed: int = 0, *, quick: bool = False, num_epochs: int = 10, wrong_labels: bool = False) -> Outcome:
    """Make volumes, train in three phases, measure on held-out volumes after each."""
    torch.manual_seed(seed)
    volumes = make_volumes(10_000 * seed, 6 if quick else 12, quick=quick, wrong_labels=wrong_labels)
    held_out = make_volumes(10_000 * seed + 5_000, 4 if quick else 10, quick=quick)
    further_epochs = 1 if quick else 2
    label_maps: dict[str, list[LabelMap]] = {}

    def keep(name: str, logits: list[FloatArray]) -> None:
        label_maps[name] = [values.argmax(0).astype(np.uint8) for values in logits]

    network = SmallUNet(NUM_MODALITIES, NUM_LABELS)
    train(network, volumes, {network: 5e-3}, num_epochs, NETWORK)
    logits = predict(network, held_out)
    keep(NETWORK, logits)
    label_maps[LARGEST] = [
        refine(values, image, spacing=SPACING, parameters=LARGEST_COMPONENT, allow_vanishing=True).label_map
        for values, (image, _) in zip(logits, held_out, strict=True)
    ]
    alone = copy.deepcopy(network)

    crf = CrfRnn(NUM_LABELS, NUM_MODALITIES, 3, START)

    def refined(image: Tensor) -> Tensor:
        logits: Tensor = crf(network(image), image, SPACING)
        return logits

    network.requires_grad_(False)
    train(refined, volumes, {crf: 0.1}, 1, FROZEN)
    keep(FROZEN, predict(refined, held_out))

    network.requires_grad_(True)
    train(refined, volumes, {network: 5e-4, crf: 0.02}, further_epochs, END_TO_END)
    keep(END_TO_END, predict(refined, held_out))

    train(alone, volumes, {alone: 5e-4}, further_epochs, LONGER)
    keep(LONGER, predict(alone, held_out))

    truths = [labels for _, labels in held_out]
    by_volume = {
        name: [measure(found, truth, SPACING, tolerance_mm=1.0) for found, truth in zip(maps, truths, strict=True)]
        for name, maps in label_maps.items()
    }
    worst = int(np.argmin([score.dice for score in by_volume[NETWORK]]))
    return Outcome(
        {name: mean_scores(scores) for name, scores in by_volume.items()},
        {name: [score.dice for score in scores] for name, scores in by_volume.items()},
        crf.to_parameters(),
        held_out[worst],
        {name: maps[worst] for name, maps in label_maps.items()},
    )


def draw(outcome: Outcome, path: Path) -> None:
    """A slice with each method's labels, and the numbers of all held-out volumes."""
    figure = figures.new_figure(11.0, 6.0, "Network, CRF, and both end to end: the held-out volume on which the network is worst")
    panels = figure.subplots(2, 4)
    image, truth = outcome.volume
    # The slice with the most wrong voxels.
    wrong = (outcome.label_maps[NETWORK] != truth).sum((0, 1))
    index = int(wrong.argmax())
    modalities = [figures.gray(values[:, :, index]) for values in image]
    for panel, values, title in zip(panels[0], modalities, ("modality 1", "modality 2"), strict=False):
        figures.show(panel, values, SPACING[:2], title)
    shown = {"truth": truth, **{name: outcome.label_maps[name] for name in (NETWORK, LARGEST, FROZEN, END_TO_END)}}
    places = [panels[0, 2], panels[0, 3], panels[1, 0], panels[1, 1], panels[1, 2]]
    for panel, (name, labels) in zip(places, shown.items(), strict=True):
        figures.show(panel, 0.7 * modalities[0], SPACING[:2], name, labels[:, :, index])
    numbers = panels[1, 3]
    for place, name in enumerate(outcome.scores):
        score = outcome.scores[name]
        numbers.plot(outcome.dice[name], [place] * len(outcome.dice[name]), "o", color=figures.COLORS[1], alpha=0.6, markersize=5)
        numbers.plot([score.dice], [place], "|", color=figures.INK, markersize=16, markeredgewidth=2)
        text = f"{name}: {score.dice:.3f}, {score.islands:.1f} islands"
        numbers.text(0.02, place - 0.28, text, transform=numbers.get_yaxis_transform(), color=figures.INK, fontsize=7, va="center")
    numbers.set(ylim=(len(outcome.scores) - 0.5, -0.6), yticks=[])
    figures.style(numbers, "Dice of each volume, and the mean")
    figures.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> Outcome:
    """Run, print, draw; with the command line's arguments, or others."""
    command = parser(__doc__)
    command.add_argument("--epochs", type=int, default=10, help="epochs of the network alone (default: 10)")
    command.add_argument("--wrong-labels", action="store_true", help="train on labels as hasty annotators make them")
    options = command.parse_args(arguments)
    outcome = run(options.seed, quick=options.quick, num_epochs=options.epochs, wrong_labels=options.wrong_labels)
    rows = [[name, f"{s.dice:.3f}", f"{s.boundary:.3f}", f"{s.islands:.1f}"] for name, s in outcome.scores.items()]
    print_table(["volumes held out", "Dice", "boundary within 1 mm", "islands"], rows)
    print("learned: " + ", ".join(f"{name} {value}" for name, value in values_of(outcome.learned).items()))
    draw(outcome, options.output / "experiment_unet.png")
    return outcome


if __name__ == "__main__":
    main()
