"""Three strokes and what they did: the slice of the demo's phantom."""

from __future__ import annotations

import numpy as np
from drawing import COLORS, gray, new_figure, save, show
from scene import PARAMETERS, PICTURES, Scene, phantom_slice
from scipy.ndimage import distance_transform_edt, label

import crfrefine

# of a stroke, voxels
NUM_STROKES = 3
HALF_LENGTH = 3


def add_stroke(strokes: np.ndarray, scene: Scene, label_map: np.ndarray) -> None:
    """Draw a short line in the middle of the largest error, with the right label."""
    errors, _ = label(label_map != scene.labels)
    error = errors == 1 + np.bincount(errors.ravel())[1:].argmax()
    right = np.bincount(scene.labels[error]).argmax()
    error &= scene.labels == right
    row, column = np.unravel_index(distance_transform_edt(error).argmax(), error.shape)
    line = np.zeros_like(error)
    line[row, max(0, column - HALF_LENGTH) : column + HALF_LENGTH + 1] = True
    strokes[line & error] = right or 255


def draw() -> None:
    """Panels: truth, refined without strokes, the strokes, refined with them."""
    scene = phantom_slice()
    strokes = np.zeros(scene.labels.shape, np.uint8)
    before = after = scene.refine()
    for _ in range(NUM_STROKES):
        add_stroke(strokes, scene, after.label_map)
        after = crfrefine.refine(
            scene.logits,
            scene.image,
            spacing=scene.spacing,
            strokes=strokes,
            parameters=PARAMETERS,
            threads=1,
        )
    picture = gray(scene.image[0]) * 0.8
    colored = np.stack([picture] * 3, axis=-1)
    for value in np.unique(strokes[strokes > 0]):
        color = "#FFFFFF" if value == 255 else COLORS[value - 1]
        colored[strokes == value] = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    figure = new_figure(9.6, 2.8, "Three strokes")
    panels = figure.subplots(1, 4)
    show(panels[0], picture, scene.spacing, "truth", scene.labels)
    show(
        panels[1],
        picture,
        scene.spacing,
        f"without strokes: Dice {scene.dice(before.label_map):.3f}",
        before.label_map,
    )
    show(panels[2], colored, scene.spacing, "strokes (white: background)")
    show(
        panels[3],
        picture,
        scene.spacing,
        f"with strokes: Dice {scene.dice(after.label_map):.3f}",
        after.label_map,
    )
    save(figure, PICTURES / "strokes.png")


if __name__ == "__main__":
    draw()
