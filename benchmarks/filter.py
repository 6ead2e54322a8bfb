"""Time, memory and error of the Gaussian filter on points beside pydensecrf2 and MONAI.

    filter.py [--monai PYTHON] [--repeats N] [--large]

PYTHON has a MONAI with compiled extensions; --large: 10 million points.

Points are the voxels of a synthetic image: position and D - 3 intensities. Values are
probabilities, and a result is their mean, weighted by the Gaussian. Each system runs in a process
of its own. The shortest of N runs counts: the processor's time with one thread, wall clock with
two. Memory is the peak above inputs and libraries. "Build" is the lattice and the sums of weights.
pydensecrf2 filters within a step of its mean field: "filter" is a step less a step without kernels,
and the result follows from the marginals. MONAI's PHLFilter builds, filters and divides in a call.
Both have one thread, and no gradients. Errors are root mean squares at sampled points relative to
those of sums over all points in float64.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent / "workers"))

from measure import Meter, softmax

# voxels; on the scale 0 to 1
THETA_ALPHA = 5.0
THETA_BETA = 0.1
NUM_SAMPLED = 200
CASES = [
    ((100, 100, 100), num_features, num_values) for num_features in (4, 7) for num_values in (2, 5)
]  # grid, D, V
LARGE = ((250, 200, 200), 6, 2)
SYSTEMS = [
    ("crfrefine", 1),
    ("crfrefine", 2),
    ("crfrefine-list", 1),
    ("pydensecrf2", 1),
    ("monai", 1),
]
CLOCKS = {1: time.process_time, 2: time.perf_counter}

Outcome = tuple[dict[str, float], Any]  # seconds of each stage, and the result


def run_crfrefine(features: Any, values: Any, threads: int) -> Outcome:
    from crfrefine import Lattice

    started = (clock := CLOCKS[threads])()
    lattice = Lattice(features, method="lattice", threads=threads)
    result = lattice(values, normalization="after")  # with the sums of weights, which are kept
    first = clock()
    lattice(values, normalization="after")
    seconds = clock() - first
    return {"build": first - started - seconds, "filter": seconds}, result.reshape(len(values), -1)


def run_pydensecrf2(features: Any, values: Any, threads: int) -> Outcome:
    from pydensecrf import densecrf

    clock = CLOCKS[threads]
    logarithms = np.log(values)
    seconds = []
    for has_kernel in (False, True):
        crf = densecrf.DenseCRF(features.shape[1], len(values))
        crf.setUnaryEnergy(-logarithms)
        started = clock()
        if has_kernel:
            crf.addPairwiseEnergy(features, compat=1.0, normalization=densecrf.NORMALIZE_AFTER)
        built = clock()
        marginals, *buffers = crf.startInference()
        begun = clock()
        crf.stepInference(marginals, *buffers)
        seconds.append((built - started, clock() - begun))
    # up to a number per point; messages sum to 1
    message = np.log(np.maximum(np.asarray(marginals), 1e-30)) - logarithms
    result = message + (1.0 - message.sum(axis=0)) / len(values)
    return {"build": seconds[1][0], "filter": seconds[1][1] - seconds[0][1]}, result


def run_monai(features: Any, values: Any, threads: int) -> Outcome:
    import torch
    from monai.networks.layers import PHLFilter

    clock = CLOCKS[threads]
    sent = [torch.from_numpy(array)[None] for array in (values, features)]
    started = clock()
    result = PHLFilter.apply(*sent)[0].numpy()
    return {"build": clock() - started, "filter": 0.0}, result


def run_gradients(features: Any, values: Any, threads: int) -> float:
    import torch

    from crfrefine.layer.functional import gaussian_filter

    clock = CLOCKS[threads]
    sent = [torch.from_numpy(array)[None].requires_grad_() for array in (values, features)]
    started = clock()
    gaussian_filter(
        *sent, method="lattice", normalization="after", threads=threads
    ).square().sum().backward()
    return clock() - started


def work(system: str, file: str, threads: int, repeats: int) -> None:
    features, values, grid, sampled, exact = np.load(file).values()
    run: Any = {"pydensecrf2": run_pydensecrf2, "monai": run_monai}.get(system, run_crfrefine)
    few, few_values = (np.ascontiguousarray(array[:, :5000]) for array in (features, values))
    run(
        few.T if "crfrefine" in system else few, few_values, threads
    )  # Libraries load what they need.
    if system == "crfrefine":
        features, values = (array.reshape(-1, *grid) for array in (features, values))
    elif system == "crfrefine-list":
        features = features.T.copy()
    with Meter() as meter:
        first, result = run(features, values, threads)
    runs = [first, *(run(features, values, threads)[0] for _ in range(repeats - 1))]
    error = float(np.sqrt(np.mean((result[:, sampled] - exact) ** 2) / np.mean(exact**2)))
    best = min(runs, key=lambda seconds: sum(seconds.values()))
    figures = {**best, "all": sum(best.values()), "peak_mib": meter.peak_mib, "error": error}
    if system == "crfrefine":
        figures["gradients"] = min(
            run_gradients(features, values, threads) for _ in range(min(repeats, 2))
        )
    print(json.dumps(figures))


def store(file: Path, shape: tuple[int, ...], num_features: int, num_values: int) -> None:
    from workloads import WorkloadSpec, make

    arrays = make(
        WorkloadSpec("filter", shape, num_values, num_features - 3, THETA_ALPHA, THETA_BETA, 3.0)
    )
    columns = (
        np.indices(shape, np.float32) / np.float32(THETA_ALPHA),
        arrays.image / np.float32(255 * THETA_BETA),
    )
    features = np.concatenate(columns).reshape(num_features, -1)
    values = softmax(arrays.logits).reshape(num_values, -1)
    sampled = np.random.default_rng(0).choice(features.shape[1], NUM_SAMPLED, replace=False)
    exact = []
    for point in features[:, sampled].T.astype(np.float64):
        weights = np.exp(
            -0.5 * sum((row - own) ** 2 for row, own in zip(features, point, strict=True))
        )
        exact.append(values @ weights / weights.sum())
    np.savez(
        file,
        features=features,
        values=values,
        grid=shape,
        sampled=sampled,
        exact=np.transpose(exact),
    )


def main() -> None:
    from peers import interpreter, run_measured
    from report import describe, markdown_table, provenance
    from scripts import BENCH

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--monai", metavar="PYTHON")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    rows = []
    (BENCH / "data").mkdir(parents=True, exist_ok=True)
    for shape, num_features, num_values in [*CASES, *([LARGE] if options.large else [])]:
        file = BENCH / "data" / f"filter-{np.prod(shape)}-{num_features}-{num_values}.npz"
        if not file.exists():
            store(file, shape, num_features, num_values)
        for system, threads in SYSTEMS if options.monai else SYSTEMS[:-1]:
            program = options.monai if system == "monai" else interpreter(system)
            found = run_measured(
                [program, __file__, "--work", system, file, str(threads), str(options.repeats)]
            )
            seconds = [
                f"{found[stage]:.3f}" if found.get(stage) else "–"
                for stage in ("build", "filter", "all", "gradients")
            ]
            case = f"{np.prod(shape) / 1e6:g} M, {num_features}, {num_values}"
            rows.append(
                [
                    case,
                    f"{system}, {threads}",
                    *seconds,
                    f"{found['peak_mib']:.0f}",
                    f"{100 * found['error']:.2f} %",
                ]
            )
            sys.stderr.write(" | ".join(rows[-1]) + "\n")
    header = [
        "points, D, V",
        "system, threads",
        "build, s",
        "filter, s",
        "both, s",
        "result with gradients, s",
        "memory, MiB",
        "error",
    ]
    sys.stdout.write(f"{markdown_table(header, rows)}\n{provenance(describe())}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:4], *map(int, sys.argv[4:]))
    else:
        main()
