"""What is refined while a slider moves: a box around the shown place, and then what `infer` would write."""

import dataclasses

import numpy as np
import pytest
from cli_helpers import load_nifti, run_here, save_nifti
from tune_helpers import options_for, write_labeled, write_large

from crfrefine.io import read_volume
from crfrefine.parameters.model import CrfParameters
from crfrefine.runs.tune.case import CaseRefiner, open_case
from crfrefine.runs.tune.session import find_case


def opened(options):
    inputs, case = find_case(options)
    return open_case(case, inputs.reading, 1, options.inputs.network_spacing)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folders, labels = write_large(tmp_path_factory.mktemp("large"))
    return opened(options_for(folders, labels))


def chosen(**changes):
    return CrfParameters().replace(**{"bilateral.theta_alpha": 2.0, "bilateral.theta_beta": 0.1, **changes})


def test_a_box_agrees_with_the_whole_case_away_from_its_faces(large):
    """Messages come from 4 sigmas at most, 8 mm, in each of the steps; far fewer than 1 % of the voxels inside hear of the cut."""
    parameters = chosen()
    refiner = CaseRefiner(large, 1)
    box = large.stored_box(large.box_around((26, 38, 30)))
    whole = refiner.refine(parameters)
    everything = refiner.refine(parameters, tuple(slice(0, size) for size in large.network_labels.shape))
    assert everything.num_iterations == whole.num_iterations
    np.testing.assert_array_equal(everything.label_map, whole.label_map)
    found, wanted = refiner.refine(parameters, box).label_map, whole.label_map[box]
    inner = tuple(slice(int(8 / step), -int(8 / step)) for step in large.spacing)
    assert found[inner].size > 10_000
    assert np.mean(found[inner] != wanted[inner]) < 0.005
    before = large.network_labels[box][inner]
    assert np.mean(before != wanted[inner]) > 0.01, "there is something to refine"


@pytest.mark.parametrize("kind", ["masks", "labels", "coarse", "regions"])
def test_the_whole_case_is_what_infer_writes(tmp_path, kind):
    folders, _ = write_labeled(tmp_path, "a")
    options = options_for(folders)
    parameters = options.inputs.parameters.replace(**{"intensity.mask": "nonzero", "postprocess.keep_largest": "foreground"})
    more = ["--threads", 1]
    logits = load_nifti(folders.logits / "a.nii.gz")
    if kind in ("labels", "coarse"):
        save_nifti(folders.logits / "a.nii.gz", logits.argmax(axis=-1).astype(np.uint8))
        more += ["--input-type", "labels"]
    inputs = dataclasses.replace(options.inputs, parameters=parameters, input_type="labels" if "labels" in more else "auto")
    if kind == "coarse":
        parameters = CrfParameters.load("sharp")
        inputs = dataclasses.replace(inputs, parameters=parameters, network_spacing=(4.0, 5.0, 6.0))
        more += ["--network-spacing", "4,5,6"]
    if kind == "regions":
        from crfrefine.cli.options import parse_scheme

        inputs = dataclasses.replace(inputs, regions=parse_scheme(["a=1+2", "b=2", "c=3", "d=4"], None))
        more += ["--regions", "a=1+2", "--regions", "b=2", "--regions", "c=3", "--regions", "d=4"]
    case = opened(dataclasses.replace(options, inputs=inputs))
    assert case.box_around((0,) * len(case.upright_grid)) is None, "a small case needs no box"
    parameters.save(tmp_path / "saved.toml")
    run_here("infer", *folders.arguments, "-c", tmp_path / "saved.toml", *more, status=0)
    written = read_volume(next(folders.output.glob("a.*"))).data
    found = CaseRefiner(case, 1).refine(parameters)
    np.testing.assert_array_equal(found.label_map, written)
    assert found.changes.voxels_changed > 0
