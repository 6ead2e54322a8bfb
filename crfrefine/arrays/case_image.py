"""The normalized image of a case, where its mask is, until an engine takes it over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.parameters.modalities import intensity_by_modality

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.arrays.label_maps import Box
    from crfrefine.parameters.sections import IntensityParameters


class CaseImage:
    """An image that is given away once: it is as large as the kernels, which need it only to be built."""

    def __init__(self, values: NDArray[np.float32], box: Box | None = None) -> None:
        """Take a normalized image.

        Args:
            values: (M, *grid), or (M, *box), float32.
            box: the part of the grid that `values` cover; None: all of it.
        """
        self._values: NDArray[np.float32] | None = values
        self._box = box

    @classmethod
    def normalized(
        cls,
        image: NDArray[Any],
        parameters: IntensityParameters,
        mask: NDArray[np.bool_] | None,
        box: Box | None,
        *,
        threads: int | None = None,
    ) -> CaseImage:
        """Return the image of a case in a box; the array that was passed in, whole, if engines can read it as it is.

        Args:
            image: (M, *grid), finite.
            parameters: how to normalize it.
            mask: (*grid), where statistics come from; None: everywhere.
            box: the part of the grid that is needed; None: all of it.
            threads: as in `normalize_intensity`.

        Raises:
            CrfRefineError: as in `normalize_intensity`.
        """
        is_ready = image.dtype == np.float32 and image.flags.c_contiguous
        if is_ready and all(kind == "none" for kind, _, _ in intensity_by_modality(parameters, len(image))):
            box = None
        return cls(normalize_intensity(image, parameters, mask, box=box, threads=threads), box)

    @property
    def is_cropped(self) -> bool:
        """Whether the image covers a box only."""
        return self._box is not None

    def part(self, box: Box) -> NDArray[np.float32]:
        """Return a view of a box of the grid, (M, *box); if the image covers only a box, then that one."""
        assert self._values is not None
        return self._values if self._box is not None else self._values[(slice(None), *box)]

    def take(self) -> NDArray[np.float32]:
        """Return the image, (M, *grid) or (M, *box), and forget it."""
        values, self._values = self._values, None
        assert values is not None
        return values
