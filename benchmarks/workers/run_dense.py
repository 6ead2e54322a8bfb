"""The label map that the dense engine gives, all labels in memory at once: what shortcuts are compared with.

Arguments: FOLDER OUTPUT.npy PARAMETERS THREADS. Of a large case, PARAMETERS is a preset or file; of a workload, its theta_alpha.
"""

import json
import sys
from pathlib import Path

import nibabel
import numpy as np
from parameters import crf_parameters

from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.engines import get_backend
from crfrefine.engines.base import RunContext
from crfrefine.engines.grid_image import GridImage
from crfrefine.io import read_header
from crfrefine.parameters.model import as_parameters

folder, output, wanted, threads = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
if (folder / "workload.json").exists():
    meta = json.loads((folder / "workload.json").read_text()) | {"theta_alpha": float(wanted)}
    parameters, spacing = crf_parameters(meta), tuple(meta["spacing"])
    image = np.load(folder / "image.npy").astype(np.float32) / np.float32(255.0)
    logits = np.load(folder / "logits.npy")
    axes = (0, 1, 2)
else:
    parameters = as_parameters(wanted)
    image = np.ascontiguousarray(np.asarray(nibabel.load(folder / "image_0000.nii.gz").dataobj).T, dtype=np.float32)[None]
    spacing = read_header(folder / "image_0000.nii.gz").spacing[::-1]
    logits = np.load(folder / "logits.npz")["logits"].astype(np.float32)
    axes = (2, 1, 0)
normalized = normalize_intensity(image, parameters.intensity, None, threads=threads)
model = parameters.resolve(len(logits), 1, 3)
outcome = get_backend("cpu").mean_field(logits, GridImage(normalized, None, spacing, axes=axes), model, RunContext(threads=threads))
np.save(output, outcome.logits.argmax(axis=0).astype(np.uint8))
