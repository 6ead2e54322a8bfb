"""A batch item that is refined many times, as a crop in a training.

The common work of its calls is done once: on a GPU the host does not wait for it again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from crfrefine.base.array_types import Bool, Float64
from crfrefine.engines.base import GridImage, Kernels, RunContext
from crfrefine.layer import inputs
from crfrefine.layer.autograd import MeanField, to_array
from crfrefine.layer.crf_model import CrfModel, SomeLabels
from crfrefine.layer.taking_part import labels_taking_part, with_absent_labels

# Bytes of each place of the grid that an engine keeps on a GPU, at most, beside the image: numbers
# and coordinates of voxels.
_KEPT_BY_ENGINE = 40


class KnownItem:
    """An image, its mask and the leads of its logits, which all stay from call to call.

    The image is on the scale of theta_beta, finite, and float32; the logits are finite.
    """

    def __init__(self, image: Tensor, mask: Bool, leads: Callable[[], Float64]) -> None:
        """Take an image (M, *grid) and a mask (*grid).

        `leads` returns those of the logits (L,), as of `find_leads`, if they are needed.
        """
        self._image = image
        self._mask = mask
        self._inside = torch.from_numpy(mask).to(image.device)
        self._leads = leads
        self._kept: dict[Hashable, Any] = {}  # by engines
        self._some_labels: dict[bytes, SomeLabels | None] = {}

    @property
    def num_bytes(self) -> int:
        """The bytes that the item takes on a GPU, at most, without kernels of a model."""
        return self._image.nbytes + self._inside.numel() * (1 + _KEPT_BY_ENGINE)

    def kernels(self, model: CrfModel, spacing: Sequence[float], threads: int) -> Kernels:
        """Build the kernels of a model; the spacing is in the unit of its bandwidths.

        The host waits for the number of a lattice's vertices.
        """
        grid = GridImage(to_array(self._image), self._mask, spacing, kept=self._kept)
        engine = inputs.engine_for(self._image.device)
        return engine.kernels(grid, model.kernels, RunContext(threads))

    def refiner(self, kernels: Kernels, logits: Tensor, model: CrfModel) -> Callable[[], Tensor]:
        """Return the function that refines logits (L, *grid) with kernels of the item.

        The function does what `functional.refine_batch` does; there is no gradient with respect to
        the image. It does not wait for a GPU, except with a volume term.
        """
        present = labels_taking_part(logits, self._inside, model, self._leads)
        case = b"" if present is None else present.tobytes()
        if case not in self._some_labels:
            self._some_labels[case] = SomeLabels.of(present, logits.device)
        labels = self._some_labels[case]
        part = model.among(labels)

        def refine() -> Tensor:
            channels = logits if labels is None else logits[labels.on_device]
            tensors = (channels, logits.new_empty(0), *part.tensors)  # There is no image.
            runs = [(kernels, part.run)]
            refined = MeanField.apply(runs, 1, *tensors)  # type: ignore[no-untyped-call]
            return with_absent_labels(refined[0], logits, model, labels, self._inside)

        return refine
