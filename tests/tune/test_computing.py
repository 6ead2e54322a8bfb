"""What is refined while a slider moves: a box around the shown place, and then what `infer` would
write.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import load_nifti, run_here, save_nifti
from tune_helpers import options_for, write_labeled, write_large

from crfrefine.infer.options import InferenceOptions
from crfrefine.io import read_volume
from crfrefine.parameters.model import CrfParameters
from crfrefine.tune.case import CaseRefiner, open_case
from crfrefine.tune.finding import find_cases_to_show

INPUTS = InferenceOptions((), (), Path(), threads=1)


def opened(options):
    inputs = find_cases_to_show(options)
    return open_case(inputs.cases[0], inputs.reading, 1)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folders, labels = write_large(tmp_path_factory.mktemp("large"))
    return opened(options_for(folders, labels))


def chosen(**changes):
    return CrfParameters().replace(
        **{"bilateral.theta_alpha": 2.0, "bilateral.theta_beta": 0.1, **changes}
    )


def box_around(case, place):
    """The box around a voxel without strokes."""
    inside = tuple(slice(at, at + 1) for at in place)
    return case.box_around(inside, np.zeros_like(case.network_labels))


def test_a_box_agrees_with_the_whole_case_away_from_its_faces(large):
    """Messages come from 4 sigmas at most, 8 mm, in each of the steps; far fewer than 1 % of the
    voxels inside hear of the cut.
    """
    parameters = chosen()
    refiner = CaseRefiner(large, INPUTS)
    box = large.stored_box(box_around(large, (26, 38, 30)))
    whole = refiner.refine(parameters)
    everything = refiner.refine_box(
        parameters, tuple(slice(0, size) for size in large.network_labels.shape)
    )
    assert everything.num_iterations == whole.num_iterations
    np.testing.assert_array_equal(everything.label_map, whole.label_map)
    found = refiner.refine_box(parameters, box).label_map
    wanted = whole.label_map[box]
    inner = tuple(slice(int(8 / step), -int(8 / step)) for step in large.spacing)
    assert found[inner].size > 10_000
    assert np.mean(found[inner] != wanted[inner]) < 0.005
    before = large.network_labels[box][inner]
    assert np.mean(before != wanted[inner]) > 0.01, "there is something to refine"


@pytest.mark.parametrize("is_coarse", [False, True])
def test_the_whole_case_is_what_infer_writes(tmp_path, is_coarse):
    """Logits in a mask made from the image, with a rule for components; and a coarse label map.

    `test_session.py` and `test_store.py` have label maps and channels of regions with strokes.
    """
    folders, _ = write_labeled(tmp_path, "a")
    options = options_for(folders)
    more = ("--threads", 1)
    rules = {"intensity.mask": "nonzero", "postprocess.keep_largest": "foreground"}
    changes = {"parameters": options.inputs.parameters.replace(**rules)}
    if is_coarse:
        labels = load_nifti(folders.logits / "a.nii.gz").argmax(axis=-1).astype(np.uint8)
        save_nifti(folders.logits / "a.nii.gz", labels)
        changes = {"input_type": "labels", "network_spacing": (4.0, 5.0, 6.0)}
        changes["parameters"] = CrfParameters.load("sharp")
        more += ("--input-type", "labels", "--network-spacing", "4,5,6")
    inputs = dataclasses.replace(options.inputs, **changes)
    case = opened(dataclasses.replace(options, inputs=inputs))
    assert box_around(case, (0,) * len(case.upright_grid)) is None, "a small case needs no box"
    changes["parameters"].save(tmp_path / "saved.toml")
    run_here("infer", *folders.arguments, "-c", tmp_path / "saved.toml", *more, status=0)
    written = read_volume(next(folders.output.glob("a.*"))).data
    found = CaseRefiner(case, inputs).refine(changes["parameters"])
    np.testing.assert_array_equal(found.label_map, written)
    assert found.changes.voxels_changed > 0
