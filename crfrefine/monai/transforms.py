"""`CrfRefine` and `CrfRefined`: the transform on arrays and tensors, and on dictionaries.

The grid of each input comes from its metadata.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, decollate_batch
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_dst_type, ensure_tuple_rep
from monai.utils.enums import MetaKeys
from numpy.typing import ArrayLike

from crfrefine.arrays.arguments import given_spacing
from crfrefine.arrays.probabilities import InputType
from crfrefine.arrays.region_scheme import GivenRegions, RegionScheme
from crfrefine.base.array_types import Array, Float64, Shape
from crfrefine.base.geometry import describe_difference, same_grid, spacing_of
from crfrefine.base.limits import check_threads
from crfrefine.base.plain import Json
from crfrefine.base.text import MAX_OF_A_PATH, shorten, shorten_value
from crfrefine.errors import ConfigError, CrfRefineError, GridMismatchError, InputError
from crfrefine.parameters.model import CrfParameters, as_parameters
from crfrefine.refinement.case import refine

Model = CrfParameters | str | Path | Mapping[str, Any] | None
Output = Literal["logits", "probabilities", "labels"]
Spacing = float | Sequence[float] | None
# A name for messages, the shape of a grid, and its (4, 4) affine; None if that is unknown.
Place = tuple[str, Shape, Float64 | None]
MAX_AXES = 3  # most axes that an affine places in the world
_NO_PLACE = (
    "the spacing is unknown: neither logits nor image have metadata with an affine of their own; "
    "give spacing=(...), in mm, one per axis of the grid, or read files with LoadImage"
)


class CrfRefine(Transform):
    """Refine a network's logits by the image with the dense CRF.

    It takes one case, channels first, or a batch. The result has the device, the type (except for
    labels) and the metadata of the logits, `applied_operations` included, so that `Invertd` works
    on it. The spacing is that of the affine of the image, or else of the logits. Threads may share
    an object, and it can be pickled.

    Args:
        parameters: the model, the name of a preset, the path of a TOML file, or nested
            dictionaries with its keys. None means the preset `default`, with `network_spacing` the
            preset `sharp`.
        output: "logits"; "probabilities", the marginals; or "labels", (1, *grid), uint8 up to 256
            labels, else int32. `postprocess` applies to labels only. None means "labels" for label
            maps, else "logits".
        input_type: "auto": logits, and what looks like probabilities is refused; "logits";
            "probabilities"; "labels": label maps. For a single channel, (1, *grid), give "logits"
            if it is log-odds, "probabilities" if it is a sigmoid; the result has two labels.
        network_spacing: of label maps, as in `crfrefine.refine`.
        regions: of the channels of a network with sigmoids, in their order: pairs of a name and
            its labels, a dictionary of these (which writers of YAML sort), or a RegionScheme. Then
            logits are log-odds.
        spacing: mm, without metadata or instead of theirs; one per axis of the grid, or one for all
            axes. Without metadata one for all is refused where shapes can be those of a case and of
            a batch. None means that of the metadata.
        device: where to compute, as in `crfrefine.refine`; None means the CPU, wherever the
            tensors are.
        threads: CPU threads; None means the cores that this process may use. In the workers of a
            DataLoader, 1.
        allow_vanishing: as in `crfrefine.refine`, for output "labels"; no rule applies to others.

    Raises:
        ConfigError, InputError: an argument cannot be used.
    """

    backend = [TransformBackends.TORCH, TransformBackends.NUMPY]  # noqa: RUF012

    def __init__(
        self,
        parameters: Model = None,
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
        self.input_type: InputType = input_type
        outputs: tuple[Output, ...] = get_args(Output)  # The first one is the default.
        if input_type == "labels":  # A label map becomes a label map.
            outputs = ("labels",)
        self.output: Output = output or outputs[0]
        if self.output not in outputs:
            raise ConfigError(
                f"output: with input_type={input_type!r} expected one of {', '.join(outputs)}; got "
                f"{shorten_value(output)}"
            )
        if parameters is None and network_spacing is not None:
            parameters = "sharp"
        if isinstance(parameters, Mapping):
            self.parameters = CrfParameters.from_dict(parameters)
        else:
            self.parameters = as_parameters(parameters)
        self.spacing: Spacing = None  # One distance, or one per axis.
        if spacing is not None:
            distances = given_spacing(spacing, np.size(spacing))
            self.spacing = distances if np.ndim(spacing) > 0 else distances[0]
        check_threads(threads)
        if regions is not None:
            regions = RegionScheme.of(regions)
        self._options: Json = {
            "parameters": self.parameters,
            "input_type": input_type,
            "network_spacing": copy.deepcopy(network_spacing),
            "regions": regions,
            "device": device or "cpu",
            "threads": threads,
            "allow_vanishing": allow_vanishing or self.output != "labels",
        }

    def __call__(self, logits: Any, image: Any, mask: Any | None = None) -> Any:
        """Return the refined logits, probabilities or labels, as the settings say.

        Args:
            logits: (L, *grid) or a batch (B, L, *grid): MetaTensor, tensor or array. With regions:
                (R, *grid). Label maps: (1, *grid).
            image: (M, *grid) or (B, M, *grid), on the grid of the logits; intensities as the
                parameters expect them.
            mask: (1, *grid) or (B, 1, *grid), nonzero where the model applies; None means
                everywhere.

        Raises:
            GridMismatchError: the grids differ, in shape or in place.
            InputError, ConfigError, CrfRefineError: as in `crfrefine.refine`; the message names
                the file if the metadata do.
        """
        values = [logits, image]
        if mask is not None:
            values.append(mask)
        for value in values:
            if not isinstance(value, torch.Tensor | np.ndarray):
                raise InputError(
                    f"expected tensors or arrays, got {shorten_value(value)}; LoadImage reads files"
                )
        if self._is_batch(logits, image):
            sizes = [len(value) for value in values]
            if len(set(sizes)) > 1:
                counts = " and ".join(str(size) for size in sizes)
                raise InputError(
                    f"batches of {counts} cases; logits, image and mask must have the same cases"
                )
            batches = []
            for value in values:
                # Each case of a MetaTensor has its own metadata.
                batches.append(decollate_batch(value) if isinstance(value, MetaTensor) else value)
            results = []
            for number, case in enumerate(zip(*batches, strict=True)):
                results.append(self._refine_case(*case, place=f"case {number} of the batch"))
            refined = np.stack(results)
        else:
            refined = self._refine_case(*values)
        dtype = refined.dtype if self.output == "labels" else logits.dtype
        return convert_to_dst_type(refined, logits, dtype=dtype)[0]

    def _is_batch(self, logits: Any, image: Any) -> bool:
        """Return whether logits are a batch (B, L, *grid) and not one case (L, *grid).

        The number of distances decides, or else the metadata, or else the shapes of logits and
        image if one distance for all axes is given. Raises InputError if nothing decides.
        """
        spacing = self.spacing
        if isinstance(spacing, Sequence):
            num_leading = logits.ndim - len(spacing)
            if num_leading not in (1, 2):
                raise InputError(
                    f"logits have shape {tuple(logits.shape)}, but spacing has {len(spacing)} "
                    "distances; expected one per axis of the grid, and logits (labels, *grid), or "
                    "(batch, labels, *grid)"
                )
            return bool(num_leading == 2)
        for value in (logits, image):
            if isinstance(value, MetaTensor):
                return bool(value.is_batch)
        if spacing is None:
            raise InputError(_NO_PLACE)

        shape = tuple(logits.shape)
        image_shape = tuple(image.shape)
        can_be_case = shape[1:] == image_shape[1:]
        can_be_batch = len(shape) > 2 and shape[:1] + shape[2:] == image_shape[:1] + image_shape[2:]
        if self.input_type == "labels":  # Label maps have one channel.
            can_be_case = can_be_case and shape[0] == 1
            can_be_batch = can_be_batch and shape[1] == 1
        if can_be_case and can_be_batch:
            raise InputError(
                f"logits {shape} and image {image_shape} can be one case, (channels, *grid), or a "
                f"batch, (batch, channels, *grid), and the spacing {spacing:g}, for all axes, does "
                "not say which; give spacing=(...), one per axis of the grid"
            )
        return can_be_batch

    def _refine_case(self, logits: Any, image: Any, mask: Any = None, *, place: str = "") -> Array:
        """Return the result of one case as an array, channels first, as the settings ask for.

        Errors begin with its place in the batch, if any, and the name of its file.
        """
        try:
            spacing = _spacing_of_case(logits, image, mask, self.spacing)
            channels = _to_numpy(logits)
            if self.input_type == "labels":
                if len(channels) != 1:
                    raise InputError(
                        f"the label map has shape {channels.shape}; expected one channel, "
                        "(1, *grid)"
                    )
                channels = channels[0]
            if mask is not None:
                mask = _to_numpy(mask).reshape(logits.shape[1:])  # of one channel
            result = refine(channels, _to_numpy(image), mask=mask, spacing=spacing, **self._options)
        except CrfRefineError as error:
            names = [name for name in (place, _file_of(image, logits)) if name]
            if not names:
                raise
            raise type(error)(f"{', '.join(names)}: {error}") from error
        if self.output == "logits":
            return result.logits
        if self.output == "probabilities":
            return result.marginals
        labels: Array = result.label_map[np.newaxis]
        if labels.dtype != np.uint8:
            labels = labels.astype(np.int32)  # PyTorch hardly supports uint16.
        return labels


class CrfRefined(MapTransform):
    """Refine logits in a dictionary by the image in it; the result replaces them under their key.

    The rest of the dictionary is left as it is.

    Args:
        keys: the keys of the logits.
        image_key: the key of the image; one for all, or one per key of `keys`.
        parameters: as in `CrfRefine`.
        mask_key: the key of the mask, likewise; None means everywhere.
        device: as in `CrfRefine`.
        allow_missing_keys: whether keys of logits may be missing. An image or a mask may not be
            missing where there are logits.
        settings: all other arguments of `CrfRefine`, by their names.

    Raises:
        ConfigError: an argument cannot be used.
    """

    backend = CrfRefine.backend

    def __init__(
        self,
        keys: KeysCollection,
        image_key: KeysCollection = "image",
        parameters: Model = None,
        mask_key: KeysCollection | None = None,
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
                        f"Key `{other}` of transform `{type(self).__name__}` was missing in the "
                        f"data, which has logits in `{key}`."
                    )
            # All inputs come from `data`, so that no key sees the result of another one.
            mask = None if mask_key is None else data[mask_key]
            result[key] = self.refine(data[key], data[image_key], mask)
        return result


def _file_of(*values: Any) -> str | None:
    """Return the file that the first MetaTensor with such an entry was read from."""
    for value in values:
        if isinstance(value, MetaTensor):
            name = value.meta.get("filename_or_obj")
            if isinstance(name, str) and name:
                return shorten(name, MAX_OF_A_PATH)
    return None


def _spacing_of_case(
    logits: Any, image: Any, mask: Any | None, spacing: Spacing
) -> tuple[float, ...]:
    """Return the distance between neighboring voxels of one case in mm, one per axis.

    Without a given one, it is that of the image's affine, or else of the logits'.
    Raises InputError or GridMismatchError unless logits, image and mask are on one grid.
    """
    grid = tuple(logits.shape[1:])
    first = _place_of("logits", logits, grid)
    affine = first[2]
    others = {"image": (image, tuple(image.shape[1:]))}
    if mask is not None:
        shape = tuple(mask.shape)
        if len(shape) > len(grid):
            if len(mask) != 1:
                raise InputError(f"the mask has shape {shape}; expected one channel, {(1, *grid)}")
            shape = shape[1:]
        others["mask"] = (mask, shape)
    for name, (value, shape) in others.items():
        place = _place_of(name, value, shape)
        is_placed = len(grid) <= MAX_AXES
        if shape != grid or (is_placed and not same_grid(grid, first[2], shape, place[2])):
            raise GridMismatchError(
                f"logits and {name} are on different grids\n{describe_difference(first, place)}\n"
                "  Invert the spatial transforms of both (Invertd), or refine before they are "
                "inverted."
            )
        if name == "image" and place[2] is not None:
            affine = place[2]
    if spacing is not None:
        return given_spacing(spacing, len(grid))
    if affine is None:
        raise InputError(_NO_PLACE)
    if not 1 <= len(grid) <= MAX_AXES:
        raise InputError(
            f"{first[0]}: shape {tuple(logits.shape)} on {len(grid)} axes; an "
            f"affine has at most {MAX_AXES}"
        )
    return spacing_of(affine, len(grid))


def _place_of(name: str, value: Any, grid: Shape) -> Place:
    """Return the place of an input: its name, with its file if that is known, grid and affine.

    The affine is None if there is none, and also for the unit matrix that MONAI gives to tensors
    without a file. Raises InputError if lazy operations are pending, which may change voxels and
    affine.
    """
    file = _file_of(value)
    if file is not None:
        name = f"{name} ({file})"
    if not isinstance(value, MetaTensor):
        return name, grid, None
    if value.has_pending_operations:
        raise InputError(
            f"{name}: lazy operations are pending; apply them first, with ApplyPending or Compose"
        )
    if MetaKeys.AFFINE not in value.meta:
        return name, grid, None
    stored = np.asarray(torch.as_tensor(value.meta[MetaKeys.AFFINE]).cpu(), np.float64)
    if stored.shape not in ((2, 2), (3, 3), (4, 4)):
        raise InputError(f"{name}: an affine of shape {stored.shape}; expected (4, 4)")
    num_axes = len(stored) - 1
    affine = np.eye(4)
    affine[:num_axes, :num_axes] = stored[:num_axes, :num_axes]
    affine[:num_axes, 3] = stored[:num_axes, num_axes]
    has_place = file is not None or MetaKeys.ORIGINAL_AFFINE in value.meta
    if np.array_equal(affine, np.eye(4)) and not has_place:
        return name, grid, None
    return name, grid, affine


def _to_numpy(value: Any) -> Array:
    """Return the values of a tensor on any device, or of an array.

    bfloat16, which numpy lacks, becomes float32.
    """
    if not isinstance(value, torch.Tensor):
        return value  # `refine` refuses masked arrays
    if isinstance(value, MetaTensor):
        value = value.as_tensor()
    tensor = value.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.resolve_neg().numpy()
