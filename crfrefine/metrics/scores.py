"""How well a label map agrees with a truth: overlap and number of pieces, label by label."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray


def dice_score(labels: NDArray[Any], truth: NDArray[Any], label: int) -> float:
    """Return 2 |A ∩ B| / (|A| + |B|) of one label: 1 is perfect, 0 no overlap; NaN when neither map has the label."""
    found, wanted = labels == label, truth == label
    size = int(found.sum()) + int(wanted.sum())
    return 2 * int((found & wanted).sum()) / size if size else float("nan")


def count_components(labels: NDArray[Any], label: int) -> int:
    """Return the number of pieces of one label; voxels that share a face, an edge or a corner belong together."""
    from scipy import ndimage

    structure = ndimage.generate_binary_structure(labels.ndim, labels.ndim)
    return int(ndimage.label(labels == label, structure)[1])
