"""A task of MONAI Label: scribbles correct a network's result, for several labels.

In the app's `init_infers`:

    prepare = [
        Orientationd(keys="input", axcodes="RAS"),
        Spacingd(keys="input", pixdim=(1, 1, 1)),
        NormalizeIntensityd(keys="input"),
    ]
    labels = {"background": 0, "spleen": 1, "liver": 2}
    task = CorrectWithScribbles(model_file, network, labels, prepare, roi_size=(96, 96, 96))
    return {"strokes": task}

`prepare` is what the network was trained with, on the key "input". Its logits are brought back to
the image's grid for the CRF. In the viewer, "foreground" among the task's options says which
structure the foreground scribbles are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import CopyItemsd, EnsureChannelFirstd, LoadImaged, ResampleToMatchd

import crfrefine

try:
    from monailabel.interfaces.tasks.infer_v2 import InferType
    from monailabel.tasks.infer.basic_infer import BasicInferTask
except ImportError:  # `correct` needs none of it.
    BasicInferTask = object

DRAWN_BACKGROUND = 255  # in the strokes of `refine`; 0 means that nothing is drawn


def correct(
    logits: np.ndarray,
    image: np.ndarray,
    scribbles: np.ndarray,
    spacing: Sequence[float],
    values: Mapping[int, int],
    **options: Any,
) -> np.ndarray:
    """Return the label map of a network's logits that scribbles correct.

    Args:
        logits: (L, *grid).
        image: (M, *grid).
        scribbles: (*grid) integers.
        spacing: mm along each axis.
        values: the label of each value of `scribbles` that is a scribble; 0 is background. Other
            values mean that nothing is drawn.
        options: others of `crfrefine.refine`.
    """
    strokes = np.zeros(scribbles.shape, np.int32)
    for value, label in values.items():
        strokes[scribbles == value] = label or DRAWN_BACKGROUND
    return crfrefine.refine(logits, image, spacing=spacing, strokes=strokes, **options).label_map


class CorrectWithScribbles(BasicInferTask):
    """The network runs once per request, then the scribbles correct its result."""

    def __init__(
        self,
        path: str,
        network: Any,
        labels: Mapping[str, int],
        prepare: Sequence[Callable],
        **options: Any,
    ) -> None:
        """Take what `BasicInferTask` takes; `labels` are the network's, background included."""
        names = [name for name, label in labels.items() if label]
        options = {
            "dimension": 3,
            "description": "Correct the network with scribbles",
            "input_key": "input",
            **options,
        }
        options.setdefault("config", {"foreground": names})
        super().__init__(
            path, network, InferType.SCRIBBLES, {name: labels[name] for name in names}, **options
        )
        self.prepare = prepare

    def scribble_values(self, request: Mapping[str, Any]) -> dict[int, int]:
        """Return the label of each value of scribbles.

        The viewer names them in `label_info`, else they follow the labels.
        """
        info = {entry.get("name"): entry.get("id") for entry in request.get("label_info") or []}
        chosen = request["foreground"]
        label = self.labels[chosen if isinstance(chosen, str) else chosen[0]]
        background, foreground = (
            info.get(f"{name}_scribbles") for name in ("background", "foreground")
        )
        return {background or len(self.labels) + 1: 0, foreground or len(self.labels) + 2: label}

    def pre_transforms(self, data: Any = None) -> Sequence[Callable]:
        """Return what loads image and scribbles, and prepares an image for the network."""
        keys = ["image", "label"]
        return [
            LoadImaged(keys=keys),
            EnsureChannelFirstd(keys=keys),
            CopyItemsd(keys="image", names="input"),
            *self.prepare,
        ]

    def post_transforms(self, data: Any = None) -> Sequence[Callable]:
        """Return what makes a label map of the logits."""
        return [
            self.place,
            ResampleToMatchd(keys="pred", key_dst="image", mode="bilinear", padding_mode="border"),
            self.refine,
        ]

    def place(self, data: dict[str, Any]) -> dict[str, Any]:
        """Give the logits the position of the image that the network got."""
        return {
            **data,
            "pred": MetaTensor(torch.as_tensor(data["pred"]).float(), affine=data["input"].affine),
        }

    def refine(self, data: dict[str, Any]) -> dict[str, Any]:
        """Replace the logits on the image's grid by the label map, for the task's writer."""
        logits, image, scribbles = (
            np.asarray(data[key].cpu()) for key in ("pred", "image", "label")
        )
        labels = correct(
            logits, image, scribbles[0], data["image"].pixdim.tolist(), self.scribble_values(data)
        )
        return {
            **data,
            "pred": labels.astype(np.uint8),
            "pred_meta_dict": {"affine": data["image"].meta["original_affine"]},
        }
