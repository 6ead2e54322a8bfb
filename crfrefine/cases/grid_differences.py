"""Why a file is on another grid, where its header or its sizes show it, and what to do."""

from __future__ import annotations

import shlex
from collections import Counter
from functools import partial
from itertools import permutations

import numpy as np

from crfrefine.base.axes import Axes
from crfrefine.base.geometry import (
    farthest_distance,
    orientation_codes,
    reorientation,
    same_grid,
)
from crfrefine.base.text import text_of_sizes
from crfrefine.io.nifti import set_sform_from_qform
from crfrefine.io.paths import stem_of
from crfrefine.io.text_header import LPS, MM_PER_UNIT
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
_WITHOUT_GEOMETRY = (
    "{file} has no geometry, and nothing is resampled by a guess. Say how its axes run, such as "
    "RAS if x, y and z run to the right, to the front and up:\n"
    "    crfrefine convert {path} {placed} --like {like} --axes RAS\n"
    "  and give {placed} in its place, with --resample if it is not on the grid of the {name}."
)
_TOWARD_RAS = (
    "The sizes of {file} are those of the {name} with its voxel axes turned to RAS, as nnU-Net's "
    "NibabelIOWithReorient and SimpleITKIOWithReorient turn them: put the plans.json of the "
    "network beside it, which names the reader, or give it a place:\n"
    "    crfrefine convert {path} {placed} --like {like} --axes RAS\n"
    "  and give {placed} in its place."
)
_LOST_HEADER = (
    "The {what} {have} as many voxels as the {name} along each axis, and the geometry that "
    "programs write without a header: it seems to be lost. If the voxels are those of the {name}:\n"
    "    crfrefine convert {path} NEW.nii.gz --like {like} --same-voxels"
)
# The transforms of two files by which they may be on one grid, what to say then, and what to do if
# the sform is right where it is the qform.
_FORMS = (
    (
        ("qform", "affine"),
        "The {what} {agree} with the {name}'s qform",
        "If the sform is right, save the {what} with the affine of the {name}.",
    ),
    (
        ("affine", "qform"),
        "The {name} agrees with the qform of the {what}",
        "If the sform is right, set the qform from it, and give --resample.",
    ),
    (("qform", "qform"), "The qforms of the {name} and the {what} agree", ""),
)
_OTHER_UNITS = [size for size in MM_PER_UNIT.values() if size != 1.0]
_RATIOS_OF_UNITS = (*_OTHER_UNITS, *(1 / size for size in _OTHER_UNITS))
_PLURALS = ("logits", "labels", "strokes", "structures")


def verb_for(what: str, singular: str, plural: str) -> str:
    """Return the form of a verb that fits the user's word for a file."""
    if what in _PLURALS:
        return plural
    return singular


def has_default_place(header: VolumeHeader) -> bool:
    """Return whether the first voxel or the center is at 0, as programs write without a header."""
    affine, spacing = header.geometry()
    middle = affine[:3, : len(spacing)] @ (np.array(header.grid_shape) - 1) / 2
    origin = affine[:3, 3]
    return bool(np.allclose(origin, 0.0, atol=1e-3) or np.allclose(origin, -middle, atol=1e-3))


def explain_difference(
    reference: VolumeHeader,
    name: str,
    other: VolumeHeader,
    what: str,
    *,
    is_elsewhere: bool = False,
) -> str | None:
    """Return why a file, `what`, is not on the grid of another one, `name`, and what to do.

    None means that neither header nor sizes show it. Sizes by themselves show another
    order of axes only if the grids have hardly a place in common (`is_elsewhere`).
    """
    shape = reference.grid_shape
    other_shape = other.grid_shape
    if other.affine is None and reference.affine is not None and len(shape) == 3:
        turned = Axes.toward("RAS", orientation_codes(reference.affine)).along(shape)
        if other_shape == turned != shape:
            return _TOWARD_RAS.format(**_words_of(reference, name, other, what))
    order: tuple[int, ...] = ()  # in which the axes of the file have the sizes of the other one
    # A file with the affine of the other one, or without any: its axes are not turned.
    if is_elsewhere or same_grid(shape, reference.affine, shape, other.affine):
        # Of several orders, the last one counts, which may be the reversed one: arrays of other
        # libraries are (z, y, x).
        for axes in permutations(range(len(other_shape))):
            if tuple(other_shape[axis] for axis in axes) == shape:
                order = axes
    if order and other_shape != shape:
        letters = ", ".join("xyz"[axis] for axis in np.argsort(order))
        sizes = text_of_sizes(other_shape)
        wanted = text_of_sizes(shape)
        how = f" of the array that nibabel loads, and save it with the affine of the {name}."
        if other.affine is None:
            order = (0, *(len(shape) - axis for axis in reversed(order)))
            how = ": an .npz or .npy holds (label, z, y, x)."
        elif other.num_channels > 1:
            order += (len(shape),)
        return (
            f"Its axes are in another order: {sizes} voxels are the {name}'s {wanted} as "
            f"({letters}).\n  Transpose them back, np.transpose(array, {order}){how}"
        )

    # Planes of the size of an image that is a single plane.
    is_plane = (*shape, 1)[2] == 1
    is_stack = len(other_shape) == 3 and other_shape[2] > 1 and other.num_channels == 1
    if is_plane and is_stack and other_shape[:2] == shape[:2]:
        return PLANE_ELSEWHERE
    # Sizes that fit; one of them is taken for the channels.
    all_sizes = Counter([*other_shape, other.num_channels])
    if sorted(shape) != sorted(other_shape) and Counter(shape) <= all_sizes:
        return LABEL_AXIS_FIRST
    if other.affine is None:
        return _WITHOUT_GEOMETRY.format(**_words_of(reference, name, other, what))
    forms = _explain_forms(reference, name, other, what)
    if forms is not None or shape != other_shape:
        return forms
    return _explain_geometry((name, reference), (what, other))


def _words_of(reference: VolumeHeader, name: str, other: VolumeHeader, what: str) -> dict[str, str]:
    """Return the words of explanations about a file, `what`, beside another one, `name`."""
    return {
        "name": name,
        "what": what,
        "agree": verb_for(what, "agrees", "agree"),
        "have": verb_for(what, "has", "have"),
        "file": other.path.name,
        "path": shlex.quote(str(other.path)),
        "placed": shlex.quote(f"{stem_of(other.path)}_placed.nii.gz"),
        "like": shlex.quote(str(reference.path)),
    }


def _explain_forms(
    reference: VolumeHeader, name: str, other: VolumeHeader, what: str
) -> str | None:
    """Return which sform may be wrong, if two grids are one by a qform, which does not count."""
    words = _words_of(reference, name, other, what)
    for (form, other_form), sentence, advice in _FORMS:
        affine = getattr(reference, form)
        other_affine = getattr(other, other_form)
        if affine is None or other_affine is None:
            continue
        if reorientation(reference.grid_shape, affine, other.grid_shape, other_affine) is None:
            continue
        distances = []
        lines = []
        for word, header, used in ((name, reference, form), (what, other, other_form)):
            if used == "qform":
                assert header.affine is not None
                assert header.qform is not None
                distance = farthest_distance(header.grid_shape, header.affine, header.qform)
                distances.append(f"the sform of the {word} is {distance:.2f} mm off")
                lines += set_sform_from_qform(header.path)
        cause = (
            f"{sentence.format(**words)}; {', '.join(distances)}. Some programs read the qform, "
            "others the sform, which counts here."
        )
        if advice:
            lines.append(advice.format(**words))
        return "\n  ".join([cause, *lines])
    return None


def _explain_geometry(*files: tuple[str, VolumeHeader]) -> str | None:
    """Return which of two files of as many voxels has a wrong header; None if neither has.

    It may be in another unit, or lost. Then it has what programs write without a header: a first
    voxel or a center at 0, axes along those of the world, and voxels of 1 mm; the rest of its
    geometry is that of the other one. Or it is in LPS as if that were RAS.
    """
    nearly = partial(np.allclose, rtol=1e-3, atol=1e-3)
    for (name, reference), (what, other) in (files, files[::-1]):
        affine, spacing = other.geometry()
        like, like_spacing = reference.geometry()
        ratios = np.array(spacing) / like_spacing
        if np.isclose(ratios[0], _RATIOS_OF_UNITS).any() and np.allclose(ratios, ratios[0]):
            return OTHER_UNIT
        num_axes = len(spacing)
        directions = affine[:3, :num_axes] / spacing
        # Directions, spacing and place: whether each is that of no header, or of the other file.
        are_default = [
            nearly(np.abs(directions), np.eye(3)[:, :num_axes]),
            nearly(spacing, 1.0),
            has_default_place(other),
        ]
        are_equal = [
            nearly(directions, like[:3, :num_axes] / like_spacing),
            nearly(spacing, like_spacing),
            nearly(affine[:3, 3], like[:3, 3]),
        ]
        is_lost = np.logical_or(are_default, are_equal).all() and not all(are_equal)
        if is_lost or nearly(affine, np.diag([*LPS, 1.0]) @ like):
            return _LOST_HEADER.format(**_words_of(reference, name, other, what))
    return None
