"""The device that `auto` stands for in a run on files."""

from __future__ import annotations

import math
from collections.abc import Sequence

from crfrefine.base.notes import Note, NoteKind
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.case_headers import read_case_headers
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.engines import get_backend
from crfrefine.engines.cuda.cupy_device import is_available
from crfrefine.errors import CrfRefineError
from crfrefine.parameters.model import CrfParameters

# Seconds that one thread takes per voxel and label for five steps with one appearance kernel: 0.05
# to 0.2 microseconds in the table of docs/reference/benchmarks.md.
SECONDS_PER_VALUE = 1e-7
# Seconds until a GPU refines its first case: CuPy is imported, its context opened, kernels loaded.
GPU_START = 2.0


def device_of_auto(
    cases: Sequence[CaseFiles], reading: ReadingOptions, parameters: CrfParameters, threads: int
) -> tuple[str, Note | None]:
    """Return the device that "auto" stands for, and a note if a GPU is there and is not taken.

    It is the GPU, if there is one, unless the CPU is expected to refine all cases before the GPU
    refines its first one. `cases` are all cases of a run, those of other parts too, so that all
    parts have one device. Headers are read until there is enough work for a GPU.
    """
    # The time of direct sums depends on bandwidths, so these always go to the GPU.
    is_known = parameters.mean_field.filter not in ("exact", "truncated")
    if not is_available() or not is_known:
        return get_backend("auto").name, None
    share = parameters.mean_field.num_iterations / 5 * max(1, len(parameters.bilateral)) / threads
    seconds = 0.0
    for files in cases:
        if files.lack:
            continue
        try:
            headers = read_case_headers(files, reading)
        except CrfRefineError:  # It is reported when its turn comes.
            continue
        num_values = math.prod(headers.images[0].grid_shape) * max(2, headers.network.num_labels)
        seconds += share * SECONDS_PER_VALUE * num_values
        if seconds > GPU_START:
            return get_backend("auto").name, None
    return "cpu", Note.of(NoteKind.FASTER_ON_CPU, seconds=max(seconds, 0.1))
