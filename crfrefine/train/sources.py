"""The synthetic cases of a real one: drawn around its foreground, and refined by candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.label_maps import bounding_box, grown, whole_box
from crfrefine.arrays.region_scheme import RegionScheme, decode, probabilities_of
from crfrefine.base.array_types import Array, Bool, Float32, Float64
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


@dataclass(frozen=True)
class Source:
    """The part of a case around its foreground that its synthetic cases are made from."""

    case_id: str
    voxel: float  # side in mm of a voxel of the case
    regions: RegionScheme | None  # of the channels; None means that they are labels
    image: Float32  # (M, *box), normalized on the whole case
    mask: Bool  # (*box)
    spacing: tuple[float, ...]
    logits: Float32  # (channels, *box), the network's
    refined: Float32  # (channels, *box), refined by `default`
    dice: float  # that the network expects of itself
    # How many voxels of the synthetic case, coarsened or not, a voxel of the noise is long: see
    # `docs/decisions`.
    noise_voxels: float

    def coarsened(self) -> Source:
        """Return the source with voxels that are twice as long along one axis."""
        factors = synthetic.halving(self.mask.shape, self.spacing)
        shares = synthetic.block_means(probabilities_of(self.refined, self.regions), factors)
        inside = synthetic.block_means(self.mask[None], factors)[0]
        return replace(
            self,
            image=synthetic.block_means(self.image, factors),
            mask=inside >= 0.5,
            spacing=tuple(np.multiply(self.spacing, factors).tolist()),
            logits=synthetic.block_means(self.logits, factors),
            refined=synthetic.logits_of(shares, self.regions),
        )

    @property
    def truths(self) -> tuple[Truth, Truth]:
        """The refined labels, and the network's own, made anew each time to save memory."""
        truths = []
        for logits in (self.refined, self.logits):
            labels = np.where(self.mask, decode(logits, self.regions), 0)
            truths.append((labels, synthetic.agreeing(self.logits, labels, self.regions)))
        refined, network = truths
        return refined, network

    @cached_property
    def groups(self) -> Sequence[tuple[int, ...]]:
        """The labels whose Dice counts together."""
        return groups_of(len(self.logits), self.regions)

    @property
    def agreement(self) -> float:
        """Dice of the network's own labels to the refined ones."""
        (refined, _), (network, _) = self.truths
        return dice_of_maps(network, refined, self.groups)


def make_source(
    case: Case, default: CrfParameters, threads: int, noise_voxels: float = 1.0
) -> Source:
    """Return the source of a case's synthetic ones, coarsened to MAX_VOXELS.

    Logits outside the mask are 0.

    Raise InputError for a label map, and for a case without a label of MIN_VOXELS.
    """
    if case.input_kind == "labels":
        raise InputError(
            "a label map does not say how sure the network is: without "
            "labels, give logits or probabilities, or use the preset `default`"
        )
    mask = np.ones(case.logits.shape[1:], np.bool_) if case.mask is None else case.mask
    padding = case.find_padding()
    if padding is not None:
        mask = mask & ~padding
    expected_dice = synthetic.expected_dice(case.logits, mask, case.network.regions)
    image = normalize_intensity(case.image, default.intensity, case.mask, threads=threads)
    result = refine(
        case.logits,
        image,
        parameters=replace(default, intensity=IntensityParameters("none")),
        input_type="logits",
        allow_vanishing=True,  # Only rules that the user set remove much.
        spacing=case.spacing,
        mask=case.mask,
        regions=case.network.regions,
        threads=threads,
    )
    is_foreground = (result.label_map != 0) | (decode(case.logits, case.network.regions) != 0)
    # Without foreground, the box is that of the grid.
    inner = bounding_box(is_foreground & mask) or whole_box(mask.shape)
    box = grown(inner, (MARGIN,) * mask.ndim, mask.shape)
    in_channels = (slice(None), *box)
    mask = mask[box]
    # Padding, outside the mask, may be a constant as low as the lowest float32.
    nothing = np.float32(0.0)
    source = Source(
        case.case_id,
        voxel_length(case.spacing),
        case.network.regions,
        np.ascontiguousarray(image[in_channels]),
        mask,
        tuple(np.array(case.spacing, dtype=float).tolist()),
        np.where(mask, case.logits[in_channels], nothing),
        np.where(mask, result.logits[in_channels], nothing),
        expected_dice,
        noise_voxels,
    )
    while source.mask.size > MAX_VOXELS:
        source = source.coarsened()

    # The Dice of labels with themselves is NaN if all have too few voxels to count.
    defined = [source.dice]
    for labels, _ in source.truths:
        defined.append(dice_of_maps(labels, labels, source.groups))
    if np.isnan(defined).any():
        raise InputError(f"no label has {MIN_VOXELS} voxels, which a comparison needs")
    return source


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

    def dice(label_maps: Iterable[Array]) -> list[float]:
        values = []
        for labels, (truth, _) in zip(label_maps, draws, strict=True):
            values.append(dice_of_maps(np.where(source.mask, labels, 0), truth, source.groups))
        return values

    plan = Plan(source.image, spacing=source.spacing, mask=source.mask, threads=threads)
    columns = [dice(decode(logits, source.regions) for _, logits in draws)]
    # Candidates with the same kernels follow each other, so that these are built once.
    for candidate in candidates:
        check()
        parameters = replace(candidate.parameters, intensity=IntensityParameters("none"))
        label_maps = []
        for _, logits in draws:
            refined = plan.run(logits, parameters, input_type="logits", regions=source.regions)
            label_maps.append(refined.label_map)
        columns.append(dice(label_maps))
    return np.array(columns).T
