"""Overfit a `CrfRnn` on one case, as both experiments on sharp edges do, and record the history."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from generated import Case

from crfrefine import CrfRnn


@dataclass
class History:
    """One value per step: cross-entropy in nats per voxel, and the parameters before the step."""

    loss: list[float] = field(default_factory=list)
    bilateral_weight: list[float] = field(default_factory=list)
    spatial_weight: list[float] = field(default_factory=list)
    theta_alpha: list[float] = field(default_factory=list)
    theta_beta: list[list[float]] = field(default_factory=list)
    theta_gamma: list[float] = field(default_factory=list)
    temperature: list[float] = field(default_factory=list)


def overfit(crf: CrfRnn, case: Case, num_steps: int) -> History:
    """Train what the layer learns on one case by Adam, with steps that become smaller and end at 0."""
    logits, image = torch.from_numpy(case.logits)[None], torch.from_numpy(case.image)[None]
    labels = torch.from_numpy(case.labels)[None].long()
    learns_theta = any(parameter.requires_grad for parameter in crf.group("theta"))
    # While the bandwidths stay the same, so do the kernels, which are most of the work.
    kernels = None if learns_theta else crf.build_kernels(image, case.spacing)
    # Bandwidths and temperature are held as logarithms: a step changes them by a tenth at most.
    rates = {"weights": 0.2, "theta": 0.1, "temperature": 0.1}
    optimizer = torch.optim.Adam([{"params": crf.group(name), "lr": rate} for name, rate in rates.items()])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    history = History()
    for _ in range(num_steps):
        optimizer.zero_grad()
        refined = crf(logits, image, case.spacing, kernels=kernels)
        loss = torch.nn.functional.cross_entropy(refined, labels)
        loss.backward()
        _record(history, crf, loss.item())
        optimizer.step()
        schedule.step()
    return history


def _record(history: History, crf: CrfRnn, loss: float) -> None:
    history.loss.append(loss)
    history.bilateral_weight.append(crf.bilateral_weight.item())
    history.spatial_weight.append(crf.spatial_weight.item())
    history.theta_alpha.append(crf.theta_alpha.item())
    history.theta_beta.append(crf.theta_beta[0].tolist())
    history.theta_gamma.append(crf.theta_gamma.item())
    history.temperature.append(crf.temperature.item())
