"""One measured run of a trainable layer on a small case: crfrefine's, or the same model in plain PyTorch with autograd.

The first call is metered for memory; then calls are timed, and the best counts. Gradients go to logits, image, weights, bandwidths and
temperature. Options: --engine crfrefine | torch, --filter NAME (crfrefine), --backward yes | no, --threads N, --repeats N.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from measure import Meter, arguments
from parameters import crf_parameters

import crfrefine

sys.path.append(str(Path(__file__).resolve().parents[1]))
import dense_torch

workload, save_to, options = arguments()
meta = workload.meta
torch.set_num_threads(int(options["threads"]))
backward = options["backward"] == "yes"
image = torch.from_numpy(workload.image.astype(np.float32) / np.float32(255.0)).requires_grad_(backward)
logits = torch.from_numpy(workload.logits).requires_grad_(backward)
by_refined = torch.from_numpy(np.random.default_rng(0).standard_normal(workload.logits.shape, dtype=np.float32))
num_modalities, spacing = len(image), meta["spacing"]


class PlainLayer(torch.nn.Module):
    """The dense model, with the parameters that `CrfRnn` has."""

    def __init__(self) -> None:
        super().__init__()

        def log(value: float, count: int = 1) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.full((count,), value).log())

        self.weight = torch.nn.Parameter(torch.tensor([meta["bilateral_weight"], meta["spatial_weight"]], dtype=torch.float32))
        self.log_theta_alpha, self.log_theta_beta = log(meta["theta_alpha"]), log(meta["theta_beta"], num_modalities)
        self.log_theta_gamma, self.log_temperature = log(meta["theta_gamma"]), log(1.0)
        self.positions = dense_torch.positions(workload.grid_shape, spacing, torch.float32)

    def forward(self, logits: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        intensities = image.flatten(1)
        intensities = intensities - intensities.detach().mean(dim=1, keepdim=True)
        features = torch.cat([self.positions / self.log_theta_alpha.exp(), intensities / self.log_theta_beta.exp()[:, None]])
        return dense_torch.mean_field(
            logits / self.log_temperature.exp(),
            features,
            spacing=spacing,
            bilateral_weight=self.weight[0],
            spatial_weight=self.weight[1],
            theta_gamma=self.log_theta_gamma.exp()[0],
            num_iterations=meta["num_iterations"],
        )


if options["engine"] == "torch":
    layer = PlainLayer()
    refine = layer
    parameters = [layer.weight, layer.log_theta_alpha, layer.log_theta_beta, layer.log_theta_gamma, layer.log_temperature]
else:
    layer = crfrefine.CrfRnn(
        len(logits), num_modalities, parameters=crf_parameters(meta, filter_name=options.get("filter", "auto")), compatibility="potts"
    )

    def refine(logits: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return layer(logits[None], image[None], spacing)[0]

    parameters = [
        layer.raw_bilateral_weight,
        layer.raw_spatial_weight,
        layer.log_theta_alpha,
        layer.log_theta_beta,
        layer.log_theta_gamma,
        layer.log_temperature,
    ]


def call() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    with torch.set_grad_enabled(backward):
        refined = refine(logits, image)
    return refined, torch.autograd.grad(refined, [logits, image, *parameters], by_refined) if backward else ()


with Meter() as meter:
    refined, gradients = call()
seconds = []
for _ in range(int(options["repeats"])):
    start = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - start)

if save_to and backward:
    by_logits, by_image, *by_parameters = (gradient.numpy() for gradient in gradients)
    if options["engine"] == "torch":
        by_weight = by_parameters.pop(0)
    else:  # by the weights themselves, of which the layer holds a function
        pairs = [(layer.bilateral_weight, layer.raw_bilateral_weight), (layer.spatial_weight, layer.raw_spatial_weight)]
        slopes = [torch.autograd.grad(value.sum(), raw)[0].numpy() for value, raw in pairs]
        by_weight = np.concatenate([(by_raw / slope).ravel() for by_raw, slope in zip(by_parameters[:2], slopes, strict=True)])
        by_parameters = by_parameters[2:]
    alpha, beta, gamma, temperature = (gradient.ravel() for gradient in by_parameters)
    np.savez(
        save_to,
        refined=refined.detach().numpy(),
        logits=by_logits,
        image=by_image,
        weights=by_weight,
        theta_alpha=alpha,
        theta_beta=beta,
        theta_gamma=gamma,
        temperature=temperature,
    )
sys.stdout.write(json.dumps({"seconds": min(seconds), "runs": seconds, "peak_mib": meter.peak_mib}) + "\n")
del refined, gradients  # else the graph outlives the interpreter, and the kernels in it are reported as leaked
