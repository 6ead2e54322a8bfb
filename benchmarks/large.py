"""Suite `large`: whole bodies of 118 labels and large CT volumes, in memory and through the command, in fresh processes.

Label maps are compared with the truth and the network's labels, and where the dense array of all labels is small enough, with what the
dense engine makes of it. A run that fails is recorded with its message. Records of what is not measured are kept.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from environment import source_hash
from large_cases import CASES, LargeCase, store
from numpy.typing import NDArray
from peers import BENCH, WORKERS
from processes import measure_command, run_worker
from workloads import WorkloadArrays, WorkloadSpec
from workloads import store as store_workload

IN_MEMORY_CASE = "body-2.7M"
IN_MEMORY_THETAS_MM = (1.5, 5.0)
PEER_THETA_MM = 5.0  # at 1.5 mm the peer's lattice has up to 5 vertices per voxel, twice 118 channels each: 17 GiB
WINDOW_HU = (-160.0, 240.0)
DEFAULT_CASES = ("body-2.7M", "body-30M", "ct-400-2", "labels-700")
LARGEST_DENSE = 1_000_000_000  # values: labels times voxels
MIN_AGREEMENT = 0.999
IN_MEMORY = ("memory", "peer")


@dataclass(frozen=True)
class LargeOptions:
    """What is measured, and how: names of cases, "memory" and "peer" among them; `data` has their folders."""

    cases: Sequence[str]
    threads: int
    config: str
    max_memory: str | None
    data: Path


def _volume(path: Path) -> NDArray[Any]:
    return np.asarray(nibabel.load(path).dataobj).T


def _dice(labels: NDArray[np.uint8], truth: NDArray[np.uint8], num_labels: int) -> float:
    """Mean over the labels besides background that are in the truth."""
    together = np.zeros((num_labels, num_labels), np.int64)
    for one, other in zip(labels, truth, strict=True):  # slice by slice: the index of a pair takes 8 bytes
        pairs = one.astype(np.int64) * num_labels + other
        together += np.bincount(pairs.ravel(), minlength=num_labels**2).reshape(num_labels, num_labels)
    sums = together.sum(axis=0) + together.sum(axis=1)
    there = together.sum(axis=0)[1:] > 0
    return float((2 * np.diag(together) / np.maximum(sums, 1))[1:][there].mean())


def _in_memory_workload(data: Path) -> tuple[Path, WorkloadSpec]:
    """The smallest body as arrays: float32 logits, the image in 8 bits over the soft-tissue window; one kernel, as in `default`."""
    case = CASES[IN_MEMORY_CASE]
    spec = WorkloadSpec(
        case.name,
        case.shape,
        case.num_labels,
        1,
        theta_alpha=IN_MEMORY_THETAS_MM[0],
        theta_beta=0.05,
        theta_gamma=1.0,
        spacing=case.spacing,
        peers=("pydensecrf2",),
        bilateral_weight=4.0,
        spatial_weight=0.0,
    )

    def make(_: WorkloadSpec) -> WorkloadArrays:
        folder = store(case, data)
        low, high = WINDOW_HU
        image = np.rint(np.clip((_volume(folder / "image_0000.nii.gz") - low) / (high - low), 0.0, 1.0) * 255).astype(np.uint8)
        logits = np.load(folder / "logits.npz")["logits"].astype(np.float32)
        return WorkloadArrays(image[None], logits, None, _volume(folder / "truth.nii.gz"))

    return store_workload(spec, BENCH / "data" / "in-memory", make=make), spec  # The case itself may lie in data, under the same name.


def _run_in_memory(options: LargeOptions, systems: Sequence[str]) -> dict[str, Any]:
    """The library's function on arrays, up to the label map and up to the marginals; the peer with one thread, which is all it has."""
    folder, spec = _in_memory_workload(options.data)
    case = store(CASES[IN_MEMORY_CASE], options.data)
    truth, network = _volume(case / "truth.nii.gz"), _volume(case / "network.nii.gz")
    runs: dict[str, Any] = {}
    for system in systems:
        for theta in IN_MEMORY_THETAS_MM if system == "memory" else (PEER_THETA_MM,):
            library, threads = ("crfrefine", str(options.threads)) if system == "memory" else ("pydensecrf2", "1")
            saved = BENCH / "results" / f"{spec.name}-{library}-{theta:g}.npy"
            load = _others_at_work()
            run = run_worker(library, folder, save=saved, theta_alpha=str(theta), threads=threads)
            labels = np.load(saved, mmap_mode="r").reshape(spec.num_labels, -1).argmax(axis=0).astype(np.uint8).reshape(truth.shape)
            saved.unlink()
            more = {
                "dice": [_dice(found, truth, spec.num_labels) for found in (network, labels)],
                "library": library,
                "theta_alpha": theta,
                "load": load,
            }
            more["equal_to_dense"] = float(np.mean(labels == _dense_labels(folder, f"{theta:g}", options.threads)))
            title = f"{spec.name}, theta_alpha {theta:g} mm, {library}"
            if system == "memory":
                _require_agreement(spec.name, more["equal_to_dense"])
                runs[title] = _stamped(run["stages"]["label map"], threads, **more)
                title += ", and marginals of all labels"
            runs[title] = _stamped(run, threads, **more)
    return runs


def _stamped(run: dict[str, Any], threads: int | str, **more: Any) -> dict[str, Any]:
    return run | more | {"threads": int(threads), "source": source_hash(), "date": datetime.now(UTC).strftime("%Y-%m-%d")}


def _others_at_work() -> float:
    """The machine's load before a run: wall times are those of the run alone only where this is near 0."""
    return os.getloadavg()[0]


def _command(case: LargeCase, folder: Path, output: Path, options: LargeOptions) -> list[str | Path]:
    given = [folder / "logits.npz"] if case.has_logits else [folder / "network.nii.gz", "--input-type", "labels"]
    command = Path(sys.executable).with_name("crfrefine")
    more = [] if options.max_memory is None else ["--max-memory", options.max_memory]
    head: list[str | Path] = [command, "infer", "-q", "-i", folder / "image_0000.nii.gz", "-p", *given, "-o", output]
    return [*head, "-c", options.config, "--threads", str(options.threads), *more]


def _dense_labels(folder: Path, parameters: str, threads: int) -> NDArray[np.uint8]:
    """What the dense engine says, computed in a process of its own, and kept for these sources."""
    saved = BENCH / "results" / f"{folder.name}-{Path(parameters).name}-dense-{source_hash()}.npy"
    if not saved.exists():
        saved.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, WORKERS / "run_dense.py", folder, saved, parameters, str(threads)], check=True)
    return np.load(saved)


def _require_agreement(name: str, share: float) -> None:
    if share < MIN_AGREEMENT:
        raise SystemExit(
            f"benchmark: {name}: wrong result, so its time does not count: only {share:.3%} of the labels are the dense engine's"
        )


def _run_command(case: LargeCase, options: LargeOptions) -> dict[str, Any]:
    folder = store(case, options.data)
    output = BENCH / "results" / f"{case.name}.nii.gz"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)
    load = _others_at_work()
    run = measure_command(_command(case, folder, output, options))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    run |= {
        "load": load,
        "memory_limit_mib": None if limit == resource.RLIM_INFINITY else limit / 2**20,
        "config": options.config,
        "max_memory": options.max_memory,
        "case": json.loads((folder / "case.json").read_text()),
    }
    if "error" in run:
        run["error"] = run["error"].replace(f"{folder}/", "")
    else:
        labels, truth = _volume(output), _volume(folder / "truth.nii.gz")
        network = _volume(folder / "network.nii.gz")
        run["dice"] = [_dice(found, truth, case.num_labels) for found in (network, labels)]
        run["voxels_changed"] = float(np.mean(labels != network))
        if case.has_logits and case.num_labels * case.num_voxels <= LARGEST_DENSE:
            run["equal_to_dense"] = float(np.mean(labels == _dense_labels(folder, options.config, options.threads)))
            _require_agreement(case.name, run["equal_to_dense"])
        output.unlink()
    return _stamped(run, options.threads)


def run(*, quick: bool, options: LargeOptions, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Measure the named cases once each, only the smallest when quick; return their records among those from `before`."""
    names = list(options.cases) or (["memory", IN_MEMORY_CASE] if quick else [*IN_MEMORY, *DEFAULT_CASES])
    runs: dict[str, Any] = dict((before or {}).get("runs", {}))
    for name in names:
        if name in IN_MEMORY:
            measured = _run_in_memory(options, [name])
        else:
            limit = "" if options.max_memory is None else f", --max-memory {options.max_memory}"
            measured = {f"{name}, {options.config}, command{limit}": _run_command(CASES[name], options)}
        for title, one in measured.items():
            figures = f"{one['seconds']:.1f} s, {one['processor_seconds']:.1f} s of processors, {one['peak_mib']:.0f} MiB"
            sys.stderr.write(f"  {title}: {figures}{'; ' + one['error'] if 'error' in one else ''}\n")
        runs |= measured
    return {"runs": runs}
