"""Suite `growth`: seconds and memory as the number of voxels doubles."""

from __future__ import annotations

import itertools
import math
import shutil
import sys
from typing import Any

from peers import BENCH
from processes import run_worker
from workloads import growth_spec, store


def run(*, quick: bool) -> dict[str, Any]:
    """From 1 to 64 million voxels, to 4 when quick."""
    records = []
    for doublings in range(3 if quick else 7):
        spec = growth_spec(doublings)
        folder = store(spec, BENCH / "data")
        runs = [run_worker("crfrefine", folder) for _ in range(3)]
        shutil.rmtree(folder)  # up to 600 MB
        record = {
            "voxels": math.prod(spec.grid_shape),
            "seconds": min(run["seconds"] for run in runs),
            "peak_mib": min(run["peak_mib"] for run in runs),
            "runs": runs,
        }
        records.append(record)
        sys.stderr.write(f"  {record['voxels'] / 1e6:.0f} M voxels: {record['seconds']:.2f} s, {record['peak_mib']:.0f} MiB\n")
    ratios = [later["seconds"] / earlier["seconds"] for earlier, later in itertools.pairwise(records)]
    return {"sizes": records, "seconds_ratios": ratios, "worst_ratio": max(ratios)}
