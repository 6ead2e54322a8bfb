"""The arrays of a case: its reference, and label maps, probabilities and images on its grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crfrefine import io
from crfrefine.arrays.interpolated import notes_on_labels
from crfrefine.arrays.label_maps import argmax_labels, renumber
from crfrefine.arrays.nan_voxels import leave_out_nan
from crfrefine.arrays.padding import (
    check_share,
    find_padding,
    notes_on_padding,
    padding_of,
    write_background,
)
from crfrefine.arrays.probabilities import BLOCK_VOXELS, clip_overshoot, find_ties
from crfrefine.arrays.region_scheme import RegionScheme, probabilities_of
from crfrefine.base.array_types import Array, Bool, Float32, Labels
from crfrefine.base.geometry import reverse_grid
from crfrefine.base.label_options import REFERENCE
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import see
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.foreground import (
    holds_labels,
    holds_rounded_probabilities,
    read_all_channels,
)
from crfrefine.cases.frame import OF_FRAME, check_of, read_network_file
from crfrefine.cases.label_input import (
    CUT_REFERENCE,
    GIVE_SCALE,
    grid_of_structures,
    list_losers,
    merge_structures,
    read_mapped,
    require_labels,
)
from crfrefine.cases.label_names import names_of
from crfrefine.cases.network_output import kind_of_channels, take_logits
from crfrefine.cases.other_grid import WorkGrid, union_of
from crfrefine.cases.reading_options import RegionReading
from crfrefine.cases.roles import (
    modalities_of,
    require_images,
    require_other_labels,
)
from crfrefine.errors import CrfRefineError, GridMismatchError, InputError
from crfrefine.evaluate.measured import CasePair, MeasuredRegions
from crfrefine.evaluate.structures import with_numbers_of_run
from crfrefine.io.headers import require_scalar, with_channel_axis
from crfrefine.io.streams import allocate_array
from crfrefine.io.volume import Volume, VolumeHeader, map_segments


class Prediction(NamedTuple):
    """What a file of a method says of a case, on the grid of the reference."""

    label_map: Labels  # (*grid); regions are combined as nnU-Net does.
    # (L, *grid) float32, or of regions (R, *grid); None for a file of labels.
    probabilities: Float32 | None = None
    notes: tuple[Note, ...] = ()  # Whether they were taken as logits or as probabilities, and why.
    num_labels: int = 0  # The number of labels that the channels stand for, background included.
    # The labels of the region of each channel; None means that the channels are labels.
    channels: tuple[tuple[int, ...], ...] | None = None
    # The label of each channel, background first; None means their numbers.
    channel_labels: tuple[int, ...] | None = None
    mapped: tuple[int, ...] = ()  # The values of the file that `--map` gave new labels.
    names: Mapping[int, str] = {}  # Those of labels in the file, by their numbers in the run.


@dataclass(frozen=True)
class Reference:
    """The label map that the methods of a case are measured against.

    It is on the union of its grid and those of the methods, so that what lies outside of one of
    them counts. Voxels outside a file's own grid are background. Files with other voxels are
    interpolated on request.
    """

    volume: Volume  # On the union of the grids; its header is that of the file.
    header: VolumeHeader  # The header of the union, which is the file's if no grid reaches further.
    measured: MeasuredRegions  # The regions of the run.
    names: Mapping[int, str]  # Those of labels in the file, by their numbers in the run.
    mapped: tuple[int, ...] = ()  # The values of the file that `--map` gave new labels.
    # It gets a note on each file that was turned, filled or interpolated.
    notes: list[Note] = field(default_factory=list)
    # It gets a note on what the user should see at once, such as structures that others cover.
    warnings: list[Note] = field(default_factory=list)

    @property
    def work(self) -> WorkGrid:
        """The grid that is compared, to place files on."""
        return WorkGrid(self.header, "comparison")

    def check(self, other: VolumeHeader, what: str) -> None:
        """Raise an error if a file cannot be placed on the grid that is compared."""
        if other.turning is not None:
            self.notes.append(other.turning)
        if self.header.on_same_grid(other):
            return
        _require_comparable(self.volume.header, other, what, self.measured)


def _require_comparable(
    reference: VolumeHeader, other: VolumeHeader, what: str, measured: MeasuredRegions
) -> None:
    """Raise GridMismatchError unless a file has the reference's voxels, or may be interpolated.

    Of two grids with other voxels, one has to lie on the other with half of its voxels. Boxes of
    one grid may lie apart, as where a prediction misses the structure.
    """
    grid = WorkGrid(reference, "reference")
    if reference.on_same_grid(other) or grid.part(other, what, may_be_apart=True) is not None:
        return
    if measured.options.resample:
        grid.require_overlap(other, what, either_way=True)
        return
    hint = (
        "Export it on the grid of the image, or resample it with nearest neighbors "
        f"({see('docs/reference/formats.md#grids')})."
    )
    if what == "image":
        hint = f"Bring it onto the grid of {reference.path.name} to show it."
    advice = grid.advice(other, what, hint, either_way=True)
    raise GridMismatchError(
        f"{other.path}: not on the grid of the reference\n"
        f"{reference.difference_from(other)}\n  {advice}"
    )


def read_reference(pair: CasePair, measured: MeasuredRegions) -> Reference:
    """Read the reference of a case, with notes on it: a label map, or structures."""
    warnings: list[Note] = []
    notes: list[Note] = []
    mapped: tuple[int, ...] = ()
    names: Mapping[int, str] = {}
    if measured.structures:
        volume = read_structures(pair.reference, measured.structures, warnings)
    else:
        assert pair.reference.labels is not None
        volume, mapped, names = _read_labels(pair.reference.labels, measured, REFERENCE, warnings)
    stored = volume.header
    assert stored is not None
    ignored = measured.ignore_label
    if ignored is not None and (volume.data == ignored).all():
        raise InputError(f"{stored.path}: every voxel has the label {ignored}, to be ignored")
    union = union_of(stored, _other_grids(pair, stored, measured))
    if union is not stored:
        labels: Labels = WorkGrid(union, "comparison").nearest(
            stored, volume.data.T, "reference", notes, outside="are background"
        )
        volume = replace(volume, data=labels.T, affine=union.geometry()[0])
    return Reference(volume, union, measured, names, mapped, [*union.notes, *notes], warnings)


def _read_labels(
    path: Path,
    measured: MeasuredRegions,
    method: str,
    warnings: list[Note],
    grid: VolumeHeader | None = None,
    *,
    advice: str = CUT_REFERENCE,
) -> tuple[Volume, tuple[int, ...], dict[int, str]]:
    """Read a label map of a method, or of the reference, with its numbers in the run.

    These are the new labels of `--map`, and of names. The result is the volume, the values that
    `--map` gave new labels, and the names of labels in the file. `warnings` gets notes on numbers
    that are hardly labels, and on labels that are matched by their names. Raises as
    `require_labels`.
    """
    header = io.placed_on(io.read_header(path, io.VOLUME_SUFFIXES), grid)
    affine, spacing = header.geometry()
    mapping = measured.mapping_of(method)
    stored, mapped = read_mapped(header, mapping)
    require_labels(stored, path, advice)
    warnings += notes_on_labels(stored, path.name)
    labels: Labels = stored.T
    names = measured.names_in(header, method)
    option = measured.map_option(method)
    labels, moved = measured.names.renumber(path, names, labels, warnings, option)
    in_file = map_segments(map_segments(header.segments, mapping), moved)
    return Volume(labels, affine, spacing, header), mapped, names_of(in_file)


def _other_grids(
    pair: CasePair, reference: VolumeHeader, measured: MeasuredRegions
) -> Iterator[VolumeHeader]:
    """Yield the headers of files that are compared with a reference on another grid.

    Those that cannot be are left out: reading them says why.
    """
    for method, files in pair.methods.items():
        groups = [files.logits]
        if not files.structures:
            groups = [(path,) for path in pair.files_of(method)]
        for group in groups:
            with suppress(CrfRefineError, OSError):
                members = [io.read_header(path) for path in group]
                header = with_channel_axis(members[0], reference)
                if files.structures:
                    header = grid_of_structures(members)
                if header.affine is not None and not reference.on_same_grid(header):
                    _require_comparable(reference, header, "label map", measured)
                    yield header


def read_structures(
    files: CaseFiles,
    numbers: Mapping[str, int],
    warnings: list[Note],
    *,
    grid: VolumeHeader | None = None,
) -> Volume:
    """Read the structures of a case, or a label map with their names, with a run's numbers.

    `warnings` gets a note on covered structures; axes are turned to those of `grid`.
    """
    if files.labels is not None:
        return with_numbers_of_run(io.read_labels(files.labels, grid=grid), files.labels, numbers)
    headers = [io.read_header(file, io.VOLUME_SUFFIXES) for file in files.logits]
    headers = [io.placed_on(header, grid or headers[0]) for header in headers]
    for header in headers:
        require_scalar(header, "a binary file of one structure")
    file = grid_of_structures(headers)
    labels, kept, _ = merge_structures(headers, files.structures, file, numbers)
    losers = list_losers(kept)
    if losers:
        warnings.append(Note.of(NoteKind.LOSING_STRUCTURES_OF_UNION, structures=losers))
    return Volume(labels.T, *file.geometry(), file)


def read_masks(method: str, files: CaseFiles, reference: Reference) -> Prediction:
    """Read the label map of a method, with its probabilities if the file holds them."""
    if files.problem:
        raise InputError(files.problem)
    path = files.labels
    grid = reference.header
    measured = reference.measured
    if measured.structures:
        volume = read_structures(files, measured.structures, reference.warnings, grid=grid)
        return Prediction(_labels_on_grid(reference, volume, "structures"))
    reading = measured.readings[method]
    mapping = reading.mapping
    paths = files.logits if path is None else (path,)
    stored = io.read_header(paths[0])
    header = with_channel_axis(stored, grid)
    # Logits and probabilities have several values per voxel or declare such values, or they are the
    # single channel of a region or of label 1.
    is_map = path is not None and header.num_channels == 1 and header.kind is None
    if is_map and reading.scale is not None:
        is_map = not holds_rounded_probabilities(header)
    if is_map and holds_labels(header, of_region=reading.regions.declares(1)):
        volume, mapped, names = _read_labels(
            paths[0], measured, method, reference.warnings, grid, advice=GIVE_SCALE
        )
        label_map = _labels_on_grid(reference, volume, "label map")
        return Prediction(label_map, mapped=mapped, names=names)
    if mapping:
        raise InputError(
            f"{paths[0]}: --map gives the values of a label map new labels; found logits or "
            "probabilities, whose channels are labels in their order; leave --map out"
        )
    prediction = _read_channels(paths, reference, method)
    is_alone = len(paths) == 1 and stored.num_channels == 1 and prediction.channels is None
    if is_alone and not prediction.label_map.any():
        reference.warnings.append(Note.of(NoteKind.NOWHERE_HALF, stored.path.name))
    return prediction


def _labels_on_grid(reference: Reference, volume: Volume, what: str) -> Labels:
    """Return labels on the grid of the reference, (*grid)."""
    reference.check(volume.header, what)
    labels: Labels = reference.work.nearest(
        volume.header, volume.data.T, what, reference.notes, outside="are background"
    )
    return labels.T


def read_scores(
    method: str, files: CaseFiles, reference: Reference, label_map: Path | None
) -> Prediction | None:
    """Read the logits or probabilities that a method has beside its label map; None without any."""
    if files.problem and not files.missing:
        raise InputError(files.problem)
    if not files.logits or files.structures:
        return None
    reading = reference.measured.readings[method]
    if reading.mapping:
        raise InputError(
            f"{files.logits[0]}: --map gives the label map new labels, not the channels of "
            "probabilities"
        )
    return _read_channels(files.logits, reference, method, label_map)


def _read_channels(
    paths: tuple[Path, ...], reference: Reference, method: str, label_map: Path | None = None
) -> Prediction:
    """Read logits or probabilities, one file or one per label, on the grid of the reference.

    Logits on another grid are interpolated. An array is compared with the label map of its method.
    """
    reading = reference.measured.readings[method]
    grid = reference.header
    headers = []
    frame = None
    for path in paths:
        stored_header, frame = read_network_file(path, grid, label_map=label_map)
        headers.append(stored_header)
        reference.warnings.extend(note for note in stored_header.notes if note.kind in OF_FRAME)
    header = io.logits_header(headers, fewest=1, grid=grid)
    regions = reading.regions
    is_alone = header.num_channels == 1 and not regions.declares(1)
    if is_alone or reading.add_background:
        header = replace(header, num_labels=header.num_labels + 1, lacks_background=True)
    file = header.files[0]
    reference.check(file, "logits")
    regions.require_number(header)
    stored, notes = read_all_channels(header, reading)
    reference.notes.extend(notes)
    scheme = regions.scheme_of(stored, header)
    frame_check = check_of(frame, file, grid)
    if frame_check is not None:
        reference.warnings.extend(frame_check.look(stored, are_regions=scheme is not None))
    kind, note = kind_of_channels(stored, header, regions, scheme, reading.type_of_scores)
    if scheme is None and kind == "probabilities":
        clip_overshoot(stored)

    unseen = None
    if not header.is_on_grid:
        stored, unseen = reference.work.interpolated_scores(
            file,
            take_logits(stored, kind, scheme),
            reference.notes,
            outside="are background",
            are_regions=scheme is not None,
        )
        kind = "logits"
    what = str(header.path) if scheme is None else str(note)
    labels, unseen = _decode(stored, scheme, kind, unseen)
    if unseen is not None:
        check_share(int(np.count_nonzero(unseen)), unseen.size, what)
        write_background(stored, unseen, "probabilities", are_regions=scheme is not None)
        for remark in notes_on_padding(unseen, are_regions=scheme is not None):
            if remark.kind is NoteKind.HOLES:
                reference.warnings.append(remark.about(header.path.name))

    shape = reference.header.grid_shape[::-1]
    probabilities = reverse_grid(stored.reshape(len(stored), *shape))
    labels = labels.reshape(shape).T
    if scheme is None:
        return _by_names(_of_labels(labels, probabilities, note, regions), file, method, reference)
    return Prediction(labels, probabilities, (note,), scheme.num_labels, scheme.labels)


def _of_labels(
    numbers: Labels, probabilities: Float32, note: Note, regions: RegionReading
) -> Prediction:
    """Return a prediction by the number of the channel at each voxel, whose label it stands for."""
    channel_labels = regions.labels_of_channels(len(probabilities))
    label_map = numbers
    if channel_labels is not None:
        label_map = renumber(numbers, channel_labels)
    num_labels = len(probabilities)
    return Prediction(label_map, probabilities, (note,), num_labels, channel_labels=channel_labels)


def _by_names(
    prediction: Prediction, file: VolumeHeader, method: str, reference: Reference
) -> Prediction:
    """Return channels of labels with the numbers that their names have in the run."""
    measured = reference.measured
    names = measured.names_in(file, method)
    label_map, moved = measured.names.renumber(
        file.path, names, prediction.label_map, reference.warnings, ""
    )
    in_file = names_of(map_segments(file.segments, moved))
    if not moved:
        return prediction._replace(names=in_file)
    numbers = prediction.channel_labels or range(prediction.num_labels)
    channel_labels = tuple(moved.get(number, number) for number in numbers)
    return prediction._replace(label_map=label_map, channel_labels=channel_labels, names=in_file)


def _decode(
    stored: Float32, scheme: RegionScheme | None, kind: str, unseen: Bool | None
) -> tuple[Array, Bool | None]:
    """Return the label map of (channels, [z,] y, x) scores, and where they say nothing.

    Logits, or log-odds of regions, become probabilities in place. `unseen` is known of interpolated
    scores; else the shapes of ties tell it, as in `infer`.
    """
    if scheme is None:
        labels = argmax_labels(stored)
        ties = find_ties(stored)
        if unseen is None and ties is not None:
            unseen = padding_of(stored, ties, is_probability=kind == "probabilities")
        if kind == "probabilities" and ties is not None:
            stored[:, ties] = 1.0 / len(stored)  # Ties may sum to 0, as undecided votes do not.

    if kind == "logits":
        flat = stored.reshape(len(stored), -1)
        for start in range(0, flat.shape[1], BLOCK_VOXELS):
            block = flat[:, start : start + BLOCK_VOXELS]
            block[:] = probabilities_of(block, scheme)
    if scheme is not None:
        log_odds = stored - np.float32(0.5)  # of their sign, and 0 in padding
        if unseen is None:
            unseen = find_padding(log_odds, are_regions=True)
        labels = scheme.decode(log_odds)
        del log_odds
    return labels, unseen


def _placed_image(header: VolumeHeader, values: Float32, reference: Reference) -> Float32:
    """Return channels of an image, ([z,] y, x), on the reference's grid; NaN outside their own."""
    shape = (len(values), *reference.header.grid_shape[::-1])
    if reference.header.on_same_grid(header):
        return values.reshape(shape)
    work = reference.work
    placed: Float32 = allocate_array(shape, header.path)
    reference.notes.extend(work.describe_image(header, "image", "are the lowest intensity"))
    work.interpolate_image(header, values, placed)
    return placed


def _require_images(files: CaseFiles, place: int, values: Float32, reference: Volume) -> None:
    """Raise InputError if a file of images, (M, [z,] y, x), is a label map, or the reference."""
    assert reference.header is not None
    modalities = modalities_of(files, place, values)
    require_other_labels(modalities, reference.data.T, REFERENCE, reference.header.path)
    require_images(files, modalities, [])


def read_images(
    pair: CasePair,
    reference: Reference,
    tell: Callable[[Note], object],
) -> tuple[list[Float32], list[str]]:
    """Return the modalities of a case, each (x, y, z), on the reference's grid, and their names.

    Voxels that are NaN get the lowest intensity, like background. `tell` is called with a note on
    each file that cannot be read, and the others are returned.
    """
    channels: list[Float32] = []
    names: list[str] = []
    paths = pair.reference.images
    modalities = pair.reference.modalities
    for number, path in enumerate(paths):
        nan_files: list[Path] = []
        try:
            header = io.placed_on(io.read_header(path, io.VOLUME_SUFFIXES), reference.header)
            reference.check(header, "image")
            values = io.read_channels(header, nan_files=nan_files)
            _require_images(pair.reference, number, values, reference.volume)
            placed = _placed_image(header, values, reference)
            if np.isnan(placed).any():
                leave_out_nan(placed, None, path)
        except (CrfRefineError, OSError) as error:
            missing = "its image" if len(paths) == 1 else path.name
            problem = str(error)
            kind = NoteKind.SHOWN_WITHOUT
            tell(Note.of(kind, case=pair.case_id, missing=missing, problem=problem))
            continue
        # A single file may hold all modalities.
        for modality, channel in enumerate(reverse_grid(placed), start=number):
            channels.append(np.atleast_3d(channel))
            name = f"modality {modality + 1}"
            if modality < len(modalities):
                name = modalities[modality]
            names.append(name)
    return channels, names
