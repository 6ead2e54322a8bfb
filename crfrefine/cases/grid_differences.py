"""Why a file is on another grid, where its header or its sizes show it, and what to do."""

from __future__ import annotations

import shlex
from collections import Counter
from functools import partial
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.geometry import farthest_distance, reorientation, same_grid
from crfrefine.base.text import TIMES
from crfrefine.io.nifti import set_sform_from_qform
from crfrefine.io.paths import stem_of
from crfrefine.io.text_header import MM_PER_UNIT
from crfrefine.io.volume import VolumeHeader

LABEL_AXIS_FIRST = (
    "Its axes are in another order. Move the label axis to the end, (x, y, z, label), "
    "as np.moveaxis(array, 0, -1) does; an .npz or .npy holds (label, z, y, x)."
)
PLANE_ELSEWHERE = (
    "Its last axis is taken for the labels, (x, y, label), if its first plane is in the place of "
    "the image: save it with the image's affine."
)
OTHER_UNIT = (
    "Their voxel sizes differ by the same factor along each axis, that of two units of length. "
    "Some programs ignore the unit in a header: set the right one, or take the affine of the image."
)
_PLURALS = ("logits", "labels", "strokes", "structures")


def verb_for(what: str, singular: str, plural: str) -> str:
    """Return the form of a verb that fits the user's word for a file."""
    if what in _PLURALS:
        return plural
    return singular


def explain_difference(
    reference: VolumeHeader,
    name: str,
    other: VolumeHeader,
    what: str,
    *,
    is_elsewhere: bool = False,
) -> str | None:
    """Return why a file, `what`, is not on the grid of another one, `name`, and what to do.

    None means that neither header nor sizes show it. Sizes alone tell that axes are in another
    order only if the grids have hardly a place in common (`is_elsewhere`).
    """
    shape = reference.grid_shape
    # A file with the affine of the other one, or without any: its axes are not turned.
    has_its_affine = same_grid(shape, reference.affine, shape, other.affine)
    if is_elsewhere or has_its_affine:
        order = _explain_order(reference, name, other)
        if order is not None:
            return order

    # Planes of the size of an image that is a single plane.
    is_plane = (*shape, 1)[2] == 1
    is_stack = len(other.grid_shape) == 3 and other.grid_shape[2] > 1 and other.num_channels == 1
    if is_plane and is_stack and other.grid_shape[:2] == shape[:2]:
        return PLANE_ELSEWHERE

    # Sizes that fit, of which one is taken for the channels.
    sizes = Counter(shape)
    other_sizes = Counter(other.grid_shape)
    if sizes != other_sizes and sizes <= other_sizes + Counter([other.num_channels]):
        return LABEL_AXIS_FIRST
    if other.affine is None:
        placed = shlex.quote(f"{stem_of(other.path)}_placed.nii.gz")
        command = f"crfrefine convert {shlex.quote(str(other.path))} {placed} --like"
        return (
            f"{other.path.name} has no geometry, and nothing is resampled by a guess. Say how its "
            "axes run, such as RAS if x, y and z run to the right, to the front and up:\n"
            f"    {command} {shlex.quote(str(reference.path))} --axes RAS\n"
            f"  and give {placed} in its place, with --resample if it is not on the grid of the "
            f"{name}."
        )
    if reference.spacing is not None and other.spacing is not None and shape == other.grid_shape:
        ratios = np.array(other.spacing) / np.array(reference.spacing)
        factors = np.array([factor for factor in MM_PER_UNIT.values() if factor != 1.0])
        is_unit = np.isclose(ratios[0], [*factors, *(1 / factors)])
        if is_unit.any() and np.allclose(ratios, ratios[0]):
            return OTHER_UNIT
    forms = _explain_forms(reference, name, other, what)
    return forms or _explain_lost_header((name, reference), (what, other))


def _explain_order(reference: VolumeHeader, name: str, other: VolumeHeader) -> str | None:
    """Return the order of the axes of a file, by their sizes, and how to transpose it back.

    None means that they fit as they are, or not at all. Of several orders, the reversed one comes
    first: arrays of other libraries are (z, y, x).
    """
    shape = reference.grid_shape
    num_axes = len(shape)
    if shape == other.grid_shape or num_axes != len(other.grid_shape):
        return None
    for order in permutations(reversed(range(num_axes))):
        if tuple(other.grid_shape[axis] for axis in order) == shape:
            break
    else:
        return None
    letters = ", ".join("xyz"[axis] for axis in np.argsort(order))
    sizes = TIMES.join(map(str, other.grid_shape))
    wanted = TIMES.join(map(str, shape))
    problem = (
        f"Its axes are in another order: {sizes} voxels are the {name}'s {wanted} as ({letters})."
    )
    if other.affine is None:
        stored = tuple(num_axes - order[num_axes - 1 - axis] for axis in range(num_axes))
        return (
            f"{problem}\n  Transpose them back, np.transpose(array, {(0, *stored)}): "
            "an .npz or .npy holds (label, z, y, x)."
        )
    channels = (num_axes,) if other.num_channels > 1 else ()
    return (
        f"{problem}\n  Transpose them back, np.transpose(array, {order + channels}) of the array "
        f"that nibabel loads, and save it with the affine of the {name}."
    )


def has_default_place(header: VolumeHeader) -> bool:
    """Return whether the first voxel or the center is at 0, as programs write without a header."""
    affine, spacing = header.geometry()
    middle = affine[:3, : len(spacing)] @ (np.array(header.grid_shape) - 1) / 2
    origin = affine[:3, 3]
    return bool(np.allclose(origin, 0.0, atol=1e-3) or np.allclose(origin, -middle, atol=1e-3))


def _explain_lost_header(*files: tuple[str, VolumeHeader]) -> str | None:
    """Return which of two files has lost its header, and the repair; None if neither has.

    Of as many voxels, it has what programs write without a header: a first voxel or a center at 0,
    axes along those of the world, and voxels of 1 mm; the rest of its geometry is that of the other
    one. Or it is in LPS as if that were RAS.
    """
    nearly = partial(np.allclose, rtol=1e-3, atol=1e-3)
    for (name, reference), (what, other) in (files, files[::-1]):
        if other.grid_shape != reference.grid_shape:
            continue
        affine, spacing = other.geometry()
        like, like_spacing = reference.geometry()
        num_axes = len(spacing)
        directions = affine[:3, :num_axes] / spacing
        is_default = (
            nearly(np.abs(directions), np.eye(3)[:, :num_axes]),
            nearly(spacing, 1.0),
            has_default_place(other),
        )
        is_equal = (
            nearly(directions, like[:3, :num_axes] / like_spacing),
            nearly(spacing, like_spacing),
            nearly(affine[:3, 3], like[:3, 3]),
        )
        is_lost = not all(is_equal) and all(map(max, is_default, is_equal))
        is_lps = nearly(affine, np.diag([-1.0, -1.0, 1.0, 1.0]) @ like)
        if is_lost or is_lps:
            path = shlex.quote(str(other.path))
            return (
                f"The {what} {verb_for(what, 'has', 'have')} as many voxels as the {name} along "
                "each axis, and the geometry that programs write without a header: it seems to be "
                f"lost. If the voxels are those of the {name}:\n"
                f"    crfrefine convert {path} NEW.nii.gz "
                f"--like {shlex.quote(str(reference.path))} --same-voxels"
            )
    return None


def _explain_forms(
    reference: VolumeHeader, name: str, other: VolumeHeader, what: str
) -> str | None:
    """Return which sform may be wrong, if two grids are one by a qform, which does not count."""
    agree = verb_for(what, "agrees", "agree")
    advice = ""
    if _are_one(reference, reference.qform, other, other.affine):
        subject = f"The {what} {agree} with the {name}'s qform"
        wrong = [(name, reference)]
        advice = f"If the sform is right, save the {what} with the affine of the {name}."
    elif _are_one(reference, reference.affine, other, other.qform):
        subject = f"The {name} agrees with the qform of the {what}"
        wrong = [(what, other)]
        advice = "If the sform is right, set the qform from it, and give --resample."
    elif _are_one(reference, reference.qform, other, other.qform):
        subject = f"The qforms of the {name} and the {what} agree"
        wrong = [(name, reference), (what, other)]
    else:
        return None
    distances = []
    for word, header in wrong:
        assert header.affine is not None
        assert header.qform is not None
        distance = farthest_distance(header.grid_shape, header.affine, header.qform)
        distances.append(f"the sform of the {word} is {distance:.2f} mm off")
    lines = [
        f"{subject}; {', '.join(distances)}. Some programs read the qform, others the sform, "
        "which counts here."
    ]
    for _, header in wrong:
        lines += set_sform_from_qform(header.path)
    if advice:
        lines.append(advice)
    return "\n  ".join(lines)


def _are_one(
    reference: VolumeHeader,
    affine: NDArray[np.float64] | None,
    other: VolumeHeader,
    other_affine: NDArray[np.float64] | None,
) -> bool:
    """Return whether two grids are one with these affines, perhaps with turned axes."""
    if affine is None or other_affine is None:
        return False
    return reorientation(reference.grid_shape, affine, other.grid_shape, other_affine) is not None
