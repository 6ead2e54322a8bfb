"""`CrfRefine` and `CrfRefined`: the transform on arrays and tensors, and on dictionaries."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from monai.data import MetaTensor, decollate_batch
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_dst_type, ensure_tuple_rep
from numpy.typing import ArrayLike, NDArray

from crfrefine.arrays.arguments import given_spacing
from crfrefine.arrays.probabilities import INPUT_TYPES, InputType
from crfrefine.arrays.region_scheme import GivenRegions, given_regions
from crfrefine.base.text import shorten_value
from crfrefine.base.threads import check_threads
from crfrefine.errors import ConfigError, CrfRefineError, InputError
from crfrefine.monai.case import case_spacing, check_kind, file_of, is_batch_of, to_numpy
from crfrefine.parameters.model import CrfParameters, as_parameters
from crfrefine.refinement.case import refine

Output = Literal["logits", "probabilities", "labels"]


class CrfRefine(Transform):
    """Refine a network's logits by the image with the dense CRF.

    It is meant for the transforms behind a network, on one case, channels first, or on a batch. Tensors may be on any device and of any
    floating-point type; the result has the device, the type (except for labels) and the metadata of the logits, `applied_operations`
    included, so that `Invertd` works on it. Distances are those of the affine of the image, else of the logits. An object only holds
    settings: threads may share it, and it can be pickled.

    Args:
        parameters: the model, the name of a preset, the path of a TOML file, or nested dictionaries with its keys. None means the
            preset `default`, with `network_spacing` the preset `sharp`.
        output: "logits"; "probabilities", the marginals; or "labels", (1, *grid), uint8 up to 256 labels, else int32: only these have
            `postprocess`, its components, applied. None: "labels" for label maps, else "logits".
        input_type: "auto": logits, and what looks like probabilities is refused; "logits"; "probabilities"; "labels": label maps.
        network_spacing: of label maps, as in `crfrefine.refine`.
        regions: of the channels of a network with sigmoids, in their order: pairs of a name and its labels, a dictionary of these, or a
            RegionScheme. Then logits are log-odds. Writers of YAML sort dictionaries; pairs keep their order.
        spacing: mm, one per axis of the grid or one for all, for tensors without metadata, or to replace that of the metadata. None means
            that of the metadata, without which the transform raises InputError.
        device: where to compute, as in `crfrefine.refine`; None: the CPU, wherever the tensors are.
        threads: CPU threads; None: the cores that this process may use. In the workers of a DataLoader, 1.
        allow_vanishing: as in `crfrefine.refine`, for labels; logits and probabilities have no rules.

    Raises:
        ConfigError: an argument has another value.

    Examples:
        >>> refined = CrfRefine("default", output="labels")(logits, image)  # doctest: +SKIP
    """

    backend = [TransformBackends.TORCH, TransformBackends.NUMPY]  # noqa: RUF012

    def __init__(
        self,
        parameters: CrfParameters | str | Path | Mapping[str, Any] | None = None,
        *,
        output: Output | None = None,
        input_type: InputType = "auto",
        network_spacing: ArrayLike | str | None = None,
        regions: GivenRegions | None = None,
        spacing: ArrayLike | None = None,
        device: str | None = None,
        threads: int | None = None,
        allow_vanishing: bool = False,
    ) -> None:
        super().__init__()
        usual: Output = "labels" if input_type == "labels" else "logits"
        for name, value, known in (("output", output or usual, get_args(Output)), ("input_type", input_type, INPUT_TYPES)):
            if value not in known:
                raise ConfigError(f"{name}: expected one of {', '.join(known)}; got {shorten_value(value)}")
        if input_type == "labels" and output not in (None, "labels"):
            raise ConfigError(f"output: a label map becomes a label map, so with input_type='labels' it is 'labels'; got {output!r}")
        if network_spacing is not None and input_type != "labels":
            raise ConfigError(f"network_spacing: it is that of label maps, input_type='labels'; got input_type={input_type!r}")
        if parameters is None and network_spacing is not None:
            parameters = "sharp"
        self.parameters = CrfParameters.from_dict(parameters) if isinstance(parameters, Mapping) else as_parameters(parameters)
        self.network_spacing = network_spacing
        self.output: Output = output or usual
        self.input_type = input_type
        self.regions = given_regions(regions)
        self.spacing = None if spacing is None else _checked(spacing)
        self.device = device or "cpu"
        check_threads(threads)
        self.threads = threads
        self.allow_vanishing = allow_vanishing

    def __call__(self, logits: Any, image: Any, mask: Any | None = None) -> Any:
        """Return the refined logits, probabilities or labels, as the settings say.

        Args:
            logits: (L, *grid) or a batch (B, L, *grid): MetaTensor, tensor or array. With regions: (R, *grid). Label maps: (1, *grid).
            image: (M, *grid) or (B, M, *grid), on the grid of the logits; intensities as the parameters expect them.
            mask: (1, *grid) or (B, 1, *grid), nonzero where the model applies; None: everywhere.

        Raises:
            GridMismatchError: the grids differ, in shape or in place.
            InputError: the spacing is unknown, or the values cannot be used.
            ConfigError: the parameters do not fit the numbers of labels, modalities or axes.
            CrfRefineError: as in `crfrefine.refine`. The message names the file if the metadata do.
        """
        check_kind(logits, image, mask)
        if is_batch_of(logits, image, self.spacing):
            sizes = [len(value) for value in (logits, image, mask) if value is not None]
            if len(set(sizes)) > 1:
                raise InputError(f"batches of {' and '.join(map(str, sizes))} cases; logits, image and mask must have the same cases")
            masks = [None] * len(logits) if mask is None else _cases(mask)
            cases = zip(_cases(logits), _cases(image), masks, strict=True)
            refined = np.stack([self._refined(*case, number=number) for number, case in enumerate(cases)])
        else:
            refined = self._refined(logits, image, mask)
        return convert_to_dst_type(refined, logits, dtype=refined.dtype if self.output == "labels" else logits.dtype)[0]

    def _refined(self, logits: Any, image: Any, mask: Any | None, number: int | None = None) -> NDArray[Any]:
        """Return the result of one case as an array."""
        try:
            spacing = case_spacing(logits, image, mask, self.spacing)
            given = to_numpy(logits)
            if self.input_type == "labels":
                if len(given) != 1:
                    raise InputError(f"the label map has shape {given.shape}; expected one channel, (1, *grid)")
                given = given[0]
            result = refine(
                given,
                to_numpy(image),
                spacing=spacing,
                parameters=self.parameters,
                mask=None if mask is None else to_numpy(mask).reshape(logits.shape[1:]),  # of one channel
                input_type=self.input_type,
                network_spacing=self.network_spacing,
                regions=self.regions,
                device=self.device,
                threads=self.threads,
                allow_vanishing=self.allow_vanishing or self.output != "labels",
            )
        except CrfRefineError as error:
            place = [f"case {number} of the batch"] if number is not None else []
            name = ", ".join([*place, *([file] if (file := file_of(image, logits)) else [])])
            if not name:
                raise
            raise type(error)(f"{name}: {error}") from error
        if self.output == "labels":
            # PyTorch hardly supports uint16.
            labels: NDArray[Any] = result.label_map[np.newaxis]
            return labels if labels.dtype == np.uint8 else labels.astype(np.int32)
        return result.logits if self.output == "logits" else result.marginals


def _cases(batch: Any) -> list[Any]:
    """Return the cases of a batch, MetaTensors each with its own metadata."""
    return decollate_batch(batch) if isinstance(batch, MetaTensor) else list(batch)


def _checked(spacing: ArrayLike) -> float | tuple[float, ...]:
    """Return the spacing as numbers, one per axis, or one for all."""
    is_one = np.ndim(spacing) == 0
    try:
        steps = given_spacing(spacing, 1 if is_one else len(spacing))  # type: ignore[arg-type]
    except InputError as error:
        raise ConfigError(str(error)) from None
    return steps[0] if is_one else steps


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
        settings: all other arguments of `CrfRefine`, by their names.

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
        **settings: Any,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_keys = ensure_tuple_rep(image_key, len(self.keys))
        self.mask_keys = ensure_tuple_rep(mask_key, len(self.keys))
        self.refine = CrfRefine(parameters, device=device, **settings)

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
