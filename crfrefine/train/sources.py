"""The synthetic cases of a real one: drawn around its foreground, and refined by candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.label_maps import bounding_box, grown, whole_box
from crfrefine.arrays.region_scheme import decode, probabilities_of
from crfrefine.base.array_types import Array, Float32, Float64
from crfrefine.cases.case import Case
from crfrefine.errors import InputError
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import IntensityParameters
from crfrefine.refinement.case import Plan, refine
from crfrefine.train import synthetic
from crfrefine.train.choice import Candidate
from crfrefine.train.starts import voxel_length
from crfrefine.train.synthetic import MIN_VOXELS, dice_of_maps, groups_of

# Most voxels of a synthetic case, which is coarsened to this: all candidates on it take half a
# minute at most.
MAX_VOXELS = 400_000
# Voxels around the foreground that belong to a synthetic case: more than most kernels reach.
MARGIN = 16
# Factors on the noise that the network expects of itself: networks expect too much of themselves.
NOISE_LEVELS = (1.0, 1.5)


# A label map (*box) that is right in synthetic cases, and logits (channels, *box) that decode to it
# or, after noise, did.
Truth = tuple[Array, Float32]


class Source:
    """The part of a case around its foreground that its synthetic cases are made from."""

    def __init__(
        self, case: Case, default: CrfParameters, threads: int, noise_voxels: float
    ) -> None:
        """Cut it out, refined by `default`, and coarsen it to MAX_VOXELS.

        Raise InputError for a label map, and for a case without a label of MIN_VOXELS.

        Args:
            case: the case.
            default: the preset, with the overrides of the run.
            threads: for its refinement.
            noise_voxels: how many voxels of the synthetic case, coarsened or not, a voxel of the
                noise is long: see `docs/decisions`.
        """
        if case.input_kind == "labels":
            raise InputError(
                "a label map does not say how sure the network is: without "
                "labels, give logits or probabilities, or use the preset `default`"
            )
        self.case_id = case.case_id
        self.voxel = voxel_length(case.spacing)  # side in mm of a voxel of the case
        # The regions of the channels; None means that they are labels.
        self.regions = case.network.regions
        self.groups = groups_of(len(case.logits), self.regions)  # labels whose Dice counts together
        self.spacing = tuple(np.array(case.spacing, dtype=float).tolist())
        self.noise_voxels = noise_voxels
        mask = np.ones(case.logits.shape[1:], np.bool_) if case.mask is None else case.mask
        padding = case.find_padding()
        if padding is not None:
            mask = mask & ~padding
        # The Dice that the network expects of itself.
        self.dice = synthetic.expected_dice(case.logits, mask, self.regions)
        image = normalize_intensity(case.image, default.intensity, case.mask, threads=threads)
        result = refine(
            case.logits,
            image,
            parameters=replace(default, intensity=IntensityParameters("none")),
            input_type="logits",
            allow_vanishing=True,  # Only rules that the user set remove much.
            spacing=case.spacing,
            mask=case.mask,
            regions=self.regions,
            threads=threads,
        )
        is_foreground = (result.label_map != 0) | (decode(case.logits, self.regions) != 0)
        # Without foreground, the box is that of the grid.
        inner = bounding_box(is_foreground & mask) or whole_box(mask.shape)
        box = grown(inner, (MARGIN,) * mask.ndim, mask.shape)
        in_channels = (slice(None), *box)
        self.image = np.ascontiguousarray(image[in_channels])  # (M, *box), of the whole case
        self.mask = mask[box]  # (*box)
        # (channels, *box), the network's and refined ones, 0 outside the mask: padding there may be
        # a constant as low as the lowest float32.
        nothing = np.float32(0.0)
        self.logits = np.where(self.mask, case.logits[in_channels], nothing)
        self.refined = np.where(self.mask, result.logits[in_channels], nothing)
        while self.mask.size > MAX_VOXELS:
            self.coarsen()

        # The Dice of labels with themselves is NaN if all have too few voxels to count.
        defined = [self.dice]
        for labels, _ in self.truths:
            defined.append(dice_of_maps(labels, labels, self.groups))
        if np.isnan(defined).any():
            raise InputError(f"no label has {MIN_VOXELS} voxels, which a comparison needs")

    def coarsen(self) -> None:
        """Make voxels twice as long along one axis."""
        factors = synthetic.halving(self.mask.shape, self.spacing)
        shares = synthetic.block_means(probabilities_of(self.refined, self.regions), factors)
        self.image = synthetic.block_means(self.image, factors)
        self.mask = synthetic.block_means(self.mask[None], factors)[0] >= 0.5
        self.spacing = tuple(np.multiply(self.spacing, factors).tolist())
        self.logits = synthetic.block_means(self.logits, factors)
        self.refined = synthetic.logits_of(shares, self.regions)

    @property
    def truths(self) -> tuple[Truth, Truth]:
        """The refined labels, and the network's own, made anew each time to save memory."""
        truths = []
        for logits in (self.refined, self.logits):
            labels = np.where(self.mask, decode(logits, self.regions), 0)
            truths.append((labels, synthetic.agreeing(self.logits, labels, self.regions)))
        refined, network = truths
        return refined, network

    @property
    def agreement(self) -> float:
        """Dice of the network's own labels to the refined ones."""
        (refined, _), (network, _) = self.truths
        return dice_of_maps(network, refined, self.groups)


def score_candidates(
    source: Source,
    candidates: Sequence[Candidate],
    seed: Sequence[int],
    threads: int,
    check: Callable[[], None],
) -> Float64:
    """Return the (kinds, 1 + candidates) Dice to the truths of a case after noise.

    The first is that of the network; `check` may raise to stop.
    """
    # The truths, with logits that are as wrong as each of NOISE_LEVELS says.
    draws = []
    for number, (truth, logits) in enumerate(source.truths):
        random = np.random.default_rng((*seed, number))
        noise = synthetic.make_noise(logits.shape, source.noise_voxels, random) * source.mask
        scale = synthetic.noise_scale(
            logits, noise, truth, source.mask, source.dice, source.regions
        )
        for level in NOISE_LEVELS:
            draws.append((truth, logits + np.float32(level * scale) * noise))

    def dice(labels: Array, truth: Array) -> float:
        return dice_of_maps(np.where(source.mask, labels, 0), truth, source.groups)

    plan = Plan(source.image, spacing=source.spacing, mask=source.mask, threads=threads)
    columns = [[dice(decode(logits, source.regions), truth) for truth, logits in draws]]
    # Candidates with the same kernels follow each other, so that these are built once.
    for candidate in candidates:
        check()
        parameters = replace(candidate.parameters, intensity=IntensityParameters("none"))
        column = []
        for truth, logits in draws:
            refined = plan.run(logits, parameters, input_type="logits", regions=source.regions)
            column.append(dice(refined.label_map, truth))
        columns.append(column)
    return np.array(columns).T
