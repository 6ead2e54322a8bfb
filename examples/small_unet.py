"""A small 3-D U-Net in plain PyTorch: some ten thousand weights, for examples that run in a minute on a laptop's processor."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


class SmallUNet(nn.Module):
    """Raw image (B, M, *grid) in, logits (B, L, *grid) out; every axis of the grid must be a multiple of 4."""

    def __init__(self, num_modalities: int, num_labels: int, num_channels: int = 6) -> None:
        super().__init__()
        widths = (num_channels, 2 * num_channels, 4 * num_channels)
        self.down = nn.ModuleList(_block(inputs, outputs) for inputs, outputs in zip((num_modalities, *widths), widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose3d(below, above, 2, stride=2) for above, below in itertools.pairwise(widths))
        self.join = nn.ModuleList(_block(2 * width, width) for width in widths[:-1])
        self.head = nn.Conv3d(num_channels, num_labels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of a raw image."""
        features = (image - image.mean((2, 3, 4), keepdim=True)) / image.std((2, 3, 4), keepdim=True)
        skipped: list[Tensor] = []
        for level, block in enumerate(self.down):
            features = block(nn.functional.max_pool3d(features, 2) if level else features)
            skipped.append(features)
        for level in reversed(range(len(self.up))):
            features = self.join[level](torch.cat([skipped[level], self.up[level](features)], dim=1))
        logits: Tensor = self.head(features)
        return logits


def _block(num_inputs: int, num_outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(num_inputs, num_outputs, 3, padding=1, bias=False),
        nn.InstanceNorm3d(num_outputs, affine=True),
        nn.LeakyReLU(0.1),
        nn.Conv3d(num_outputs, num_outputs, 3, padding=1, bias=False),
        nn.InstanceNorm3d(num_outputs, affine=True),
        nn.LeakyReLU(0.1),
    )
