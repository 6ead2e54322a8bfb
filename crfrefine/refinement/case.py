"""Refine one case of arrays, from raw intensities and logits to a label map.

`refine` is the library's main function; `Plan` is for programs that refine a case several times.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path

from numpy.typing import ArrayLike

from crfrefine.arrays.arguments import open_arguments
from crfrefine.arrays.library_images import ArrayOrImage, copied, open_arrays
from crfrefine.arrays.network import ArrayNetwork
from crfrefine.arrays.probabilities import INPUT_TYPES, InputType
from crfrefine.arrays.region_scheme import GivenRegions
from crfrefine.base.limits import check_threads
from crfrefine.base.one_call import OneCall
from crfrefine.engines import get_backend
from crfrefine.engines.base import Backend, Progress, RunContext
from crfrefine.errors import ConfigError
from crfrefine.parameters.model import CrfParameters, as_parameters
from crfrefine.refinement.refining import refine_network
from crfrefine.refinement.result import RefinementResult


def refine(
    logits: ArrayOrImage,
    image: ArrayOrImage,
    *,
    spacing: ArrayLike | None = None,
    parameters: CrfParameters | str | Path | None = None,
    mask: ArrayOrImage | None = None,
    input_type: InputType = "auto",
    network_spacing: ArrayLike | str | None = None,
    regions: GivenRegions | None = None,
    device: str | Backend = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
    allow_vanishing: bool = False,
    strokes: ArrayOrImage | None = None,
) -> RefinementResult:
    """Refine a network's logits, or a label map, with the dense CRF.

    Regions where all labels have exactly the same logit, such as the padding of a crop, take no
    part: they keep label 0 and neither send nor receive messages. Single ties and thin sheets of
    ties inside take part. With `regions`, voxels are equal where all log-odds are exactly 0.

    `logits`, `image` and `mask` are arrays, or images of nibabel or SimpleITK, which bring their
    spacing. The axes are then those of the library's own arrays: (x, y, z) of
    `np.asarray(image.dataobj)`, (z, y, x) of `sitk.GetArrayFromImage(image)`; a fourth axis, or the
    components of a vector image, are the channels.

    Args:
        logits: (L, *grid), higher is better, finite. One channel, (1, *grid), is label 1,
            whose background is computed: its probability with `input_type="probabilities"`, its
            log-odds with "logits"; "auto" does not tell them apart and refuses it. The result then
            has two labels. With `regions`: (R, *grid), one log-odds per region, above 0 inside.
            With `input_type="labels"`: (*grid) labels, whole numbers from 0 up.
        image: (M, *grid) or (*grid), raw intensities, which are normalized as the parameters
            specify. Voxels that are NaN in any modality take no part, as if outside the mask, with
            a note.
        spacing: mm between neighboring voxels, from 1e-6 to 1e9, one per grid axis or one for all.
            None means that of the images, or 1 mm, with a warning if it matters.
        parameters: the model, or a preset's name or the path of a TOML file. None means `default`,
            with `network_spacing` `sharp`.
        mask: (*grid), nonzero where the model applies; None means everywhere: `intensity.mask` of
            the parameters is for the commands.
        input_type: "probabilities", whose logarithm is taken, and which are clipped to [0, 1] where
            interpolation overshot, if they sum to 1 at every voxel; "auto" for logits, where values
            that look like probabilities are refused, with or without overshoot; "logits" even if
            they look like probabilities (except one channel in [0, 1]); or "labels" for a label
            map.
        network_spacing: mm between the voxels of the network that made the label map, one per grid
            axis or one for all, if they are larger than the image's; "auto" means that blocks in
            the map show it. None means that each voxel's label is taken as it is.
        regions: overlapping regions, one sigmoid channel each, as of nnU-Net's region-based
            training: each is refined as a problem of two labels on the same kernels, and together
            they become the label map. A dictionary of names and their labels, pairs of these, or a
            RegionScheme. None means that the channels are labels, together one softmax.
        device: "auto", "cpu", "cuda", "cuda:N", "torch" or "torch:cuda"; "auto" is the GPU if there
            is one and CuPy is installed, else the CPU.
        threads: CPU threads; None means the cores this process may use.
        progress: called as progress(stage, step, num_steps) between stages; may raise to stop.
        allow_vanishing: whether the rules of `postprocess` may empty a label, or remove more than a
            tenth of its voxels.
        strokes: (*grid) whole numbers, voxels that somebody drew to correct the network: 0 where
            nothing is drawn, a label, or 255 for background. Drawn voxels are fixed, and like
            voxels near them follow. None means no stroke.

    Returns:
        The refined case. Its arrays have the same memory order as `logits`.

    Raises:
        InputError: shapes do not fit, logits that are not finite, an image with infinite values or
            more than 99 % of NaN, an empty mask, a label map or probabilities instead of logits,
            logits that are equal for all labels nearly everywhere, images of both libraries,
            another spacing than theirs, or a network spacing that is not above the image's or is
            not found.
        GridMismatchError: images on different grids.
        ConfigError: a list in the parameters has the wrong length for this case, the preset or file
            does not exist, regions that do not fit each other or come with a label map, a network
            spacing without a label map, a number of threads below 1, or rules of `postprocess` that
            remove more than a tenth of a label without `allow_vanishing`.
        BackendUnavailableError: the device is not available.
        CapacityError: not enough memory, bandwidths too small for the lattice, or more than 4,096
            different labels.

    Source: Krähenbühl & Koltun 2011; the recurrent form is Zheng et al. 2015
    (docs/reference/math.md).

    Examples:
        A network is unsure of one voxel in the middle of a bright structure; the voxels around it
        decide.

        >>> import numpy as np
        >>> import crfrefine
        >>> image = np.zeros((5, 6, 7))
        >>> image[1:4, 1:5, 2:6] = 100.0
        >>> logits = np.stack([np.zeros((5, 6, 7)), np.where(image > 0, 2.0, -2.0)])
        >>> logits[1, 2, 3, 4] = -0.5
        >>> result = crfrefine.refine(logits, image, spacing=(1.0, 1.0, 2.5))
        >>> int(result.network_label_map[2, 3, 4]), int(result.label_map[2, 3, 4])
        (0, 1)
        >>> result.changes.voxels_changed
        1
    """
    check_threads(threads)
    backend = device if isinstance(device, Backend) else get_backend(device)
    if input_type not in INPUT_TYPES:
        raise ConfigError(f"input type {input_type!r}: expected one of {', '.join(INPUT_TYPES)}")
    if parameters is None and network_spacing is not None:
        parameters = "sharp"
    parameters = as_parameters(parameters)
    arrays, spacing = open_arrays(
        {"logits": logits, "image": image}, {"mask": mask, "strokes": strokes}, spacing
    )
    network, raw, distances, inside, drawn = open_arguments(
        arrays,
        spacing=spacing,
        input_type=input_type,
        network_spacing=network_spacing,
        regions=regions,
        parameters=parameters,
    )
    result = refine_network(
        network,
        raw,
        spacing=distances,
        parameters=parameters,
        mask=inside,
        backend=backend,
        context=RunContext(threads, progress),
        allow_vanishing=allow_vanishing,
        strokes=drawn,
    )
    if isinstance(network, ArrayNetwork):
        result.channels.watch(network.values)
    return result


class Plan:
    """The CRF on one image, for programs that refine a case with several logits or parameters.

    It copies image, mask and spacing when it is made: later changes of the caller's arrays have no
    effect. On the CPU the kernels of the newest run stay in memory (20 to 100 bytes per voxel), and
    the next run builds new ones only if its bandwidths differ. Results have the bits of `refine`.

    A plan serves one run at a time. While it is at work, another run raises InputError, be it from
    another thread or from a progress callback. Make a plan for each thread, or let threads wait for
    each other with a `threading.Lock`.

    Examples:
        >>> import numpy as np
        >>> from crfrefine import CrfParameters, Plan
        >>> image = np.random.default_rng(0).normal(100.0, 20.0, (6, 8, 7))
        >>> logits = np.stack([np.zeros(image.shape), (image - 100.0) / 20.0])
        >>> plan = Plan(image, spacing=(1.0, 1.0, 2.5))
        >>> for weight in (1.0, 3.0):
        ...     result = plan.run(logits, CrfParameters().replace(**{"bilateral.weight": weight}))
    """

    def __init__(
        self,
        image: ArrayOrImage,
        *,
        spacing: ArrayLike | None = None,
        mask: ArrayOrImage | None = None,
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        """Copy the image and the mask; nothing is computed.

        Arguments and errors are those of `refine`. GPUs keep no kernels.
        """
        check_threads(threads)
        backend = get_backend(device, keeps_kernels=True)
        self._refine = partial(
            refine,
            image=copied(image, "image"),
            spacing=deepcopy(spacing),
            mask=copied(mask, "mask"),
            device=backend,
            threads=threads,
        )
        self._one_run = OneCall(
            "this Plan is at work on another run, and serves one at a time; make a Plan for each "
            "thread, or start this run when the other has ended, not from its progress callback",
            waits=False,
        )

    def run(
        self,
        logits: ArrayOrImage,
        parameters: CrfParameters | str | Path | None = None,
        *,
        input_type: InputType = "auto",
        network_spacing: ArrayLike | str | None = None,
        regions: GivenRegions | None = None,
        progress: Progress | None = None,
        allow_vanishing: bool = False,
        strokes: ArrayOrImage | None = None,
    ) -> RefinementResult:
        """Refine logits, or a label map; arguments, result and errors are those of `refine`.

        It also raises InputError while the plan is at work on another run.
        """
        with self._one_run:
            return self._refine(
                logits,
                parameters=parameters,
                input_type=input_type,
                network_spacing=network_spacing,
                regions=regions,
                progress=progress,
                allow_vanishing=allow_vanishing,
                strokes=strokes,
            )
