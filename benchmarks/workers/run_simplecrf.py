"""One timed run of SimpleCRF. It takes 8-bit images and gives labels only.

Its axes are exchanged when the first and last extents differ, so the arrays are handed over with
those extents exchanged (a reshape, not a transpose): then `RStd` acts on the last axis and `ZStd`
on the first.
"""

from importlib.metadata import version

import denseCRF3D
import numpy as np
from measure import Meter, arguments, report, softmax

workload, save_to, _ = arguments()
meta = workload.meta
exchanged_shape = workload.grid_shape[::-1]
probabilities = np.ascontiguousarray(np.moveaxis(softmax(workload.logits), 0, -1)).reshape(
    *exchanged_shape, -1
)
image = np.ascontiguousarray(np.moveaxis(workload.image, 0, -1)).reshape(*exchanged_shape, -1)
parameters = {
    "MaxIterations": meta["num_iterations"],
    "PosW": meta["spatial_weight"],
    "BilateralW": meta["bilateral_weight"],
    "ModalityNum": image.shape[-1],
    "BilateralModsStds": (meta["theta_beta"] * 255.0,) * image.shape[-1],
}
for axis, step in zip("ZCR", meta["spacing"], strict=True):
    parameters |= {
        f"Pos{axis}Std": meta["theta_gamma"] / step,
        f"Bilateral{axis}Std": meta["theta_alpha"] / step,
    }

with Meter() as meter:
    labels = denseCRF3D.densecrf3d(image, probabilities, parameters)

report(
    meter, np.asarray(labels).reshape(workload.grid_shape), save_to, version=version("SimpleCRF")
)
