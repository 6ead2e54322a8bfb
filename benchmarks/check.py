"""Is a result right, before its time counts.

Against the peers' results, and against exact rows of the kernel matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from workers.measure import Workload, softmax

from crfrefine.engines import get_backend
from crfrefine.engines.base import GridImage
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec

NUM_ROWS = 100
# A lattice errs by 1.5 % of a message at D = 4 and 3 % at D = 7 (docs/reference/accuracy.md). Twice
# that is a defect, not an approximation.
MAX_ROW_ERROR = 0.06
# Errors of messages of that size move marginals near 1/2, of which these noisy workloads have many,
# by about as much.
MAX_MARGINAL_RMS = 0.03
# With several vertices per voxel a lattice's result depends on where its cells happen to lie:
# flipping the volume alone moves marginals by up to 0.067 RMS at 6 to 9 vertices per voxel. So that
# much between two lattices says nothing against either.
MAX_LATTICE_RMS = 0.067
MIN_AGREEMENT = 0.98
ROW_REACH = 5.0  # in theta_alpha: what lies farther has a kernel below e^-12.5


def exact_rows(workload: Workload, count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the message of the bilateral kernel at sampled voxels, the same ones each time.

    These are flat indices of voxels, and (K values) / (K 1) there, (L, count).
    """
    values = softmax(workload.logits)
    if workload.mask is not None:
        inside = np.flatnonzero(workload.mask)
    else:
        inside = np.arange(workload.image[0].size)
    voxels = np.random.default_rng(20240229).choice(
        inside, size=min(count, inside.size), replace=False
    )
    meta = workload.meta
    reach = [int(np.ceil(ROW_REACH * meta["theta_alpha"] / step)) for step in meta["spacing"]]
    result = np.empty((values.shape[0], voxels.size))
    for column, voxel in enumerate(voxels):
        center = np.unravel_index(voxel, workload.grid_shape)
        box = tuple(
            slice(max(0, c - r), min(c + r + 1, n))
            for c, r, n in zip(center, reach, workload.grid_shape, strict=True)
        )
        offsets = [
            (np.arange(own.start, own.stop) - c) * step
            for own, c, step in zip(box, center, meta["spacing"], strict=True)
        ]
        exponent = sum(
            np.ix_(*((offset / meta["theta_alpha"]) ** 2 for offset in offsets)), np.float32(0.0)
        ).astype(np.float32)
        for channel in workload.image:
            difference = channel[box].astype(np.float32) - np.float32(channel[center])
            exponent += (difference / np.float32(255.0 * meta["theta_beta"])) ** 2
        kernel = np.exp(-0.5 * exponent).astype(np.float64)
        if workload.mask is not None:
            kernel *= workload.mask[box]
        result[:, column] = (
            values[(slice(None), *box)].reshape(len(values), -1) @ kernel.ravel() / kernel.sum()
        )
    return voxels, result


def message_at(
    workload: Workload, voxels: NDArray[np.int64], filter_name: str = "auto"
) -> NDArray[np.float32]:
    """One bilateral message of the engine at some voxels, (L, len(voxels))."""
    meta = workload.meta
    values = softmax(workload.logits)
    kernel = KernelSpec(
        "bilateral",
        (meta["theta_alpha"],) * len(workload.grid_shape),
        (meta["theta_beta"],) * len(workload.image),
    )
    image = GridImage(
        workload.image.astype(np.float32) / np.float32(255.0), workload.mask, meta["spacing"]
    )
    spec = KernelSetSpec((kernel,), "after", filter_name, num_labels=len(values), num_iterations=1)
    return get_backend("cpu").message(values, image, spec).reshape(len(values), -1)[:, voxels]


def _require(passed: bool, message: str) -> None:
    if not passed:
        raise SystemExit(f"benchmark: wrong result, so its time does not count: {message}")


def check_result(
    workload: Workload, results: dict[str, NDArray[Any]], our_lattice: Callable[[], NDArray[Any]]
) -> dict[str, float]:
    """Compare a message with exact rows, and our (L, N) marginals in the mask with the peers'.

    With far more vertices than voxels a lattice is a poor approximation, and another filter, held
    to exact rows, differs from it. That both do the same work is then seen from the same lattice:
    `our_lattice` gives the marginals of ours, which is not timed.
    """
    voxels, exact = exact_rows(workload, NUM_ROWS)
    error = float(np.sqrt(np.mean((message_at(workload, voxels) - exact) ** 2) / np.mean(exact**2)))
    _require(
        error <= MAX_ROW_ERROR, f"a bilateral message is off by {error:.1%} RMS of the exact one"
    )
    checks = {"message_relative_rms": error}
    ours = results["crfrefine"]
    if (theirs := results.get("pydensecrf2")) is not None:
        rms = _rms(ours, theirs)
        most = MAX_MARGINAL_RMS
        checks["pydensecrf2_difference_rms"] = rms
        if rms > MAX_MARGINAL_RMS:
            ours = our_lattice()
            most = MAX_LATTICE_RMS
            rms = _rms(ours, theirs)
        _require(rms <= most, f"marginals differ from pydensecrf2's by {rms:.4f} RMS")
        checks |= {
            "pydensecrf2_marginals_rms": rms,
            "pydensecrf2_label_agreement": _agreement(ours, theirs.argmax(axis=0)),
        }
    if (labels := results.get("simplecrf")) is not None:
        checks["simplecrf_label_agreement"] = _agreement(ours, labels.ravel())
    return checks


def _rms(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean((ours.astype(np.float64) - theirs) ** 2)))


def _agreement(ours: NDArray[Any], labels: NDArray[Any]) -> float:
    agreement = float(np.mean(ours.argmax(axis=0) == labels))
    _require(agreement >= MIN_AGREEMENT, f"only {agreement:.2%} of the labels agree with a peer's")
    return agreement
