"""`CrfRefine` and `CrfRefined`: the transform on arrays and tensors, and on dictionaries; grids come from metadata."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from monai.data import MetaTensor, decollate_batch
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_dst_type, ensure_tuple_rep
from monai.utils.enums import MetaKeys
from numpy.typing import ArrayLike, NDArray

from crfrefine.arrays.arguments import given_spacing
from crfrefine.arrays.probabilities import InputType
from crfrefine.arrays.region_scheme import GivenRegions, RegionScheme
from crfrefine.base.geometry import describe_difference, same_grid, spacing_of
from crfrefine.base.limits import check_threads
from crfrefine.base.text import MAX_OF_A_PATH, shorten, shorten_value
from crfrefine.errors import ConfigError, CrfRefineError, GridMismatchError, InputError
from crfrefine.parameters.model import CrfParameters, as_parameters
from crfrefine.refinement.case import refine

Output = Literal["logits", "probabilities", "labels"]
Spacing = float | Sequence[float] | None
MAX_AXES = 3  # that an affine places in the world


class CrfRefine(Transform):
    """Refine a network's logits by the image with the dense CRF.

    It takes one case, channels first, or a batch. The result has the device, the type (except for labels) and the metadata of the logits,
    `applied_operations` included, so that `Invertd` works on it. Distances are those of the affine of the image, else of the logits.
    Threads may share an object, and it can be pickled.

    Args:
        parameters: the model, the name of a preset, the path of a TOML file, or nested dictionaries with its keys. None means the
            preset `default`, with `network_spacing` the preset `sharp`.
        output: "logits"; "probabilities", the marginals; or "labels", (1, *grid), uint8 up to 256 labels, else int32, to which alone
            `postprocess` applies. None means "labels" for label maps, else "logits".
        input_type: "auto": logits, and what looks like probabilities is refused; "logits";
            "probabilities"; "labels": label maps. One channel, (1, *grid), of log-odds needs
            "logits", of a sigmoid "probabilities"; the result has two labels.
        network_spacing: of label maps, as in `crfrefine.refine`.
        regions: of the channels of a network with sigmoids, in their order: pairs of a name and its labels, a dictionary of these (which
            writers of YAML sort), or a RegionScheme. Then logits are log-odds.
        spacing: mm, one per axis of the grid, for tensors without metadata; or, also one for all axes, instead of that of the metadata.
            None means that of the metadata.
        device: where to compute, as in `crfrefine.refine`; None means the CPU, wherever the tensors are.
        threads: CPU threads; None means the cores that this process may use. In the workers of a DataLoader, 1.
        allow_vanishing: as in `crfrefine.refine`, for labels; logits and probabilities have no rules.

    Raises:
        ConfigError, InputError: an argument has another value.
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
        self.output: Output = output or ("labels" if input_type == "labels" else "logits")
        known = (
            ("labels",) if input_type == "labels" else get_args(Output)
        )  # A label map becomes a label map.
        if self.output not in known:
            raise ConfigError(
                f"output: with input_type={input_type!r} expected one of {', '.join(known)}; got {shorten_value(output)}"
            )
        if parameters is None and network_spacing is not None:
            parameters = "sharp"
        self.parameters = (
            CrfParameters.from_dict(parameters)
            if isinstance(parameters, Mapping)
            else as_parameters(parameters)
        )
        self.input_type: InputType = input_type
        self.spacing: Spacing = None
        if spacing is not None:
            distances = given_spacing(spacing, np.size(spacing))
            self.spacing = distances[0] if np.ndim(spacing) == 0 else distances
        check_threads(threads)
        self._options: dict[str, Any] = {
            "network_spacing": network_spacing,
            "regions": None if regions is None else RegionScheme.of(regions),
            "device": device or "cpu",
            "threads": threads,
            "allow_vanishing": allow_vanishing or self.output != "labels",
        }

    def __call__(self, logits: Any, image: Any, mask: Any | None = None) -> Any:
        """Return the refined logits, probabilities or labels, as the settings say.

        Args:
            logits: (L, *grid) or a batch (B, L, *grid): MetaTensor, tensor or array. With regions: (R, *grid). Label maps: (1, *grid).
            image: (M, *grid) or (B, M, *grid), on the grid of the logits; intensities as the parameters expect them.
            mask: (1, *grid) or (B, 1, *grid), nonzero where the model applies; None means everywhere.

        Raises:
            GridMismatchError: the grids differ, in shape or in place.
            InputError, ConfigError, CrfRefineError: as in `crfrefine.refine`; the message names the file if the metadata do.
        """
        given = (logits, image) if mask is None else (logits, image, mask)
        for value in given:
            if not isinstance(value, torch.Tensor | np.ndarray):
                raise InputError(
                    f"expected tensors or arrays, got {shorten_value(value)}; LoadImage reads files"
                )
        if _is_batch(logits, image, self.spacing):
            sizes = list(map(len, given))
            if len(set(sizes)) > 1:
                raise InputError(
                    f"batches of {' and '.join(map(str, sizes))} cases; logits, image and mask must have the same cases"
                )
            # Each case of a MetaTensor has its own metadata.
            items: Any = (decollate_batch(x) if isinstance(x, MetaTensor) else x for x in given)
            cases = enumerate(zip(*items, strict=True))
            refined = np.stack([self._refined(*case, number=number) for number, case in cases])
        else:
            refined = self._refined(*given)
        return convert_to_dst_type(
            refined, logits, dtype=refined.dtype if self.output == "labels" else logits.dtype
        )[0]

    def _refined(
        self, logits: Any, image: Any, mask: Any = None, *, number: int | None = None
    ) -> NDArray[Any]:
        """Return the result of one case as an array."""
        try:
            spacing = _spacing_of_case(logits, image, mask, self.spacing)
            values = _to_numpy(logits)
            if self.input_type == "labels":
                if len(values) != 1:
                    raise InputError(
                        f"the label map has shape {values.shape}; expected one channel, (1, *grid)"
                    )
                values = values[0]
            mask = (
                None if mask is None else _to_numpy(mask).reshape(logits.shape[1:])
            )  # of one channel
            options = {
                "spacing": spacing,
                "parameters": self.parameters,
                "input_type": self.input_type,
                **self._options,
            }
            result = refine(values, _to_numpy(image), mask=mask, **options)
        except CrfRefineError as error:
            place = [f"case {number} of the batch"] if number is not None else []
            name = ", ".join(filter(None, [*place, _file_of(image, logits)]))
            if not name:
                raise
            raise type(error)(f"{name}: {error}") from error
        if self.output == "labels":
            # PyTorch hardly supports uint16.
            labels: NDArray[Any] = result.label_map[np.newaxis]
            return labels if labels.dtype == np.uint8 else labels.astype(np.int32)
        return result.logits if self.output == "logits" else result.marginals


class CrfRefined(MapTransform):
    """Refine logits in a dictionary by the image in it; the result replaces them under their key.

    The rest of the dictionary is left as it is.

    Args:
        keys: of the logits.
        image_key: of the image; one for all, or one per key of `keys`.
        parameters: as in `CrfRefine`.
        mask_key: of the mask, likewise; None means everywhere.
        device: as in `CrfRefine`.
        allow_missing_keys: whether keys of logits may be missing. An image or a mask may not be missing where there are logits.
        settings: all other arguments of `CrfRefine`, by their names.

    Raises:
        ConfigError: an argument cannot be used.
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
        result = dict(data)
        for key, image_key, mask_key in self.key_iterator(result, self.image_keys, self.mask_keys):
            for other in (image_key, mask_key):
                if other is not None and other not in result:
                    raise KeyError(
                        f"Key `{other}` of transform `{type(self).__name__}` was missing in the data, which has logits in `{key}`."
                    )
            # From `data`: of several keys, none sees what another one has become.
            result[key] = self.refine(
                data[key], data[image_key], None if mask_key is None else data[mask_key]
            )
        return result


def _file_of(*values: Any) -> str | None:
    """Return the file that the first MetaTensor with such an entry was read from; None if unknown."""
    names = (value.meta.get("filename_or_obj") for value in values if isinstance(value, MetaTensor))
    return next(
        (shorten(name, MAX_OF_A_PATH) for name in names if isinstance(name, str) and name), None
    )


def _is_batch(logits: Any, image: Any, spacing: Spacing) -> bool:
    """Return whether logits are a batch (B, L, *grid) and not one case (L, *grid), by the number of distances, else by the metadata."""
    if isinstance(spacing, Sequence):
        num_further = logits.ndim - len(spacing)
        if num_further not in (1, 2):
            raise InputError(
                f"logits have shape {tuple(logits.shape)}, but spacing has {len(spacing)} distances; expected one per axis of the grid, "
                "and logits (labels, *grid), or (batch, labels, *grid)"
            )
        return bool(num_further == 2)
    tagged = next((value for value in (logits, image) if isinstance(value, MetaTensor)), None)
    if tagged is None:
        raise InputError(_NO_PLACE)
    return bool(tagged.is_batch)


def _spacing_of_case(
    logits: Any, image: Any, mask: Any | None, spacing: Spacing
) -> tuple[float, ...]:
    """Return the distance between neighboring voxels of one case in mm, one per axis, after checking that all are on one grid."""
    grid = tuple(logits.shape[1:])
    tensors = [("logits", logits, grid), ("image", image, tuple(image.shape[1:]))]
    if mask is not None:
        if mask.ndim > len(grid) and len(mask) != 1:
            raise InputError(
                f"the mask has shape {tuple(mask.shape)}; expected one channel, {(1, *grid)}"
            )
        tensors.append(("mask", mask, tuple(mask.shape[mask.ndim > len(grid) :])))
    for name, value, _ in tensors:
        if isinstance(value, MetaTensor) and value.has_pending_operations:
            raise InputError(
                f"{_label(name, value)}: lazy operations are pending; apply them first, with ApplyPending or Compose"
            )
    affines = [_affine_of(value) for _, value, _ in tensors]
    first = affines[0]
    for (name, value, shape), affine in zip(tensors[1:], affines[1:], strict=True):
        are_apart = (
            first is not None
            and affine is not None
            and len(grid) <= MAX_AXES
            and not same_grid(grid, first, shape, affine)
        )
        if shape != grid or are_apart:
            lines = describe_difference(
                (_label("logits", logits), grid, first), (_label(name, value), shape, affine)
            )
            raise GridMismatchError(
                f"logits and {name} are on different grids\n{lines}\n"
                "  Invert the spatial transforms of both (Invertd), or refine before they are inverted."
            )
    if spacing is not None:
        return tuple(spacing) if isinstance(spacing, Sequence) else (spacing,) * len(grid)
    affine = first if affines[1] is None else affines[1]
    if affine is None:
        raise InputError(_NO_PLACE)
    if not 1 <= len(grid) <= MAX_AXES:
        raise InputError(
            f"{_label('logits', logits)}: shape {tuple(logits.shape)} on {len(grid)} axes; an affine has at most {MAX_AXES}"
        )
    return spacing_of(affine, len(grid))


_NO_PLACE = (
    "the spacing is unknown: neither logits nor image have metadata with an affine of their own; give spacing=(...), in mm, one per axis "
    "of the grid, or read files with LoadImage"
)


def _affine_of(value: Any) -> NDArray[np.float64] | None:
    """Return the (4, 4) affine of a MetaTensor; None without one, and for the unit matrix that MONAI gives to tensors without a file."""
    if not isinstance(value, MetaTensor) or MetaKeys.AFFINE not in value.meta:
        return None
    stored = np.asarray(torch.as_tensor(value.meta[MetaKeys.AFFINE]).cpu(), np.float64)
    if stored.ndim != 2 or stored.shape[0] != stored.shape[1] or not 2 <= len(stored) <= 4:
        raise InputError(
            f"{_file_of(value) or 'a MetaTensor'}: an affine of shape {stored.shape}; expected (4, 4)"
        )
    if (
        np.array_equal(stored, np.eye(len(stored)))
        and _file_of(value) is None
        and MetaKeys.ORIGINAL_AFFINE not in value.meta
    ):
        return None
    affine, axes = np.eye(4), len(stored) - 1
    affine[:axes, :axes], affine[:axes, 3] = stored[:axes, :axes], stored[:axes, axes]
    return affine


def _to_numpy(value: Any) -> NDArray[Any]:
    """Return the values of a tensor on any device, or of an array; bfloat16, which numpy lacks, becomes float32."""
    if not isinstance(value, torch.Tensor):
        return value  # type: ignore[no-any-return] # `refine` refuses masked arrays
    plain = (value.as_tensor() if isinstance(value, MetaTensor) else value).detach().cpu()
    array: NDArray[Any] = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
    return array


def _label(name: str, value: Any) -> str:
    file = _file_of(value)
    return name if file is None else f"{name} ({file})"
