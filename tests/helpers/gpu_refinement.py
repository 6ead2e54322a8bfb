"""Refinement on a GPU engine of one's own, as tests need it that look at what stays on the device."""

from __future__ import annotations

import pytest

import crfrefine.engines
from crfrefine import CrfParameters
from crfrefine.engines.cuda import backend, kernels
from crfrefine.engines.cuda.backend import CudaBackend

PARAMETERS = CrfParameters().replace(
    **{"spatial.weight": 0.5, "bilateral.theta_alpha": 1.6, "bilateral.theta_beta": 0.3, "mean_field.filter": "truncated"}
)
"""A model that is soon computed."""


def on(engine: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `device="cuda"` mean this engine."""
    monkeypatch.setattr(crfrefine.engines, "_TABLE", ((r"cuda.*", lambda _: engine), *crfrefine.engines._TABLE))


def hold_nothing(engine: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the engine find no room to hold anything on its device."""
    for module in (backend, kernels):
        monkeypatch.setattr(module, "SHARE", 1 << 60)
    monkeypatch.setattr(type(engine.device), "free_bytes", lambda self: 1 << 40)
