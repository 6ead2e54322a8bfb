"""The inputs of a run on files: its cases, and how they are read. No voxels are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from crfrefine.base.array_types import NamesOfLabels
from crfrefine.base.notes import NoteKind
from crfrefine.cases.case_files import CaseList
from crfrefine.cases.dataset_description import read_descriptions
from crfrefine.cases.discovery import Sources
from crfrefine.cases.finding import find_cases
from crfrefine.cases.label_input import EXCHANGED
from crfrefine.cases.label_names import NO_NAMES, LabelNames
from crfrefine.cases.reading_options import (
    ReadingOptions,
    declared_labels,
    find_modality_names,
    find_regions,
)
from crfrefine.cases.roles import require_modalities
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.infer.options import InferenceOptions
from crfrefine.io import read_header
from crfrefine.io.paths import add_volumes, holds_scores_alone, is_folder, stem_of


class RunInputs(NamedTuple):
    """The inputs of a run."""

    cases: CaseList  # all, those of other parts too, in the order of their names
    reading: ReadingOptions


def find_inputs(options: InferenceOptions, references: Path | None = None) -> RunInputs:
    """Find the cases of a run and what describes them, with their references, if they have some.

    They are those of a manifest, of nnU-Net's folder, or of images and logits. No voxels are read.
    Raise InputError if no case has logits or a label map.
    """
    mask = options.masks if isinstance(options.masks, Path) else None
    add_volumes(*options.images, *options.logits, *options.strokes)
    add_volumes(options.nnunet, options.manifest, mask)
    sources = Sources(
        options.images,
        options.logits,
        mask,
        references,
        options.strokes,
        options.nnunet,
        options.manifest,
        options.input_type,
        options.add_background,
    )
    try:
        cases = find_cases(sources)
        if options.images and options.logits:
            _require_network(cases, options)
    except CrfRefineError as error:
        if _seem_exchanged(options.images, options.logits):
            raise InputError(f"{error}\n  {EXCHANGED}") from None
        raise
    for files in cases:
        add_volumes(*files.paths)

    # A training that found no CRF better than the network writes such parameters.
    if not options.parameters.has_weight:
        cases.notes.insert(0, NoteKind.NO_WEIGHT())
    if options.save_structures and options.writes_file:
        folder = options.output.with_name(stem_of(options.output))
        cases.notes.append(NoteKind.FOLDER_OF_STRUCTURES(folder=str(folder)))
    reading = _describe(options, cases)
    named_case = next((files for files in cases if files.modalities and not files.problem), None)
    has_values = options.parameters.has_values_per_modality and not options.parameters.modalities
    if named_case is not None and has_values:
        # Only the alphabet orders images that the user has not named, and that have no numbers.
        is_numbered = all(name.isdigit() for name in named_case.modalities)
        if not is_numbered and not set(named_case.unnamed).isdisjoint(named_case.images):
            names = ", ".join(reading.modality_names)
            cases.notes.append(NoteKind.ORDER_OF_MODALITIES(names=names))
    cases.sort(key=lambda files: files.case_id)
    return RunInputs(cases, reading)


def _require_network(cases: CaseList, options: InferenceOptions) -> None:
    """Raise InputError if no case has a network's output; the first one may lack something else."""
    if not all(files.missing and not files.network for files in cases):
        return
    from crfrefine.cases.proposals import advise, propose_fewer_cases

    first = cases[0]
    if not first.problem.startswith(first.missing):  # It lacks more than this.
        raise InputError(f"{options.images[0]}: {first.named_problem}")
    place = options.logits[0]
    number = ""
    if len(cases) > 1:
        number = f"none of the {len(cases)} cases has its file: "
    hint = advise(place, holds_images=False)
    if is_folder(options.images[0]):
        images = {path for files in cases for path in files.images}
        fewer = propose_fewer_cases(options.images[0], images)
        if fewer:
            hint += f"\n  As to {options.images[0]}:{fewer}"
    raise InputError(f"{place}: {number}{first.named_problem}{hint}")


def _describe(options: InferenceOptions, cases: CaseList) -> ReadingOptions:
    """Return how the cases are read, and the names of labels, as each `dataset.json` says.

    It is beside the manifest, or else beside the network's output or the images.
    """
    mask_mode = options.parameters.intensity.mask
    if options.masks is not None:
        mask_mode = "none" if isinstance(options.masks, Path) else "nonzero"
    if options.manifest is not None:
        places = [options.manifest]
    else:
        images = options.images or next((files.images for files in cases if files.images), ())
        places = [options.nnunet or options.logits[0], *images[:1]]
    descriptions = list(read_descriptions(places))
    # The first one that names labels is that of the network; the last one is rather of one data set
    # with the images.
    names = NO_NAMES
    label_names: NamesOfLabels = {}
    for description in reversed(descriptions):
        if description.label_names:
            label_names = description.label_names
            names = LabelNames.of(label_names, str(description.path))
    modality_names = find_modality_names(cases, descriptions)
    require_modalities(cases, modality_names, options.parameters.modalities)
    # Label maps are compared with the declared labels; channels of logits, with the regions.
    may_be_labels = options.input_type in ("auto", "labels")
    declared = declared_labels(cases, descriptions if may_be_labels else (), options.parameters)
    if declared is not None and declared.structures:
        label_names = {number: name for name, number in declared.structures.items()}
    regions = find_regions(options.regions, descriptions, options.channel_labels)
    if regions.scheme is not None:
        label_names = {**regions.scheme.label_names, **label_names}
    reading = ReadingOptions(
        mask_mode=mask_mode,
        regions=regions,
        declared=declared,
        max_memory=options.max_memory,
        label_names=label_names,
        names=names,
        modality_names=modality_names,
    )
    return reading.with_inputs_as(options)


def _seem_exchanged(images: Sequence[Path], logits: Sequence[Path]) -> bool:
    """Return whether the cases of the two options are complete the other way round."""
    if not images or not logits:
        return False
    if is_folder(images[0]) and is_folder(logits[0]):
        try:
            cases = find_cases(Sources(logits, images))
            swapped = next((case for case in cases if case.network and case.images), None)
            # A file of several channels among the logits is a network's output, in its place.
            return swapped is not None and read_header(swapped.images[0]).num_channels == 1
        except CrfRefineError:
            return False
    return holds_scores_alone(images[0]) and not holds_scores_alone(logits[0])
