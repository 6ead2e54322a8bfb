"""A workload's parameters in crfrefine's terms: intensities are given on the scale 0 to 1, so nothing is normalized."""

from __future__ import annotations

from typing import Any

from crfrefine import CrfParameters


def crf_parameters(meta: dict[str, Any], *, filter_name: str = "auto") -> CrfParameters:
    """Both kernels, Potts, symmetric normalization, a fixed number of steps."""
    return CrfParameters().replace(
        **{
            "intensity.normalization": "none",
            "bilateral.weight": meta["bilateral_weight"],
            "bilateral.theta_alpha": meta["theta_alpha"],
            "bilateral.theta_beta": meta["theta_beta"],
            "spatial.weight": meta["spatial_weight"],
            "spatial.theta_gamma": meta["theta_gamma"],
            "compatibility.kind": "potts",
            "mean_field.num_iterations": meta["num_iterations"],
            "mean_field.tolerance": 0.0,
            "mean_field.normalization": "symmetric",
            "mean_field.filter": filter_name,
        }
    )
