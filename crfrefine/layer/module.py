"""`CrfRnn`, the dense CRF as a trainable PyTorch module: logits in, logits out.

It holds parameters, and normalizes images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from crfrefine.base import notices
from crfrefine.engines.base import Kernels
from crfrefine.errors import InputError
from crfrefine.layer import autograd, functional, inputs
from crfrefine.layer.crf_model import CrfModel, make_model
from crfrefine.layer.inputs import Mask, Spacing
from crfrefine.layer.intensity import normalize_batch
from crfrefine.layer.values import CrfValues
from crfrefine.parameters.sections import MeanFieldParameters


class CrfRnn(CrfValues):
    """Dense CRF with unrolled mean-field steps, whose parameters are learned by gradient descent.

    Every `[[bilateral]]` table of the parameters is a term of the layer, even with weight 0, from
    which training can move it.

    Attributes:
        num_labels, num_modalities, spatial_dims: L, M, and axes of the grid.
        per_label_weights, anisotropic: whether each label has its own weight, and each axis its
            own bandwidth.
        num_iterations: number of mean-field steps; all are taken.
        threads: CPU threads; None means as many as `torch.get_num_threads()`.
        label_threshold: labels whose marginals all stay below it around a tile take no part there,
            if this saves work; on the CPU, in float32, and without `kernels`. 0 means all labels
            everywhere. docs/guide/layer.md says what gradients leave out.

    Examples:
        >>> import torch
        >>> import crfrefine
        >>> layer = crfrefine.CrfRnn(num_labels=3, num_modalities=2, spatial_dims=3)
        >>> logits = torch.randn(1, 3, 5, 6, 7)
        >>> image = torch.randn(1, 2, 5, 6, 7)
        >>> layer(logits, image, spacing=(1.0, 1.0, 2.5)).square().sum().backward()
        >>> layer.to_parameters().bilateral[0].theta_beta
        0.05

    Source: Zheng et al. 2015; Monteiro et al. 2018; docs/guide/layer.md, docs/reference/math.md.
    """

    @autograd.outside_graphs
    def forward(
        self,
        logits: Tensor,
        image: Tensor,
        spacing: Spacing | None = None,
        mask: Mask = None,
        *,
        kernels: Sequence[Kernels] | None = None,
    ) -> Tensor:
        """Refine a network's logits.

        Regions where all labels have exactly the same logit, such as the padding of a crop, take no
        part, as if they were outside the mask; a warning reports them if they are more than one
        voxel in a hundred. Single ties, which are common in half precision, take part.

        Args:
            logits: (B, L, *grid), higher is better. float64 is computed in float64, by plain
                tensor operations; other types in float32.
            image: (B, M, *grid), raw intensities, finite; they are normalized as
                `parameters.intensity` specifies, inside the mask. NaN is refused, unlike by
                `refine`: a mask made of the values would wait for the device. Give
                `mask=~image.isnan().any(1)` and `image.nan_to_num()`.
            spacing: mm between neighboring voxels; one number, one per axis, or (B, axes). None
                means 1 mm, with a warning the first time.
            mask: nonzero where the model applies; (*grid), (B, *grid) or (B, 1, *grid). None means
                everywhere.
            kernels: from `build_kernels` with the same image, spacing, mask and bandwidths, which
                are then ignored.

        Returns:
            (B, L, *grid) refined logits in the type of `logits` (under `torch.autocast` at least
            float32); their softmax over labels are the marginals. Outside the mask: logits /
            temperature.

        Raises:
            InputError: shapes do not fit, an empty mask, values inside the mask that are not finite
                (except logits of -infinity), or a batch item whose logits are equal for all labels
                nearly everywhere.
            BackendUnavailableError: there is no engine for the tensors' device.
            CapacityError: not enough memory, or bandwidths too small for the lattice.
            ExportError: `torch.jit`, `torch.export` or `torch.onnx` tries to make a graph of it.
        """
        self._check_batch(logits, image)
        inputs.warn_of_probabilities(logits, self._told)
        images = []
        # Given kernels were built from the image: it matters now only if its gradient is needed.
        if kernels is None or (image.requires_grad and torch.is_grad_enabled()):
            # On the CPU a look costs no wait, and comes before statistics are taken of the image.
            if image.device.type == "cpu":
                inputs.check_finite(image)
            else:
                images.append(image)
            image = normalize_batch(
                image,
                self._start.intensity,
                mask,
                inputs.compute_dtype(logits),
                threads=self.threads,
            )
            images.append(image)
        are_usable, has_ties, ties = inputs.look_at_batch(logits, images)
        if not are_usable:
            for values in images:
                inputs.check_finite(values)
        if has_ties:
            logits, mask = inputs.without_padding(logits, ties, mask, kernels)
        return self.refine_normalized(
            logits, image, spacing, mask, kernels=kernels, is_checked=are_usable
        )

    if TYPE_CHECKING:
        __call__ = forward  # The method of `nn.Module` takes and returns Any.

    def __prepare_scriptable__(self) -> Self:
        """Refuse `torch.jit.script`, which calls this for every module that it meets."""
        raise autograd.cannot_export("torch.jit.script")

    @autograd.outside_graphs
    def refine_normalized(
        self,
        logits: Tensor,
        image: Tensor,
        spacing: Spacing | None = None,
        mask: Mask = None,
        *,
        threads: int | None = None,
        kernels: Sequence[Kernels] | None = None,
        is_checked: bool = False,
    ) -> Tensor:
        """Refine logits with an image that is on the scale of theta_beta already.

        Such an image is, for example, a crop of a normalized case. Arguments, results and errors
        are those of `forward`, but padding of the logits is not detected. With `is_checked`, which
        saves a wait for a GPU, NaN and infinity are not looked for.
        """
        self._check_batch(logits, image)
        if kernels is None:
            spacing = self._known_spacing(spacing)
        if threads is None:
            threads = self.threads
        return functional.refine_batch(
            logits,
            image,
            self.crf_model(inputs.compute_dtype(logits)),
            spacing=spacing,
            mask=mask,
            threads=threads,
            kernels=kernels,
            is_checked=is_checked,
        )

    def crf_model(
        self, dtype: torch.dtype = torch.float32, *, region: int | None = None
    ) -> CrfModel:
        """Return the present model, computed in `dtype`: it serves until the parameters change.

        That of a region has two labels, outside (0) and inside, with the weights and the bias of
        the region's label, or those of all labels. None means the model of all labels.
        """
        num_labels = self.num_labels
        compatibility: Tensor | None = self.compatibility
        bias = self.bias
        terms = self.terms()
        if region is not None:
            num_labels = 2
            compatibility = None
            bias = torch.stack([torch.zeros_like(bias[region]), bias[region]])
            terms = []
            for kind, (weight, *bandwidths) in self.terms():
                terms.append((kind, (weight[region % len(weight)], *bandwidths)))
        return make_model(
            num_labels,
            self.num_modalities,
            self.spatial_dims,
            dtype,
            terms=terms,
            compatibility=compatibility,
            temperature=self.temperature,
            bias=bias,
            volume=self.volume_weight,
            settings=self.settings(),
        )

    def build_kernels(
        self,
        image: Tensor,
        spacing: Spacing | None = None,
        mask: Mask = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> list[Kernels]:
        """Build everything that depends only on images and bandwidths.

        Kernels serve many calls while these stay equal, as with frozen theta. Arguments and errors
        are those of `forward`; `dtype` is float32, or float64 for float64 logits.

        Returns:
            One object for each batch item; each may be used in one call at a time.
        """
        self._check_image(image)
        inputs.engine_for(image.device, dtype)
        inputs.check_finite(image)
        with torch.no_grad():
            normalized = normalize_batch(
                image, self._start.intensity, mask, dtype, threads=self.threads
            )
        return functional.build_kernels(
            normalized,
            self.terms(),
            spacing=self._known_spacing(spacing),
            mask=mask,
            num_labels=self.num_labels,
            settings=self.settings(),
            threads=self.threads,
        )

    def settings(self) -> MeanFieldParameters:
        """Return `[mean_field]`, in which temperature and bias are those of the start."""
        return replace(
            self._start.mean_field,
            num_iterations=self.num_iterations,
            label_threshold=self.label_threshold,
        )

    def _known_spacing(self, spacing: Spacing | None) -> Spacing:
        """Return the spacing, or 1 mm with a warning, once per layer."""
        if spacing is not None:
            return spacing
        return notices.assumed_spacing(
            matters=self._start.mean_field.positions != "voxels", told=self._told
        )

    def _check_batch(self, logits: Tensor, image: Tensor) -> None:
        """Raise the errors of shapes and devices."""
        inputs.check_pair(logits, image)
        self._check_image(image)
        if logits.shape[1] != self.num_labels:
            raise InputError(
                f"logits {tuple(logits.shape)} have {logits.shape[1]} labels; the layer was made "
                f"for {self.num_labels}"
            )

    def _check_image(self, image: Tensor) -> None:
        inputs.check_image(image)
        if image.ndim != self.spatial_dims + 2 or image.shape[1] != self.num_modalities:
            raise InputError(
                f"image has shape {tuple(image.shape)}; the layer was made for (batch, "
                f"{self.num_modalities} modalities, *grid), the grid of {self.spatial_dims} axes"
            )
