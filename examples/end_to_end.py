"""Train a small 3-D U-Net with the dense CRF as its last layer, end to end, on made-up volumes.

It takes a minute on two cores.

    pip install '.[train]'
    python examples/end_to_end.py [--cases 6] [--epochs 12] [--autocast [float16]]
        [--checkpoint training.pt] [--output trained.toml]

The recipe, to copy from: train the network; freeze it and train the CRF behind it with a larger
learning rate; thaw it and train both with a smaller one. Five mean-field steps in training, up to
ten afterwards. What the CRF learned is saved as a parameter file, so that `crfrefine infer -c
trained.toml` refines the network's logits later, without PyTorch.

Any network that returns logits (B, L, *grid) can take the U-Net's place, and any iterable of
batches that of the list of volumes: `end_to_end_monai.py` does it with MONAI.
"""

from __future__ import annotations

import argparse
import math
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crfrefine import CrfParameters, CrfRnn, refine
from crfrefine.errors import InputError

SPACING = (1.0, 1.0, 1.6)  # mm
GRID = (40, 44, 28)
NUM_LABELS = 3
NUM_MODALITIES = 2
TRAINING_ITERATIONS = 5
INFERENCE_ITERATIONS = 10
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
START = CrfParameters().replace(
    **{
        "bilateral.weight": 2.0,
        "bilateral.theta_alpha": 2.0,
        "bilateral.theta_beta": 0.2,
        "mean_field.num_iterations": TRAINING_ITERATIONS,
    }
)

Batch = dict[str, Any]
"""image (B, M, *grid), label (B, 1, *grid) and the name of each volume."""


@dataclass(frozen=True)
class Phase:
    """A part of the training: learning rates of network and CRF.

    0 freezes one, and without a CRF rate there is no CRF.
    """

    name: str
    network_rate: float
    crf_rate: float


PHASES = (
    Phase("the network alone", 3e-3, 0.0),
    Phase("the CRF behind the frozen network", 0.0, 3e-2),
    Phase("both, end to end", 1e-3, 1e-2),
)


def make_volume(seed: int) -> Batch:
    """An image (1, 2, *GRID) with noise, and its labels (1, 1, *GRID).

    Background, a body, and a smaller one inside it.
    """
    generator = torch.Generator().manual_seed(seed)
    axes = [(torch.arange(n) - (n - 1) / 2) * step for n, step in zip(GRID, SPACING, strict=True)]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    center = 6.0 * (torch.rand(3, 1, 1, 1, generator=generator) - 0.5)
    radii = 9.0 + 6.0 * torch.rand(3, 1, 1, 1, generator=generator)
    bumps = 0.15 * torch.sin(
        position / 2.5 + 6.0 * torch.rand(3, 1, 1, 1, generator=generator)
    ).sum(0)
    distance = ((position - center) / radii).square().sum(0).sqrt() + bumps
    labels = (distance < 1.0).long() + (distance < 0.5).long()
    contrast = torch.tensor([[0.2, 0.55, 0.8], [0.5, 0.2, 0.35]])
    image = contrast[:, labels] + 0.08 * torch.randn((NUM_MODALITIES, *GRID), generator=generator)
    return {"image": 1000.0 * image[None], "label": labels[None, None], "name": [f"volume {seed}"]}


class Block(nn.Sequential):
    """Two convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [
                nn.Conv3d(channels, outputs, 3, padding=1),
                nn.InstanceNorm3d(outputs, affine=True),
                nn.LeakyReLU(0.01),
            ]
        super().__init__(*layers)


class SmallUNet(nn.Module):
    """A U-Net of two levels, weak on purpose: it leaves something to refine."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = Block(NUM_MODALITIES, 6)
        self.coarse = Block(6, 12)
        self.up = nn.ConvTranspose3d(12, 6, 2, stride=2)
        self.join = Block(12, 6)
        self.head = nn.Conv3d(6, NUM_LABELS, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, L, *grid) of a raw image (B, M, *grid)."""
        image = (image - image.mean((2, 3, 4), keepdim=True)) / image.std((2, 3, 4), keepdim=True)
        fine = self.fine(image)
        coarse = self.coarse(nn.functional.max_pool3d(fine, 2))
        logits: Tensor = self.head(self.join(torch.cat([fine, self.up(coarse)], dim=1)))
        return logits


class Segmenter(nn.Module):
    """A network with the CRF as its last layer.

    The CRF takes the raw image and normalizes it itself.
    """

    def __init__(self, network: nn.Module, crf: CrfRnn) -> None:
        super().__init__()
        self.network = network
        self.crf = crf
        self.refines = False

    def forward(self, image: Tensor, spacing: Sequence[float]) -> Tensor:
        """Logits (B, L, *grid) of a raw image (B, M, *grid), in float32."""
        logits: Tensor = self.network(image)
        return (self.crf(logits, image, spacing) if self.refines else logits).float()


def check_batch(batch: Batch) -> None:
    """Raise ValueError, naming the volumes.

    Other grids, an image with NaN or infinity, values that are no labels.
    """
    image = batch["image"]
    labels = batch["label"]
    names = ", ".join(batch["name"])
    if image.shape[2:] != labels.shape[2:]:
        found = f"the image is {tuple(image.shape[2:])}, the labels are {tuple(labels.shape[2:])}"
        raise ValueError(
            f"{names}: image and labels are on different grids: {found}; resample one of them"
        )
    if not image.isfinite().all():
        raise ValueError(
            f"{names}: the image holds values that are not finite (NaN or infinity); repair it, or "
            "leave the case out"
        )
    if labels.min() < 0 or labels.max() >= NUM_LABELS:
        raise ValueError(
            f"{names}: the labels go from {labels.min()} to {labels.max()}; expected 0 to "
            f"{NUM_LABELS - 1}"
        )


def prepare(model: Segmenter, phase: Phase) -> torch.optim.Optimizer:
    """Freeze or thaw network and CRF, and return the phase's optimizer.

    No weight decay on the CRF: its bandwidths are logarithms.
    """
    model.refines = phase.crf_rate > 0
    model.zero_grad(
        set_to_none=True
    )  # what the phase before left would count in the norm of the gradient
    model.network.requires_grad_(phase.network_rate > 0)
    model.network.train(
        phase.network_rate > 0
    )  # a frozen network must not go on collecting statistics, nor drop out
    model.crf.requires_grad_(phase.crf_rate > 0)
    groups = [
        {"params": model.network.parameters(), "lr": phase.network_rate, "weight_decay": 1e-3},
        {"params": model.crf.parameters(), "lr": phase.crf_rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["lr"] > 0])


def make_scaler(model: nn.Module, autocast: torch.dtype | None) -> torch.amp.GradScaler:
    """What keeps small gradients of float16 from becoming 0.

    It does nothing for the other types.
    """
    return torch.amp.GradScaler(
        next(model.parameters()).device.type, enabled=autocast == torch.float16
    )


def train_epoch(
    model: Segmenter,
    batches: Iterable[Batch],
    spacing: Sequence[float],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    autocast: torch.dtype | None = None,
) -> float:
    """Take a step per batch and return the mean loss.

    Stop, naming the volumes, if a step is not finite, before it changes anything.

    Under autocast the network computes in bfloat16 or float16, the CRF in float32. Where gradients
    overflow in float16, the scaler leaves the step out and makes them smaller; only gradients that
    it does not scale any more end the training.
    """
    losses = []
    for batch in batches:
        check_batch(batch)
        image = batch["image"]
        labels = batch["label"][:, 0].long()
        optimizer.zero_grad()
        names = ", ".join(batch["name"])
        advice = "go on from the checkpoint with smaller learning rates"
        try:
            with torch.autocast(image.device.type, autocast, enabled=autocast is not None):
                logits = model(image, spacing)
        except InputError as error:  # The layer refuses logits that are not finite.
            raise FloatingPointError(f"{names}: {error}; {advice}") from None
        loss = nn.functional.cross_entropy(logits, labels)
        if loss.isfinite():
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        if not loss.isfinite() or (not norm.isfinite() and scaler.get_scale() <= 1.0):
            raise FloatingPointError(
                f"{names}: its loss is {loss.item()}, the norm of the gradient {norm.item()}; "
                f"{advice}"
            )
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    if not losses:
        raise ValueError(
            "there are no batches; expected an iterable that each epoch can go through, such as a "
            "list or a DataLoader"
        )
    return math.fsum(losses) / len(losses)


def train(
    model: Segmenter,
    batches: Iterable[Batch],
    spacing: Sequence[float],
    epochs: int,
    checkpoint: Path | None,
    *,
    autocast: torch.dtype | None = None,
) -> None:
    """Train in PHASES of some epochs each.

    A checkpoint is written after each epoch, and training goes on from it.

    The result is that of a training that was not interrupted, if all that is random in `batches`
    follows PyTorch's generator.
    """
    scaler = make_scaler(model, autocast)
    saved = None if checkpoint is None else read_checkpoint(checkpoint, epochs)
    if saved is not None:
        model.load_state_dict(saved["model"])
        scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["generator"])
    first, done = (saved["phase"], saved["epoch"]) if saved is not None else (0, 0)
    for number, phase in enumerate(PHASES[first:], start=first):
        print(f"{number + 1}. {phase.name}")
        optimizer = prepare(model, phase)
        if saved is not None and number == first:
            rates = [group["lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved["optimizer"])
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                # of the phase: the checkpoint has those of before someone lowered them
                group["lr"] = rate
        for epoch in range(done if number == first else 0, epochs):
            loss = train_epoch(model, batches, spacing, optimizer, scaler, autocast)
            if epoch % 4 == 3 or epoch == epochs - 1:
                print(f"  epoch {epoch + 1:3d}: loss {loss:.4f}", flush=True)
            if checkpoint is not None:
                content = {
                    "phase": number,
                    "epoch": epoch + 1,
                    "epochs": epochs,
                    "generator": torch.get_rng_state(),
                }
                content |= {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                }
                new = checkpoint.with_suffix(".new")
                torch.save(content, new)
                new.replace(checkpoint)  # a checkpoint is whole, or it is the one before


def read_checkpoint(file: Path, epochs: int) -> dict[str, Any] | None:
    """What `train` wrote, or None.

    Raise ValueError if it cannot be read or is of phases of another length.
    """
    if not file.exists():
        return None
    try:
        saved: dict[str, Any] = torch.load(file, weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file}: cannot be read as a checkpoint ({error}); remove it to train from the "
            "beginning"
        ) from error
    if saved.get("epochs") != epochs:
        raise ValueError(
            f"{file}: from phases of {saved.get('epochs')} epochs, not of {epochs}; take as many, "
            "or remove the file"
        )
    return saved


def learned_parameters(model: Segmenter) -> CrfParameters:
    """What `crfrefine infer` needs of the CRF.

    It may take more steps than training did, and ends as soon as nothing changes.
    """
    return model.crf.to_parameters().replace(
        **{
            "mean_field.num_iterations": INFERENCE_ITERATIONS,
            "mean_field.tolerance": CrfParameters().mean_field.tolerance,
        }
    )


def dice(found: Tensor, labels: Tensor) -> Tensor:
    """Dice of each foreground label."""
    overlaps = [((found == k) & (labels == k)).sum() for k in range(1, NUM_LABELS)]
    sizes = [(found == k).sum() + (labels == k).sum() for k in range(1, NUM_LABELS)]
    return torch.stack(
        [2.0 * overlap / size.clamp(min=1) for overlap, size in zip(overlaps, sizes, strict=True)]
    )


@torch.inference_mode()
def evaluate(
    model: Segmenter, batches: Iterable[Batch], spacing: Sequence[float]
) -> dict[str, list[float]]:
    """Mean Dice of each foreground label.

    Of the network, and of what `infer` makes of its logits.
    """
    model.eval()
    parameters = learned_parameters(model)
    alone = []
    refined = []
    for batch in batches:
        for image, labels, logits in zip(
            batch["image"], batch["label"][:, 0], model.network(batch["image"]), strict=True
        ):
            alone.append(dice(logits.argmax(0), labels))
            result = refine(
                logits.float().numpy(), image.numpy(), spacing=tuple(spacing), parameters=parameters
            )
            refined.append(dice(torch.from_numpy(result.label_map.astype("int64")), labels))
    return {
        "the network's own logits": torch.stack(alone).mean(0).tolist(),
        "refined": torch.stack(refined).mean(0).tolist(),
    }


def main(arguments: Sequence[str] | None = None) -> Segmenter:
    """Train, say what came of it, and save what the CRF learned; return the model."""
    parser = argparse.ArgumentParser(
        description="Train a small 3-D U-Net with the dense CRF as its last layer."
    )
    parser.add_argument("--cases", type=int, default=6, help="volumes to train on")
    parser.add_argument("--epochs", type=int, default=12, help="epochs of each phase")
    parser.add_argument(
        "--autocast",
        nargs="?",
        choices=PRECISIONS,
        const="bfloat16",
        help="mixed precision, of bfloat16 unless named",
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="written after each epoch; the same command goes on from it"
    )
    parser.add_argument("--output", type=Path, help="parameter file to write")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    volumes = [make_volume(seed) for seed in range(options.cases)]
    model = Segmenter(SmallUNet(), CrfRnn(NUM_LABELS, NUM_MODALITIES, 3, START, spatial=True))
    train(
        model,
        volumes,
        SPACING,
        options.epochs,
        options.checkpoint,
        autocast=PRECISIONS.get(options.autocast),
    )
    for name, scores in evaluate(
        model, [make_volume(1000 + seed) for seed in range(3)], SPACING
    ).items():
        print(
            f"{name}: Dice "
            + ", ".join(
                f"label {label}: {score:.3f}" for label, score in enumerate(scores, start=1)
            )
        )
    learned = learned_parameters(model)
    print(learned.to_toml())
    if options.output is not None:
        learned.save(options.output, comment="Trained end to end on generated volumes.")
    return model


if __name__ == "__main__":
    main()
