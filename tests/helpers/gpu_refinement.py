"""Refinement on a GPU engine of one's own."""

from __future__ import annotations

import pytest

import crfrefine.engines
from crfrefine import CrfParameters
from crfrefine.engines.cuda.backend import CudaBackend

PARAMETERS = CrfParameters().replace(
    **{"spatial.weight": 0.5, "bilateral.theta_alpha": 1.6, "bilateral.theta_beta": 0.3, "mean_field.filter": "truncated"}
)
"""A model that is soon computed."""


def on(engine: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `device="cuda"` mean this engine."""
    monkeypatch.setattr(crfrefine.engines, "_TABLE", ((r"cuda.*", lambda _: engine), *crfrefine.engines._TABLE))
