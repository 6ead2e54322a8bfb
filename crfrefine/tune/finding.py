"""The cases of the page."""

from __future__ import annotations

from dataclasses import replace

from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.base.text import counted, listed, shorten
from crfrefine.cases.case_headers import read_case_headers
from crfrefine.cases.dataset_description import read_descriptions
from crfrefine.cases.foreground import holds_labels
from crfrefine.cases.nnunet import find_references
from crfrefine.cases.proposals import advise
from crfrefine.cases.reading_options import NO_REGIONS
from crfrefine.errors import InputError
from crfrefine.infer.inputs import RunInputs, find_inputs
from crfrefine.tune.options import TuneOptions


def find_cases_to_show(options: TuneOptions) -> RunInputs:
    """Find the cases, in the order of their names, with their references."""
    labels = options.labels
    if labels is None and options.inputs.nnunet is not None:
        labels = find_references(options.inputs.nnunet, options.inputs.images)
    inputs = find_inputs(options.inputs, labels)
    first = inputs.cases[number_of_first(inputs, options)]
    if options.regions:
        # The labels that a `dataset.json` declares are no regions of the page.
        reading = replace(inputs.reading, mask_mode="none", regions=NO_REGIONS)
        header = read_case_headers(first, reading).network
        # Whether the network's output has a sigmoid channel for each region.
        are_channels = header.num_channels == len(options.regions)
        if header.is_label_map:  # It may be a file with one value per voxel.
            is_one = len(options.regions) == 1
            are_channels = is_one and not holds_labels(header.files[0], of_region=True)
        if are_channels:
            scheme = RegionScheme.of(options.regions)
            inputs = find_inputs(replace(options.inputs, regions=scheme), labels)
    if options.labels is not None:
        if not any(case.labels for case in inputs.cases):
            number = counted(len(inputs.cases), "case")
            hint = advise(options.labels, holds_images=False)
            raise InputError(f"{options.labels}: no labels of any of the {number}{hint}")
        for description in read_descriptions([options.labels], []):
            names = description.label_names
            inputs = inputs._replace(reading=replace(inputs.reading, reference_names=names))
    return inputs


def number_of_first(inputs: RunInputs, options: TuneOptions) -> int:
    """Return the number of the case to show first."""
    names = [case.case_id for case in inputs.cases]
    if options.first is None:
        return 0
    if options.first not in names:
        first = shorten(options.first)
        raise InputError(f"--case {first}: no such case; there are {listed(names)}")
    return names.index(options.first)
