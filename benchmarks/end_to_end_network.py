"""A small 3-D U-Net, and the network with the CRF as its last layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crfrefine import CrfParameters, CrfRnn

TRAINING_ITERATIONS, INFERENCE_ITERATIONS = 5, 10
"""Mean-field steps, as Monteiro et al. 2018 and Zheng et al. 2015 take them."""
START = CrfParameters().replace(
    **{"bilateral.weight": 1.0, "spatial.weight": 1.0, "mean_field.num_iterations": TRAINING_ITERATIONS, "mean_field.tolerance": 0.0}
)
"""Where the CRF starts: both kernels of the paper, with the bandwidths of the preset `default`, in millimeters."""


class VolumeUNet(nn.Module):
    """Images (B, M, *grid) in, logits (B, L, *grid) out; each axis is a multiple of `strides`.

    Args:
        num_modalities: M.
        num_labels: L.
        width: channels of the finest of three levels.
        pooled: whether each axis is halved from level to level; thick slices are not.
    """

    def __init__(self, num_modalities: int, num_labels: int, width: int, pooled: Sequence[bool]) -> None:
        super().__init__()
        self.pooling = tuple(2 if is_pooled else 1 for is_pooled in pooled)
        widths = (width, 2 * width, 4 * width)
        self.down = nn.ModuleList(_block(inputs, outputs) for inputs, outputs in zip((num_modalities, *widths), widths, strict=False))
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(below, above, self.pooling, stride=self.pooling) for above, below in itertools.pairwise(widths)
        )
        self.join = nn.ModuleList(_block(2 * width, width) for width in widths[:-1])
        self.head = nn.Conv3d(width, num_labels, 1)

    @property
    def strides(self) -> tuple[int, ...]:
        """What each axis of an image is a multiple of."""
        return tuple(step * step for step in self.pooling)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of images."""
        features = image.contiguous(memory_format=torch.channels_last_3d)
        skipped: list[Tensor] = []
        for level, block in enumerate(self.down):
            features = block(nn.functional.max_pool3d(features, self.pooling) if level else features)
            skipped.append(features)
        for level in reversed(range(len(self.up))):
            features = self.join[level](torch.cat([skipped[level], self.up[level](features)], dim=1))
        logits: Tensor = self.head(features)
        return logits


class Segmenter(nn.Module):
    """A network, and the CRF behind it where there is one and `refines` is true."""

    def __init__(self, network: VolumeUNet, crf: CrfRnn | None = None) -> None:
        super().__init__()
        self.network, self.crf, self.refines = network, crf, crf is not None

    def forward(self, seen: Tensor, image: Tensor, spacing: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
        """Logits (B, L, *grid) of what the network sees and what the CRF sees, both (B, M, *grid)."""
        logits: Tensor = self.network(seen)
        return self.crf.refine_normalized(logits, image, spacing) if self.crf is not None and self.refines else logits


def make_crf(num_labels: int, num_modalities: int) -> CrfRnn:
    """Return the CRF as it starts: one weight per kernel, a penalty per pair of labels, everything learned, on one thread."""
    return CrfRnn(num_labels, num_modalities, 3, START, threads=1)


@torch.inference_mode()
def predict(network: VolumeUNet, seen: Tensor) -> Tensor:
    """Return the logits (L, *grid) of a whole volume (M, *grid)."""
    padding: list[int] = []
    for n, stride in zip(seen.shape[:0:-1], network.strides[::-1], strict=True):
        padding += [0, -n % stride]
    logits = network(nn.functional.pad(seen[None], padding, mode="replicate"))[0]
    return logits[(slice(None), *(slice(0, n) for n in seen.shape[1:]))].contiguous()


def _block(num_inputs: int, num_outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in (num_inputs, num_outputs):
        layers += [
            nn.Conv3d(inputs, num_outputs, 3, padding=1, bias=False),
            nn.InstanceNorm3d(num_outputs, affine=True),
            nn.LeakyReLU(0.05),
        ]
    return nn.Sequential(*layers)
