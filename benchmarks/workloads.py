"""The synthetic cases that speed and memory are measured on.

An image is constant in each label, plus Gaussian-smoothed noise at three scales, plus white noise,
stored in 8 bits because one of the peers takes nothing else; logits are white noise plus 2 at the
true label.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

NOISE_SIGMAS_VOXELS = (1.5, 4.0, 12.0)
NOISE_AMPLITUDES = (0.04, 0.06, 0.08)
WHITE_NOISE = 0.03
BRAIN_SEMI_AXES = (68.0, 86.0, 57.0)  # voxels: 1.39 million of them


@dataclass(frozen=True)
class WorkloadSpec:
    """One workload; lengths in mm, intensities on the scale 0 to 1."""

    name: str
    grid_shape: tuple[int, ...]
    num_labels: int
    num_modalities: int
    theta_alpha: float
    theta_beta: float
    theta_gamma: float
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)
    brain: str = "no"  # no | zero outside it | mask: nothing outside it counts
    peers: tuple[str, ...] = ("pydensecrf2", "simplecrf")
    bilateral_weight: float = 3.0
    spatial_weight: float = 1.0
    num_iterations: int = 5


_SMALL_BODY = WorkloadSpec(
    "S", (120, 150, 100), 2, 1, theta_alpha=8.0, theta_beta=0.1, theta_gamma=3.0
)
_HEAD = WorkloadSpec(
    "L", (240, 240, 155), 5, 4, theta_alpha=8.0, theta_beta=0.1, theta_gamma=3.0, brain="zero"
)
_BRAIN_IN_HEAD = replace(_HEAD, name="Lm-full", brain="mask", peers=("pydensecrf2",))
_BRAIN_ONLY = replace(
    _BRAIN_IN_HEAD, name="Lm", grid_shape=tuple(int(2 * axis) + 1 for axis in BRAIN_SEMI_AXES)
)

WORKLOADS = {
    spec.name: spec
    for spec in (
        _SMALL_BODY,
        replace(_SMALL_BODY, name="S-1.5mm", theta_alpha=1.5, theta_beta=0.05, theta_gamma=1.0),
        replace(_SMALL_BODY, name="S-fine", theta_alpha=3.0, theta_beta=0.02),
        replace(_SMALL_BODY, name="M", grid_shape=(200, 200, 63), spacing=(1.0, 1.0, 2.0)),
        _HEAD,
        _BRAIN_ONLY,
        replace(_BRAIN_ONLY, name="Lm-mid", theta_alpha=5.0, theta_beta=0.05),
        replace(_BRAIN_ONLY, name="Lm-fine", theta_alpha=3.0, theta_beta=0.02),
        _BRAIN_IN_HEAD,
        replace(_BRAIN_IN_HEAD, name="Lm-mid-full", theta_alpha=5.0, theta_beta=0.05),
    )
}


def accuracy_spec(num_features: int, theta_alpha: float, theta_beta: float) -> WorkloadSpec:
    """A case with D = `num_features`: three axes where D allows, the rest modalities."""
    num_axes = min(3, num_features - 1)
    grid_shape, spacing = {
        1: ((20_000,), (1.0,)),
        2: ((300, 240), (1.0, 1.5)),
        3: ((56, 70, 44), (1.0, 1.0, 1.5)),
    }[num_axes]
    name = f"accuracy-{num_features}"
    num_modalities = num_features - num_axes
    return WorkloadSpec(
        name, grid_shape, 3, num_modalities, theta_alpha, theta_beta, 3.0, spacing=spacing, peers=()
    )


@dataclass(frozen=True)
class WorkloadArrays:
    """The arrays of one workload."""

    image: NDArray[np.uint8]  # (M, *grid)
    logits: NDArray[np.float32]  # (L, *grid)
    mask: NDArray[np.bool_] | None  # (*grid)


def _smooth_noise(
    shape: tuple[int, ...], sigma: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    noise = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap")
    # On a grid no larger than the filter all that is left is nearly one constant: it must not drown
    # the rest once the rest is scaled up.
    noise -= noise.mean()
    noise /= noise.std()
    return noise


def _squared_radius(
    shape: tuple[int, ...], center: tuple[float, ...], semi_axes: tuple[float, ...]
) -> NDArray[np.float32]:
    axes = [
        ((np.arange(n) - c) / a).astype(np.float32) ** 2
        for n, c, a in zip(shape, center, semi_axes, strict=True)
    ]
    return sum(np.ix_(*axes), np.zeros((), np.float32))


def _label_map(spec: WorkloadSpec, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Nested blobs with wavy surfaces.

    Label 1 around label 2 around label 3 ..., off the center.
    """
    extents = spec.grid_shape if spec.brain == "no" else tuple(2 * a for a in BRAIN_SEMI_AXES)
    center = tuple(
        (n - 1) / 2 + 0.06 * e * (-1) ** axis
        for axis, (n, e) in enumerate(zip(spec.grid_shape, extents, strict=True))
    )
    wave = 0.25 * _smooth_noise(spec.grid_shape, min(6.0, min(spec.grid_shape) / 6), rng)
    outer = 0.32 if spec.brain == "no" else 0.25
    labels = np.zeros(spec.grid_shape, np.uint8)
    for label in range(1, spec.num_labels):
        size = outer * (spec.num_labels - label) / (spec.num_labels - 1)
        labels[
            _squared_radius(spec.grid_shape, center, tuple(size * e for e in extents)) + wave < 1.0
        ] = label
    return labels


def make(spec: WorkloadSpec) -> WorkloadArrays:
    """Make a workload: the same arrays each time for the same grid, labels and modalities."""
    seed = zlib.crc32(f"{spec.grid_shape} {spec.num_labels} {spec.num_modalities}".encode())
    rng = np.random.default_rng(seed)
    labels = _label_map(spec, rng)
    mask = None
    if spec.brain != "no":
        mask = (
            _squared_radius(
                spec.grid_shape, tuple((n - 1) / 2 for n in spec.grid_shape), BRAIN_SEMI_AXES
            )
            <= 1.0
        )
    image = np.empty((spec.num_modalities, *spec.grid_shape), np.uint8)
    for modality in range(spec.num_modalities):
        levels = 0.3 + 0.4 * rng.permutation(spec.num_labels) / (spec.num_labels - 1)
        intensity = levels.astype(np.float32)[labels]
        for sigma, amplitude in zip(NOISE_SIGMAS_VOXELS, NOISE_AMPLITUDES, strict=True):
            intensity += amplitude * _smooth_noise(spec.grid_shape, sigma, rng)
        intensity += WHITE_NOISE * rng.standard_normal(spec.grid_shape, dtype=np.float32)
        image[modality] = np.clip(np.rint(255.0 * intensity), 0, 255)
        if mask is not None:
            image[modality][~mask] = 0
    logits = rng.standard_normal((spec.num_labels, *spec.grid_shape), dtype=np.float32)
    for label in range(spec.num_labels):
        logits[label][labels == label] += 2.0
    return WorkloadArrays(image, logits, mask if spec.brain == "mask" else None)


def store(spec: WorkloadSpec, root: Path) -> Path:
    """The folder of a workload's arrays, made when it is not there."""
    folder = root / spec.name
    description: dict[str, Any] = json.loads(json.dumps(asdict(spec)))
    marker = folder / "workload.json"
    if marker.exists() and json.loads(marker.read_text()) == description:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    arrays = make(spec)
    for name in ("image", "logits", *(["mask"] if arrays.mask is not None else [])):
        np.save(folder / f"{name}.npy", getattr(arrays, name))
    marker.write_text(json.dumps(description))
    return folder
