"""Describe folders, with the problems of their cases."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from crfrefine.base.failures import Causes, Failure, describe_failure, failing_alone
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import counted, listed
from crfrefine.cases.case_files import CaseFiles, CaseList
from crfrefine.cases.case_headers import CaseHeaders, read_case_headers
from crfrefine.cases.content import is_label_map
from crfrefine.cases.conventions import ARCHIVES, DATASET_FOLDERS, find_folders
from crfrefine.cases.dataset_description import DatasetDescription, read_descriptions
from crfrefine.cases.discovery import Sources
from crfrefine.cases.files_by_case import structures_by_case
from crfrefine.cases.finding import find_cases
from crfrefine.cases.listing import list_files
from crfrefine.cases.nnunet import is_of_nnunet
from crfrefine.cases.other_grid import WorkGrid
from crfrefine.cases.proposals import find_proposals, propose, propose_fewer_cases
from crfrefine.cases.reading_options import (
    NO_REGIONS,
    ReadingOptions,
    find_regions,
)
from crfrefine.cases.role_table import (
    FileRole,
    check_roles,
    check_single,
    roles_of,
)
from crfrefine.cases.structure_folders import (
    UNNAMED,
    are_structures,
    find_structures,
    note_on_names,
)
from crfrefine.cases.structures import read_structure
from crfrefine.cases.tree import IMAGE, LABEL_MAP, Tree
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.formats import VOLUME_SUFFIXES
from crfrefine.io.headers import NetworkHeader, read_header
from crfrefine.io.paths import is_pattern, stem_of, suffix_of
from crfrefine.io.reading import read_channels

_VALUES_OF_MASK = 2


def inspect_folder(
    folder: Path,
    images: tuple[Path, ...] = (),
    logits: tuple[Path, ...] = (),
    masks: Path | None = None,
    labels: Path | None = None,
    *,
    input_type: str = "auto",
    resample: str | None = None,
) -> FolderReport:
    """Describe the cases of a folder; of a pattern or `images`, as other commands find them.

    A folder has images in nnU-Net's naming, with logits or labels; or folders `images` (`imagesTr`,
    `imagesTs`), and beside them `logits`, `masks` and `labels` (`labelsTr`, `labelsTs`). A folder
    of nnU-Net's predictions, or of a trained network, has the cases that `infer --nnunet` would
    refine, of `images` if these are named. A folder may also hold nothing but logits without
    geometry, or folders of structures.
    """
    report = FolderReport(resample)
    with failing_alone(report.problems.append):
        report.may_be_labels = not images
        if is_pattern(folder) or folder in images[:1]:
            report.input_type = input_type
            sources = Sources(
                images or (folder,), logits, masks, labels, input_type=input_type, needs_all=True
            )
            cases = find_cases(sources)
            report.add_cases(cases, _places_of(cases))
        elif is_of_nnunet(folder):
            report.add_network(folder, images)
        elif images:
            raise InputError(f"{folder}: no folder of nnU-Net; leave it out, or -i")
        else:
            report.add_folder(folder)
    report.compare()
    return report


def _places_of(cases: CaseList) -> list[Path]:
    """Return the folders of the first case, of the network's output first."""
    first = cases[0]
    return [path.parent for path in (*first.network[:1], *first.images[:1])]


class FolderReport:
    """Facts that `info` shows about a folder: each of its cases, and their common properties."""

    def __init__(self, resample: str | None) -> None:
        # a line about each case, by its name: modalities, grid, labels and other files
        self.cases: dict[str, str] = {}
        self.notes: list[Note] = []  # on ignored files
        self.problems: list[Failure] = []  # only the first one of each cause is in full
        self.found = ""  # how many cases a pattern of images has
        self.roles: list[FileRole] = []  # of the first case
        self.may_be_labels = False  # whether nothing says that single files are images
        self.input_type = "auto"
        self._doubtful: set[str] = set()  # modalities of cases with a file that is no image
        self._resample = resample
        self._causes = Causes()
        self._regions = NO_REGIONS
        self._num_labels: dict[str, int] = {}  # of each case; 0 means a label map
        self._files_of_remark: dict[Note, list[str]] = {}

    def add_network(self, folder: Path, images: Sequence[Path]) -> None:
        """Describe the cases of nnU-Net's predictions; without images, their probabilities."""
        try:
            cases = find_cases(Sources(images, nnunet=folder))
        except InputError as error:
            if not self.add_archives(folder):
                raise
            self.notes.append(
                NoteKind.WITHOUT_IMAGES_OF_NNUNET(problem=describe_failure(error).headline)
            )
        else:
            self.add_cases(cases, [folder])

    def add_folder(self, folder: Path) -> None:
        """Describe the cases of a folder of images, or of its parent.

        Without any, it may hold folders of structures, or logits without geometry.
        """
        inside = find_folders(folder)
        if not inside and not list_files(folder, VOLUME_SUFFIXES):
            if structures_by_case(folder):
                structures = find_structures(folder)
                _require_structures(folder, structures)
                self.add_structures(folder, structures)
                return
            if self.add_archives(folder):
                return
        if "images" in inside:
            masks = inside.get("masks")
            if masks is not None and "labels" not in inside and _holds_labels(masks):
                inside["labels"] = masks
                masks = None
            logits = [inside["logits"]] if "logits" in inside else []
            sources = Sources(
                [inside["images"]], logits, masks, inside.get("labels"), needs_all=True
            )
            cases = find_cases(sources)
            if "logits" not in inside:
                cases.notes.append(NoteKind.NO_LOGITS(str(folder), folder=str(folder / "logits")))
        else:
            are_known = not inside and are_structures([folder])
            if are_known is None:
                self.notes.append(note_on_names(folder))
            elif are_known:
                self.add_structures(folder, find_structures(folder))
                return
            try:
                cases = find_cases(Sources([folder]))
            except InputError as error:
                raise InputError(
                    f"{error}\n  Looked for images in it, and in "
                    f"{listed(DATASET_FOLDERS['images'])}; name the images with -i."
                ) from None
        self.add_cases(cases, _places_of(cases) or [folder])
        images = inside.get("images", folder)
        if all(case.missing for case in cases):
            self._add_problem(f"{folder}: no case has all files{propose(folder)}")
        elif all(len(case.images) == 1 and case.labels is None for case in cases):
            self._compare_files(images, {case.images[0] for case in cases})

    def _compare_files(self, folder: Path, images: Collection[Path]) -> None:
        """Say if files that were taken for the image of a case each are not, by names or voxels."""
        fewer = propose_fewer_cases(folder, images)
        if "label map" in fewer:
            self._add_problem(f"{folder}: not each file is an image{fewer}")
            return
        if fewer:
            self.notes.append(NoteKind.FEWER_CASES(str(folder), proposal=fewer))
        found = Tree(folder).first_of_each_kind(images)
        if IMAGE in found and LABEL_MAP in found:
            self._add_problem(
                f"{folder}: not each file is an image: {found[LABEL_MAP].name} is a label map by "
                f"its voxels, {found[IMAGE].name} an image{propose(folder)}"
            )

    def _add_problem(self, message: str) -> None:
        self.problems.append(Failure(message, InputError.__name__))

    def add_cases(self, cases: CaseList, places: Sequence[Path]) -> None:
        """Describe cases; a `dataset.json` in one of the places may declare regions."""
        self.found = cases.found
        self.notes += cases.notes
        descriptions = self._read_descriptions(places)
        is_told = any(one.channel_names for one in descriptions) or cases.is_single or cases.found
        if len(cases) == 1 and not is_told:
            images = cases[0].images
            if len(images) > 1 and not cases[0].network and not cases[0].labels:
                # Only numbers show that these images are one case.
                folder = images[0].parent
                note = NoteKind.NUMBERED_FILES(
                    str(folder),
                    first=images[0].name,
                    others=len(images) - 1,
                    pattern=f"'{folder}/{{case}}{suffix_of(images[0])}'",
                )
                self.notes.append(note)
        for files in cases:
            failures: list[Failure] = []
            with failing_alone(failures.append, *files.images, *files.network):
                self._add_case(files)
            for failure in failures:
                message = failure.message
                if not self._causes.is_new(files.case_id, failure):
                    message = failure.headline
                message = "; ".join([message, *files.missing[1:]])
                self.problems.append(replace(failure, message=message, case_id=files.case_id))

    def add_archives(self, folder: Path) -> bool:
        """Describe logits without geometry in a folder; return whether there are any."""
        archives = list_files(folder, ARCHIVES.suffixes)
        if archives:
            self._read_descriptions([folder])
        for path in archives:
            with failing_alone(self.problems.append, path):
                header = read_header(path)
                number = header.num_channels
                is_alone = number == 1 and not self._regions.declares(1)
                file = NetworkHeader((header,), number + is_alone, header.kind, is_alone)
                self._regions.require_number(file)
                name = stem_of(path)
                self.cases[name] = f"{self._channels_of(name, file)}, {header.describe_grid()}"
        return bool(archives)

    def _read_descriptions(self, places: Sequence[Path]) -> list[DatasetDescription]:
        """Return the `dataset.json` of some places, and keep the regions of the first."""
        descriptions: list[DatasetDescription] = []
        with failing_alone(self.problems.append):
            descriptions += read_descriptions(places)
            self._regions = find_regions(None, descriptions)
            if self._regions.problem:
                raise InputError(self._regions.problem)
        return descriptions

    def compare(self) -> None:
        """Compare the numbers of labels of all cases, and say what they have in common."""
        for remark, names in self._files_of_remark.items():
            self.notes.append(remark.about(listed(names, 3)))
        numbers = list(self._num_labels.values())
        usual = max(numbers, key=numbers.count, default=0)
        for case_id, number in self._num_labels.items():
            if number != usual:
                problem = f"has {_logits_words(number)}, most cases have {_logits_words(usual)}"
                self.problems.append(Failure(problem, InputError.__name__, case_id=case_id))

    def add_structures(self, folder: Path, cases: Mapping[str, CaseFiles]) -> None:
        """Describe the cases of a folder with one binary file per structure."""
        places = {name: case.network[0].parent for name, case in cases.items()}
        images = ""
        if UNNAMED in cases:
            images = " and its image, -i IMAGE,"
        elif any(place != folder / name for name, place in places.items()):
            images = f" and -i {folder}"
        self.notes.append(NoteKind.BINARY_FILES(str(folder), folder=str(folder), images=images))
        for case_id, case in cases.items():
            with failing_alone(self.problems.append, *case.network):
                number = counted(len(case.network), "structure")
                grid = read_header(case.network[0]).describe_grid()
                self.cases[case_id or folder.resolve().name] = f"{number}, {grid}"

    def _channels_of(self, case_id: str, network: NetworkHeader) -> str:
        """Return the channels of a network's output in words, and keep their number."""
        number = network.num_labels
        self._num_labels[case_id] = number
        if network.lacks_background:
            return "one channel for label 1"
        if not number:
            return "label map for logits"
        is_of_regions = self._regions.declares(number) and number != self._regions.num_labels
        return counted(number, "region" if is_of_regions else "label")

    def _check_roles(self, headers: CaseHeaders) -> None:
        """Keep the roles of the first case, whose voxels are read to check them.

        Of other cases, those are read whose modalities were none in an earlier case.
        """
        # Names or numbers tell the modalities of a case from those of others.
        places = map(str, range(len(headers.files.images)))
        names = {*headers.files.modalities} or {*places}
        if self.roles and not names & self._doubtful:
            return
        roles = []
        if not self.roles:
            roles = roles_of(headers)
            self.roles = roles
        if self.may_be_labels and len(headers.files.paths) == 1:
            check_single(headers, roles)
            return
        try:
            check_roles(headers, roles, self.notes)
        except InputError:
            self._doubtful |= names
            raise

    def _add_case(self, files: CaseFiles) -> None:
        """Describe a case in a line, and keep the notes on its images."""
        reading = ReadingOptions(
            input_type=self.input_type, regions=self._regions, resample=self._resample
        )
        headers = read_case_headers(files, reading)
        self._check_roles(headers)
        image = headers.image
        modalities = "modality" if headers.num_modalities == 1 else "modalities"
        parts = [f"{headers.num_modalities} {modalities}"]
        parts.append(image.describe_grid())
        network = headers.network
        if network.files:
            parts.append(self._channels_of(files.case_id, network))
        if headers.mask is not None:
            parts.append("mask")
        if headers.labels is not None:
            parts.append("reference")
        on_part: list[str] = []
        elsewhere: list[str] = []
        for other in headers.companions:
            if image.on_same_grid(other):
                continue
            is_part = WorkGrid(image).part(other, "labels") is not None
            (on_part if is_part else elsewhere).append(other.path.name)
        if on_part:
            parts.append(f"{listed(on_part, 3)} on a part of its grid")
        if elsewhere:
            parts.append(f"{listed(elsewhere, 3)} on another grid")
        self.cases[files.case_id] = ", ".join([*parts, *map(str, headers.notes)])
        for header in headers.images:
            for remark in header.notes:
                self._files_of_remark.setdefault(remark, []).append(header.path.name)


def _holds_labels(masks: Path) -> bool:
    """Return whether a folder of masks holds label maps: the first file has several labels."""
    for path in list_files(masks, VOLUME_SUFFIXES)[:1]:
        with suppress(CrfRefineError):
            header = read_header(path)
            values = read_channels(header)
            return is_label_map(header) and len(np.unique(values)) > _VALUES_OF_MASK
    return False


def _require_structures(folder: Path, structures: Mapping[str, CaseFiles]) -> None:
    """Raise InputError if the largest file of a case, of some of many, is no structure.

    Structures in a separate folder have an image beside it, of a name that is known.
    """
    files = [case.network for case in structures.values()]
    for number in dict.fromkeys((0, len(files) // 2, len(files) - 1)):
        try:  # An image would be the largest.
            largest = max(files[number], key=lambda file: file.stat().st_size)
            read_structure(read_header(largest))
        except InputError as error:
            raise InputError(f"{error}{propose(folder)}") from None
    if all(paths[0].parent == folder / name for name, paths in zip(structures, files, strict=True)):
        return
    try:
        find_cases(Sources([folder]))
    except InputError:
        if find_proposals(Tree(folder)):
            raise


def _logits_words(num_labels: int) -> str:
    if num_labels:
        return f"logits of {counted(num_labels, 'label')}"
    return "a label map"
