"""The reference of a case, and the grid on which methods are compared with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from crfrefine import io
from crfrefine.arrays.interpolated import notes_on_labels
from crfrefine.base.array_types import Labels
from crfrefine.base.label_options import REFERENCE
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import see
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.label_input import CUT_REFERENCE, GIVE_SCALE, read_mapped, require_labels
from crfrefine.cases.label_names import names_of
from crfrefine.cases.other_grid import WorkGrid, union_of
from crfrefine.cases.structures import grid_of_structures, list_losers, merge_structures
from crfrefine.errors import CrfRefineError, GridMismatchError, InputError
from crfrefine.evaluate.measured import CasePair, MeasuredRegions
from crfrefine.evaluate.structures import with_numbers_of_run
from crfrefine.io.headers import require_scalar, with_channel_axis
from crfrefine.io.volume import Volume, VolumeHeader, map_segments


@dataclass(frozen=True)
class Reference:
    """The label map that the methods of a case are measured against.

    It is on the union of its grid and those of the methods, so that a label outside of one of
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
    # It gets notes that the user should see at once, such as structures that others cover.
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
    volume, mapped, names = read_labels(pair.reference, measured, REFERENCE, warnings)
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
        volume = volume._replace(data=labels.T, affine=union.geometry()[0])
    return Reference(volume, union, measured, names, mapped, [*union.notes, *notes], warnings)


def read_labels(
    files: CaseFiles,
    measured: MeasuredRegions,
    method: str,
    warnings: list[Note],
    grid: VolumeHeader | None = None,
) -> tuple[Volume, tuple[int, ...], dict[int, str]]:
    """Read the label map or the structures of a method, or of the reference.

    The labels have their numbers in the run: the new labels of `--map`, and of names. The result is
    the volume, the values that `--map` gave new labels, and the names of labels in the file.
    `warnings` gets notes on numbers that are hardly labels, on labels that are matched by their
    names, and on covered structures. Raises as `require_labels`.
    """
    if measured.structures:
        return _read_structures(files, measured.structures, warnings, grid), (), {}
    path = files.labels
    assert path is not None
    header = io.placed_on(io.read_header(path, io.VOLUME_SUFFIXES), grid)
    affine, spacing = header.geometry()
    mapping = measured.readings[method].mapping
    stored, mapped = read_mapped(header, mapping)
    require_labels(stored, path, CUT_REFERENCE if method == REFERENCE else GIVE_SCALE)
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
        groups = [files.network]
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


def _read_structures(
    files: CaseFiles,
    numbers: Mapping[str, int],
    warnings: list[Note],
    grid: VolumeHeader | None,
) -> Volume:
    """Read the structures of a case, or a label map with their names, as `read_labels` does."""
    if files.labels is not None:
        return with_numbers_of_run(io.read_labels(files.labels, grid=grid), files.labels, numbers)
    headers = [io.read_header(file, io.VOLUME_SUFFIXES) for file in files.network]
    headers = [io.placed_on(header, grid or headers[0]) for header in headers]
    for header in headers:
        require_scalar(header, "a binary file of one structure")
    file = grid_of_structures(headers)
    labels, kept, _ = merge_structures(headers, files.structures, file, numbers)
    losers = list_losers(kept)
    if losers:
        warnings.append(NoteKind.LOSING_STRUCTURES_OF_UNION(structures=losers))
    return Volume(labels.T, *file.geometry(), file)
