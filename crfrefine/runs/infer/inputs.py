"""The inputs of a run: its cases, how their files are read, and the names of labels and modalities. No voxels are read here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from crfrefine.cases.case_files import CaseFiles, CaseList
from crfrefine.cases.dataset_description import Names, read_names
from crfrefine.cases.declared_labels import declared_labels
from crfrefine.cases.label_files import discover_network_cases
from crfrefine.cases.manifest import read_manifest
from crfrefine.cases.mistakes import EXCHANGED, require_any_output, seem_exchanged
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.cases.region_reading import find_regions
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.paths import stem_of
from crfrefine.io.recognition import add_volumes
from crfrefine.runs.infer.options import InferenceOptions


@dataclass(frozen=True)
class RunInputs:
    """The inputs of a run."""

    cases: tuple[CaseFiles, ...]  # all, those of other parts too
    reading: ReadingOptions
    structures: Mapping[str, int]  # number of each by its name, if each has its own file
    names: Names  # of labels whose input does not name them
    notes: tuple[str, ...]  # notes on ignored files


def find_inputs(options: InferenceOptions) -> RunInputs:
    """Find the cases of a run and what describes them."""
    add_volumes(*options.inputs, options.masks if isinstance(options.masks, Path) else None)
    found = _find_cases(options)
    add_volumes(*(path for files in found for path in files.paths))
    folders = _folders(options, found)
    # Label maps are compared with these labels; channels of logits, with those of `find_regions`.
    where = folders if options.input_type in ("auto", "labels") else ()
    declared, notes = declared_labels(found, where, options.parameters.num_labels)
    told = [*found.notes, *(note for note in notes if note not in found.notes)]
    if not options.parameters.has_weight:  # As after a training that found no CRF better than the network.
        told.insert(0, "all weights of the parameters are 0, so there is no CRF: only mean_field.bias and [postprocess] can change labels")
    regions = find_regions(options.regions, folders, told)
    structures = {} if declared is None else dict(declared.structures)
    names = read_names(folders[::-1])
    told += [note for note in names.notes if note not in told]
    if structures:
        names = replace(names, labels={number: name for name, number in structures.items()})
    if options.save_structures and options.writes_file:
        told.append(f"--save-structures: one file per label goes into the folder {options.output.with_name(stem_of(options.output))}")
    mask_mode = options.parameters.intensity.mask if options.masks is None else "nonzero" if options.masks == "nonzero" else "none"
    reading = ReadingOptions(
        options.input_type,
        mask_mode,
        options.resample,
        regions,
        declared,
        max_memory=options.max_memory,
    )
    return RunInputs(tuple(found), reading, structures, names, tuple(told))


def _find_cases(options: InferenceOptions) -> CaseList:
    masks = None if options.masks is None or options.masks == "nonzero" else Path(options.masks)
    if options.manifest is not None:
        return read_manifest(options.manifest, options.output, input_type=options.input_type)
    if options.nnunet is None:
        try:
            cases = discover_network_cases(options.images, options.logits, masks, input_type=options.input_type)
            require_any_output(cases, options.logits[0])
        except CrfRefineError as error:
            if seem_exchanged(options.images, options.logits):
                raise InputError(f"{error}\n  {EXCHANGED}") from None
            raise
        return cases
    from crfrefine.cases.nnunet import find_cases_to_refine

    return find_cases_to_refine(options.nnunet, options.images, masks)


def _folders(options: InferenceOptions, cases: Sequence[CaseFiles]) -> tuple[Path, ...]:
    """Return where a `dataset.json` may describe the labels: beside the network's output, beside the images; or beside the manifest."""
    if options.manifest is not None:
        return (options.manifest.parent,)
    images = options.images or next((files.images for files in cases if files.images), ())
    places = (*(options.logits[:1] if options.nnunet is None else (options.nnunet,)), *images[:1])
    return tuple(place if place.is_dir() else place.parent for place in places)
