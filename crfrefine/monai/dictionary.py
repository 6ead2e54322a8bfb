"""`CrfRefined`: the transform on dictionaries."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.transforms import MapTransform
from monai.utils import ensure_tuple_rep
from numpy.typing import ArrayLike

from crfrefine.arrays.probabilities import InputType
from crfrefine.arrays.region_scheme import GivenRegions
from crfrefine.monai.array import CrfRefine, Output
from crfrefine.parameters.model import CrfParameters


class CrfRefined(MapTransform):
    """Refine logits in a dictionary by the image in it; the result replaces them under their key.

    The rest of the dictionary is left as it is.

    Args:
        keys: of the logits.
        image_key: of the image; one for all, or one per key of `keys`.
        parameters: as in `CrfRefine`.
        mask_key: of the mask; None: everywhere.
        device: as in `CrfRefine`.
        allow_missing_keys: whether keys of logits may be missing. An image or a mask may not be missing where there are logits.
        output: as in `CrfRefine`.
        input_type: as in `CrfRefine`.
        network_spacing: as in `CrfRefine`.
        regions: as in `CrfRefine`.
        spacing: as in `CrfRefine`.
        threads: as in `CrfRefine`.
        allow_vanishing: as in `CrfRefine`.

    Raises:
        ConfigError: an argument cannot be used.

    Examples:
        >>> network_behind = [CrfRefined("pred"), Invertd("pred", before, orig_keys="image"), SaveImaged("pred")]  # doctest: +SKIP
    """

    backend = CrfRefine.backend

    def __init__(
        self,
        keys: Hashable | Sequence[Hashable],
        image_key: Hashable | Sequence[Hashable] = "image",
        parameters: CrfParameters | str | Path | Mapping[str, Any] | None = None,
        mask_key: Hashable | Sequence[Hashable] | None = None,
        device: str | None = None,
        allow_missing_keys: bool = False,
        *,
        output: Output | None = None,
        input_type: InputType = "auto",
        network_spacing: ArrayLike | str | None = None,
        regions: GivenRegions | None = None,
        spacing: ArrayLike | None = None,
        threads: int | None = None,
        allow_vanishing: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_keys = ensure_tuple_rep(image_key, len(self.keys))
        self.mask_keys = ensure_tuple_rep(mask_key, len(self.keys))
        self.refine = CrfRefine(
            parameters,
            output=output,
            input_type=input_type,
            network_spacing=network_spacing,
            regions=regions,
            spacing=spacing,
            device=device,
            threads=threads,
            allow_vanishing=allow_vanishing,
        )

    @property
    def parameters(self) -> CrfParameters:
        """The model."""
        return self.refine.parameters

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of the dictionary in which the logits are refined.

        Raises:
            KeyError: logits are missing, unless they may be; or the image or mask of logits.
            CrfRefineError: as in `CrfRefine`.
        """
        found = dict(data)
        for key, image_key, mask_key in self.key_iterator(found, self.image_keys, self.mask_keys):
            for other in (image_key, mask_key):
                if other is not None and other not in found:
                    raise KeyError(
                        f"Key `{other}` of transform `{type(self).__name__}` was missing in the data, which has logits in `{key}`."
                    )
            # From `data`: of several keys, none sees what another one has become.
            found[key] = self.refine(data[key], data[image_key], None if mask_key is None else data[mask_key])
        return found
