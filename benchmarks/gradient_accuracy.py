"""How far each filter's gradients are from the exact filter's: the section on gradients of `docs/reference/accuracy.md`.

Usage: gradient_accuracy.py [--no-docs] [--records FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dense_torch
import environment
import numpy as np
import torch
from exact import softmax
from gradient_tables import FILTERS, tables
from numpy.typing import NDArray
from peers import ROOT
from report import write_between_markers
from scipy.ndimage import gaussian_filter
from small_cases import cut
from workloads import WorkloadSpec

from crfrefine.engines import get_backend
from crfrefine.engines.base import Kernels, RunContext
from crfrefine.engines.grid_image import GridImage
from crfrefine.errors import CapacityError
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec, MeanFieldSpec

BANDWIDTHS = ((1.5, 0.05), (3.0, 0.1), (5.0, 0.1), (8.0, 0.3))  # theta_alpha in mm, theta_beta on the scale 0 to 1
LOSSES = ("cross entropy", "random linear")
LARGEST_TRUNCATED_MM = 3.0  # beyond it nobody waits for the direct sum
LARGEST_GRID_MODALITIES = 2
NUM_LABELS = 3
NUM_ITERATIONS = 5
NUM_CASES = 5
BILATERAL_WEIGHT, SPATIAL_WEIGHT, THETA_GAMMA = 3.0, 1.0, 3.0
RUN = MeanFieldSpec(
    np.repeat([[BILATERAL_WEIGHT], [SPATIAL_WEIGHT]], NUM_LABELS, axis=1), 1.0 - np.eye(NUM_LABELS), num_iterations=NUM_ITERATIONS
)
PATCH_VOXELS, PATCH_AMPLITUDE = 2.0, 2.0  # of the errors that logits have besides the workloads' white noise
OWN_SLOPE_STEP = 0.1  # of log theta, each way
SPACINGS = {2: (1.0, 1.5), 3: (1.0, 1.5, 0.8)}
CASE_SHAPES = {  # about 4000 voxels: few enough for all pairs in float64
    2: ((56, 70), (48, 84), (66, 61), (92, 44), (53, 75)),
    3: ((14, 16, 18), (20, 13, 16), (17, 11, 21), (12, 22, 15), (19, 18, 12)),
}


@dataclass(frozen=True)
class Case:
    """Part of a synthetic workload."""

    image: NDArray[np.float32]  # (M, *grid), 0 to 1
    logits: NDArray[np.float32]  # (L, *grid)
    labels: NDArray[np.uint8]  # (*grid), the true ones
    direction: NDArray[np.float64]  # (L, *grid), of the linear loss
    spacing: tuple[float, ...]

    def cross_entropy(self, refined: NDArray[Any]) -> float:
        """Mean over voxels."""
        return -float(np.log(np.take_along_axis(softmax(refined), self.labels[None].astype(np.int64), axis=0)).mean())

    def loss_gradient(self, refined: NDArray[Any], loss: str) -> NDArray[np.float64]:
        """Derivative of the loss, a mean over voxels, with respect to the refined logits."""
        if loss == "random linear":
            return self.direction / self.labels.size
        true = np.arange(NUM_LABELS).reshape(-1, *[1] * self.labels.ndim) == self.labels
        return (softmax(refined) - true) / self.labels.size


def cases(num_features: int) -> Iterator[Case]:
    """Cases of D features, two axes where D is 3, else three. Logits err in patches, as networks do, else nothing is left to learn."""
    num_axes = 2 if num_features == 3 else 3
    spec = WorkloadSpec("gradients", (), NUM_LABELS, num_features - num_axes, 0.0, 0.0, 0.0, spacing=SPACINGS[num_axes])
    rng = np.random.default_rng(num_features)
    for part in cut(spec, CASE_SHAPES[num_axes][:NUM_CASES], num_features):
        image = part.image.astype(np.float32) / np.float32(255.0)
        patches = gaussian_filter(rng.normal(size=part.logits.shape), (0.0, *[PATCH_VOXELS] * num_axes))
        logits = (part.logits + PATCH_AMPLITUDE * patches / patches.std()).astype(np.float32)
        yield Case(image, logits, part.labels, rng.normal(size=logits.shape), spec.spacing)


@dataclass(frozen=True)
class Gradients:
    """Derivatives of one loss; with respect to the logarithms of bandwidths, theta_alpha one for all axes."""

    logits: NDArray[np.float64]
    weight: NDArray[np.float64]  # bilateral, spatial
    theta_alpha: NDArray[np.float64]  # (1,)
    theta_beta: NDArray[np.float64]  # (M,)
    image: NDArray[np.float64]

    @property
    def theta(self) -> NDArray[np.float64]:
        """By all bandwidths' logarithms."""
        return np.concatenate([self.theta_alpha, self.theta_beta])


def _kernels(case: Case, filter_name: str, theta_alpha: float, theta_beta: Sequence[float]) -> Kernels:
    num_axes = len(case.spacing)
    kernels = KernelSpec((theta_alpha,) * num_axes, tuple(theta_beta)), KernelSpec((THETA_GAMMA,) * num_axes)
    spec = KernelSetSpec(kernels, "symmetric", filter_name, NUM_LABELS, NUM_ITERATIONS)
    return get_backend("cpu").kernels(GridImage(case.image, None, case.spacing), spec, RunContext(threads=1))


def approximate(case: Case, filter_name: str, theta_alpha: float, theta_beta: float) -> tuple[list[Gradients], str]:
    """What a layer with this filter gets, in float32, one entry a loss; and the filter's description."""
    kernels = _kernels(case, filter_name, theta_alpha, [theta_beta] * len(case.image))
    tape = kernels.forward(case.logits, RUN)
    result = []
    for loss in LOSSES:
        gradient = case.loss_gradient(tape.logits, loss).astype(np.float32)
        # Apart, since bandwidths without the image go another way.
        found = kernels.backward(tape, case.logits, gradient, wants_theta=True)
        image = kernels.backward(tape, case.logits, gradient, wants_theta=False, wants_image=True).image
        result.append(
            Gradients(
                found.logits.astype(np.float64),
                found.weights.sum(axis=1),
                found.theta_position.sum(axis=1) * theta_alpha,
                found.theta_intensity[0] * theta_beta,
                image.astype(np.float64),
            )
        )
    return result, kernels.filters[0]


def own_slopes(case: Case, filter_name: str, theta_alpha: float, theta_beta: float) -> NDArray[np.float64]:
    """Central differences of the cross entropy as this filter has it, by log theta_alpha and each log theta_beta."""
    theta = np.array([theta_alpha, *[theta_beta] * len(case.image)])
    slopes = np.empty_like(theta)
    for index in range(theta.size):
        ends = []
        for sign in (-1.0, 1.0):
            moved = theta * np.exp(sign * OWN_SLOPE_STEP * (np.arange(theta.size) == index))
            kernels = _kernels(case, filter_name, moved[0], moved[1:].tolist())
            tape = kernels.forward(case.logits, RUN)
            ends.append(case.cross_entropy(tape.logits))
        slopes[index] = (ends[1] - ends[0]) / (2.0 * OWN_SLOPE_STEP)
    return slopes


def exact(case: Case, theta_alpha: float, theta_beta: float) -> list[tuple[Gradients, dict[str, float]]]:
    """The truth, in float64; and with each loss what the slopes along the logarithms of theta_alpha and theta_beta are sums of.

    The derivative with respect to each voxel n's feature x is at hand, and dS/dlog theta = -sum_n x(n) dS/dx(n). Given is the sum of the
    absolute values of these contributions, x taken from its mean; of theta_beta, the largest of all modalities.
    """
    num_modalities, num_axes, shape = len(case.image), len(case.spacing), case.labels.shape
    places = dense_torch.positions(shape, case.spacing, torch.float64) / theta_alpha
    intensities = torch.from_numpy(case.image).double().flatten(1) / theta_beta
    features = torch.cat([places, intensities - intensities.mean(dim=1, keepdim=True)]).requires_grad_()
    logits = torch.from_numpy(case.logits).double().requires_grad_()
    weights = torch.tensor([BILATERAL_WEIGHT, SPATIAL_WEIGHT], dtype=torch.float64, requires_grad=True)
    refined = dense_torch.mean_field(
        logits,
        features,
        spacing=case.spacing,
        bilateral_weight=weights[0],
        spatial_weight=weights[1],
        theta_gamma=torch.tensor(THETA_GAMMA, dtype=torch.float64),
        num_iterations=NUM_ITERATIONS,
    )
    result = []
    for loss in LOSSES:
        gradient = torch.from_numpy(case.loss_gradient(refined.detach().numpy(), loss))
        by_logits, by_weights, by_features = torch.autograd.grad(refined, [logits, weights, features], gradient, retain_graph=True)
        contributions = -(features.detach() * by_features).numpy()
        slopes, parts = contributions.sum(axis=1), np.abs(contributions).sum(axis=1)
        gradients = Gradients(
            by_logits.numpy(),
            by_weights.numpy(),
            slopes[:num_axes].sum(keepdims=True),
            slopes[num_axes:],
            (by_features[num_axes:] / theta_beta).reshape(num_modalities, *shape).numpy(),
        )
        result.append((gradients, {"theta_alpha": float(parts[:num_axes].sum()), "theta_beta": float(parts[num_axes:].max())}))
    return result


def _relative(found: NDArray[np.float64], true: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


def _cosine(found: NDArray[np.float64], true: NDArray[np.float64]) -> float:
    return float(found @ true / (np.linalg.norm(found) * np.linalg.norm(true)))


def _errors(found: Gradients, truth: Gradients, parts: dict[str, float]) -> dict[str, Any]:
    """Of each gradient: the norm of the error over the norm of the truth, the cosine between them, and what bandwidths have besides."""
    record: dict[str, Any] = {}
    for name in ("logits", "weight", "theta_alpha", "theta_beta", "theta", "image"):
        own, true = getattr(found, name).ravel(), getattr(truth, name).ravel()
        record[name] = {"relative": _relative(own, true), "cosine": _cosine(own, true)}
        if name in parts:
            record[name] |= {
                "of_parts": float(np.abs(own - true).max()) / parts[name],
                "size_of_parts": float(np.abs(true).max()) / parts[name],
                "found": own.tolist(),
                "true": true.tolist(),
            }
    return record


def _serves(filter_name: str, num_modalities: int, theta_alpha: float) -> bool:
    if filter_name == "truncated":
        return theta_alpha <= LARGEST_TRUNCATED_MM
    return filter_name != "grid" or num_modalities <= LARGEST_GRID_MODALITIES


def measure() -> list[dict[str, Any]]:
    """One record for each dimension, setting, case, filter and loss."""
    records = []
    for num_features in range(3, 8):
        for theta_alpha, theta_beta in BANDWIDTHS:
            for case in cases(num_features):
                truths = exact(case, theta_alpha, theta_beta)
                for name in FILTERS:
                    if not _serves(name, len(case.image), theta_alpha):
                        continue
                    try:
                        founds, description = approximate(case, name, theta_alpha, theta_beta)
                        slopes = own_slopes(case, name, theta_alpha, theta_beta)
                    except CapacityError as error:  # a grid of far more cells than voxels is refused: no figure
                        sys.stderr.write(f"{name}: {error}\n")
                        continue
                    where = {"filter": name, "num_features": num_features, "bandwidths": (theta_alpha, theta_beta)}
                    where |= {"grid_shape": case.labels.shape, "description": description}
                    for loss, found, (truth, parts) in zip(LOSSES, founds, truths, strict=True):
                        errors = _errors(found, truth, parts)
                        if loss == "cross entropy":
                            errors["theta"]["from_own_slopes"] = _relative(found.theta, slopes)
                            errors["theta"]["own_slopes_from_true"] = _relative(slopes, truth.theta)
                        records.append({**where, "loss": loss, **errors})
            sys.stderr.write(f"D = {num_features}, theta_alpha {theta_alpha:g}, theta_beta {theta_beta:g}\n")
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the filters' gradients against the exact filter's.")
    parser.add_argument("--no-docs", action="store_true", help="leave the documents as they are")
    parser.add_argument("--records", type=Path, metavar="FILE", help="write every single figure there, as JSON")
    options = parser.parse_args()
    records = measure()
    if options.records:
        options.records.write_text(json.dumps(records, indent=1))
    head = environment.describe()
    text = f"{tables(records)}\n*{head['date']}, sources {head['source']}, {NUM_CASES} cases per cell.*\n"
    sys.stdout.write(text)
    if not options.no_docs:
        write_between_markers(ROOT / "docs" / "reference" / "accuracy.md", "gradients", text)


if __name__ == "__main__":
    main()
