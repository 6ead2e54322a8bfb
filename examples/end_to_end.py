"""Train a small 3-D U-Net with the dense CRF behind it, end to end, on volumes that are generated here. One minute on two cores.

    pip install '.[train]'
    python examples/end_to_end.py [--cases 6] [--epochs 12] [--output trained.toml]

Phase 1 trains the network alone, phase 2 the CRF behind the frozen network, phase 3 both together. What the CRF learned is saved as a
parameter file, so that `crfrefine infer -c trained.toml` refines the network's logits later, without PyTorch.

Any network that returns logits (B, L, *grid) can take the U-Net's place; with MONAI:

    from monai.networks.nets import UNet

    network = UNet(spatial_dims=3, in_channels=2, out_channels=3, channels=(16, 32, 64), strides=(2, 2), num_res_units=2)

and the volumes of `make_case` are then the batches of a `monai.data.DataLoader`, whose `batch["image"]` goes to the network and to the CRF.
Give the CRF the spacing of the grid that the network works on, e.g. that of `Spacingd(pixdim=SPACING)`.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from crfrefine import CrfParameters, CrfRnn

SPACING = (1.0, 1.0, 1.6)  # mm
GRID = (40, 44, 28)
NUM_LABELS = 3
NUM_MODALITIES = 2


def make_case(seed: int) -> tuple[Tensor, Tensor]:
    """An image (2, *GRID) with noise, and its labels *GRID: background, a body, and a smaller one inside it."""
    generator = torch.Generator().manual_seed(seed)
    axes = [(torch.arange(n) - (n - 1) / 2) * step for n, step in zip(GRID, SPACING, strict=True)]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    center = 6.0 * (torch.rand(3, 1, 1, 1, generator=generator) - 0.5)
    radii = 9.0 + 6.0 * torch.rand(3, 1, 1, 1, generator=generator)
    bumps = 0.15 * torch.sin(position / 2.5 + 6.0 * torch.rand(3, 1, 1, 1, generator=generator)).sum(0)
    distance = ((position - center) / radii).square().sum(0).sqrt() + bumps
    labels = (distance < 1.0).long() + (distance < 0.5).long()
    contrast = torch.tensor([[0.2, 0.55, 0.8], [0.5, 0.2, 0.35]])
    image = contrast[:, labels] + 0.08 * torch.randn((NUM_MODALITIES, *GRID), generator=generator)
    return 1000.0 * image, labels


class Block(nn.Sequential):
    """Two convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [nn.Conv3d(channels, outputs, 3, padding=1), nn.InstanceNorm3d(outputs, affine=True), nn.LeakyReLU(0.01)]
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
    """Network and CRF; the CRF takes the raw image and normalizes it itself."""

    def __init__(self, crf: CrfRnn | None) -> None:
        super().__init__()
        self.network = SmallUNet()
        self.crf = crf

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, L, *grid) of a raw image (B, M, *grid)."""
        logits: Tensor = self.network(image)
        return logits if self.crf is None else self.crf(logits, image, SPACING)


def dice(logits: Tensor, labels: Tensor) -> Tensor:
    """Dice of each foreground label."""
    found = logits.argmax(1)
    overlaps = [((found == k) & (labels == k)).sum() for k in range(1, NUM_LABELS)]
    sizes = [(found == k).sum() + (labels == k).sum() for k in range(1, NUM_LABELS)]
    return torch.stack([2.0 * overlap / size.clamp(min=1) for overlap, size in zip(overlaps, sizes, strict=True)])


def train(model: Segmenter, cases: list[tuple[Tensor, Tensor]], epochs: int, rate: float) -> None:
    """Adam on everything that requires a gradient; larger steps for the few numbers of the CRF."""
    groups = [{"params": model.network.parameters(), "lr": rate}]
    if model.crf is not None:
        groups.append({"params": model.crf.parameters(), "lr": 10.0 * rate})
    optimizer = torch.optim.Adam(groups)
    for epoch in range(epochs):
        losses = []
        for image, labels in cases:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(image[None]), labels[None])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if epoch % 4 == 3 or epoch == epochs - 1:
            print(f"  epoch {epoch + 1:3d}: loss {sum(losses) / len(losses):.4f}")


def evaluate(model: Segmenter, cases: list[tuple[Tensor, Tensor]]) -> str:
    """Mean Dice of each foreground label, as text."""
    model.eval()
    with torch.no_grad():
        scores = torch.stack([dice(model(image[None]), labels[None]) for image, labels in cases]).mean(0)
    model.train()
    return "Dice " + ", ".join(f"label {label}: {score:.3f}" for label, score in enumerate(scores.tolist(), start=1))


def main() -> None:
    """Run the three phases."""
    parser = argparse.ArgumentParser(description="Train a small 3-D U-Net and the dense CRF behind it on generated volumes.")
    parser.add_argument("--cases", type=int, default=6, help="volumes to train on")
    parser.add_argument("--epochs", type=int, default=12, help="epochs of each phase")
    parser.add_argument("--output", default=None, help="parameter file to write")
    options = parser.parse_args()
    torch.manual_seed(0)
    cases = [make_case(seed) for seed in range(options.cases)]
    held_out = [make_case(1000 + seed) for seed in range(3)]

    model = Segmenter(crf=None)
    print("1. the network alone")
    train(model, cases, options.epochs, rate=3e-3)
    print(" ", evaluate(model, held_out))

    print("2. the CRF behind the frozen network")
    start = CrfParameters().replace(**{"bilateral.weight": 2.0, "bilateral.theta_alpha": 2.0, "bilateral.theta_beta": 0.2})
    model.crf = CrfRnn(NUM_LABELS, NUM_MODALITIES, 3, start, spatial=True)
    model.network.requires_grad_(False)
    train(model, cases, options.epochs, rate=3e-3)
    print(" ", evaluate(model, held_out))

    print("3. both, end to end")
    model.network.requires_grad_(True)
    train(model, cases, options.epochs, rate=1e-3)
    print(" ", evaluate(model, held_out))

    learned = model.crf.to_parameters()
    print(learned.to_toml())
    if options.output:
        learned.save(options.output, comment="Trained end to end on generated volumes.")


if __name__ == "__main__":
    main()
