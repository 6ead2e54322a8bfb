"""The cases that the page offers, their references, and what the regions of the options mean for them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.base.text import counted, listed, shorten
from crfrefine.cases.case import read_case_headers
from crfrefine.cases.case_files import CaseList
from crfrefine.cases.discovery import labels_of
from crfrefine.cases.label_input import KIND as LABEL_MAP
from crfrefine.cases.region_reading import RegionReading
from crfrefine.errors import ConfigError, InputError
from crfrefine.runs.infer.inputs import RunInputs, find_inputs

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from crfrefine.apps.tune.options import TuneOptions
    from crfrefine.cases.case_files import CaseFiles


def find_cases(options: TuneOptions) -> tuple[RunInputs, tuple[CaseFiles, ...]]:
    """Find the cases to choose from, with their references.

    Raises:
        CrfRefineError: no case, an unknown name, or options that contradict each other.
    """
    inputs = find_inputs(options.inputs)
    names = [case.case_id for case in inputs.cases]
    if options.first is not None and options.first not in names:
        raise InputError(f"--case {shorten(options.first)}: no such case; there are {listed(names)}")
    first = inputs.cases[0 if options.first is None else names.index(options.first)]
    if options.regions and _are_channels(options, inputs, first):
        inputs = find_inputs(replace(options.inputs, regions=_scheme_of(options)))
    elif options.class_order is not None:
        raise ConfigError("--regions-class-order: it belongs to --regions that name a network's sigmoid channels, and there are none")
    references = _references(options, inputs)
    cases = tuple(replace(case, labels=references.get(case.case_id)) for case in inputs.cases)
    if options.labels is not None and not references:
        raise InputError(f"{options.labels}: no labels of any of the {counted(len(cases), 'case')}")
    return inputs, cases


def _references(options: TuneOptions, inputs: RunInputs) -> Mapping[str, Path]:
    """Return the reference of each case that has one: a given label map, or one that a network of nnU-Net was trained on."""
    if options.labels is not None:
        return labels_of(CaseList(inputs.cases), options.labels)
    if options.inputs.nnunet is None:
        return {}
    from crfrefine.cases.nnunet.datasets import locate_images, locate_labels
    from crfrefine.cases.nnunet.layout import TrainedNetwork, recognize_folder

    network = recognize_folder(options.inputs.nnunet)
    if not isinstance(network, TrainedNetwork):
        return {}
    given = options.inputs.images[0] if options.inputs.images else None
    try:
        folder = locate_labels(network, locate_images(network, given), None)
    except InputError:  # The page is of use without them, too.
        return {}
    return labels_of(CaseList(inputs.cases), folder)


def _are_channels(options: TuneOptions, inputs: RunInputs, case: CaseFiles) -> bool:
    """Return whether the network's output has a sigmoid channel for each region of the options."""
    network = read_case_headers(case, replace(inputs.reading, mask_mode="none")).logits
    if network is None or network.kind != LABEL_MAP:
        return network is not None and network.num_labels == len(options.regions)
    # A file with one value per voxel; which label a single region writes does not matter here.
    (name, labels), *others = ((region.name, region.labels) for region in options.regions)
    return not others and RegionReading(RegionScheme((name,), (labels,), labels[:1])).is_channel(network.files[0])


def _scheme_of(options: TuneOptions) -> RegionScheme:
    names, labels = tuple(region.name for region in options.regions), tuple(region.labels for region in options.regions)
    return RegionScheme.named(names, labels, options.class_order)
