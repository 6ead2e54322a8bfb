"""Marginals of the same made-up cases by two builds of the engine: another compiler, another processor.

`wheel_marginals.py write FILE.npz` with each of them installed, then `wheel_marginals.py compare FILE.npz OTHER.npz [--within 1e-6]`.
It needs nothing but numpy and crfrefine. The cases come from the bits of PCG64 by additions and multiplications alone, so that
they are the same everywhere; a file has their checksum.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SHAPE, SPACING, NUM_MODALITIES = (13, 21, 8), (0.9, 1.3, 2.4), 2
CASES = {
    "exact": {"mean_field.filter": "exact"},
    "truncated": {"mean_field.filter": "truncated"},
    "lattice": {"mean_field.filter": "lattice"},
    "grid": {"mean_field.filter": "grid"},
    "auto": {},
    "fine lattice": {"mean_field.filter": "lattice", "bilateral.theta_alpha": 2.0, "bilateral.theta_beta": 0.1},
    "wide spatial": {"spatial.theta_gamma": 6.0},
    "temperature": {"mean_field.temperature": 1.7, "mean_field.tolerance": 0.01},
}
LABELS = (2, 3, 6)


def case(num_labels: int, num_modalities: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits (L, *grid) and image (M, *grid): boxes of labels, seen through noise."""
    random = np.random.Generator(np.random.PCG64(num_labels))
    x, y, z = np.indices(SHAPE)
    labels = (x // 6 + y // 9 + z // 5) % num_labels
    noise = random.random((num_labels + num_modalities, *SHAPE), dtype=np.float32)
    logits = np.stack([2 * (labels == label) for label in range(num_labels)]).astype(np.float32) + 4 * noise[:num_labels]
    image = np.stack([labels * (m + 1) % num_labels for m in range(num_modalities)]).astype(np.float32) + noise[num_labels:]
    return logits, image


def marginals() -> dict[str, NDArray[np.float32]]:
    import crfrefine

    found = {}
    for name, values in CASES.items():
        for num_labels in LABELS:
            num_modalities = 1 if values.get("mean_field.filter") == "grid" else NUM_MODALITIES
            logits, image = case(num_labels, num_modalities)
            parameters = crfrefine.CrfParameters().replace(**values)
            result = crfrefine.refine(logits, image, spacing=SPACING, parameters=parameters, threads=1)
            found[f"{name}, {num_labels} labels"] = np.asarray(result.marginals, dtype=np.float32)
    return found


def checksum() -> str:
    arrays = [array for num_labels in LABELS for array in case(num_labels, NUM_MODALITIES)]
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def write(path: Path) -> None:
    from crfrefine.engines.compiled import load_engine

    system = f"{platform.machine()} {load_engine().__name__}"
    np.savez(path, **{"inputs": np.array(checksum()), "system": np.array(system)}, **marginals())


def compare(path: Path, other: Path, within: float) -> float:
    """Print the largest difference of each case, and return the largest of all."""
    with np.load(path) as ours, np.load(other) as theirs:
        if ours["inputs"] != theirs["inputs"] or set(ours.files) != set(theirs.files):
            raise SystemExit(f"{path} and {other} are of different cases")
        print(f"{ours['system']} and {theirs['system']}")
        differences = {name: float(np.abs(ours[name] - theirs[name]).max()) for name in ours.files if name not in ("inputs", "system")}
        for name, difference in differences.items():
            changed = int((ours[name].argmax(0) != theirs[name].argmax(0)).sum())
            print(f"{difference:.2e}  {name}; {changed} voxels of another label")
    largest = max(differences.values())
    print(f"{largest:.2e}  largest; {'at most' if largest <= within else 'MORE THAN'} {within:.0e}")
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare marginals of two builds of the engine.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("write").add_argument("file", type=Path)
    comparing = commands.add_parser("compare")
    comparing.add_argument("file", type=Path)
    comparing.add_argument("other", type=Path)
    comparing.add_argument("--within", type=float, default=1e-6)
    options = parser.parse_args()
    if options.command == "write":
        write(options.file)
    else:
        sys.exit(compare(options.file, options.other, options.within) > options.within)


if __name__ == "__main__":
    main()
