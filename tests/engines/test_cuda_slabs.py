"""Cases that a GPU's memory does not hold at once: they are refined in slabs, with the results of one piece, or refused with the sizes."""

import re
from dataclasses import replace

import cuda_shim
import numpy as np
import pytest
from cli_helpers import Folders, files_in, save_nifti
from oracles import random_case
from strict_device import StrictDevice, use

from crfrefine import CapacityError, CrfParameters, RegionScheme, refine
from crfrefine.engines import slabs
from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.runs.infer.options import InferenceOptions
from crfrefine.runs.infer.run import run_inference

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")

SHAPE = (98, 5, 6)
SPACING = (1.0, 0.6, 1.7)
SETTINGS = {
    "spatial.weight": 0.5,
    "bilateral.theta_alpha": 1.2,
    "bilateral.theta_beta": 0.3,
    "mean_field.filter": "truncated",
    "mean_field.num_iterations": 2,
    "mean_field.tolerance": 0.0,
}


def run(device, monkeypatch, case, changes, **options):
    use(CudaBackend(device), monkeypatch)
    given = {"mask": case.mask, "spacing": case.spacing, "parameters": CrfParameters().replace(**(SETTINGS | changes)), "device": "cuda"}
    return refine(case.logits, case.image, **(given | options))


def case_of(kind="plain"):
    case = replace(random_case(3, num_modalities=1, num_labels=4, grid_shape=SHAPE), spacing=SPACING)
    if kind == "box":
        mask = np.zeros(SHAPE, bool)
        mask[3:94, 1:4, 1:5] = np.random.default_rng(0).random((91, 3, 4)) < 0.7
        return replace(case, mask=mask)
    if kind == "empty planes":
        mask = np.ones(SHAPE, bool)
        mask[:30] = False
        mask[0, 0, 0] = True
        return replace(case, mask=mask)
    return case


def cuts(monkeypatch):
    """All cuts that are tried from now on."""
    tried = []
    inner = slabs._run

    def noted(run, values, image, models, cut, progress):
        tried.append(list(cut))
        return inner(run, values, image, models, cut, progress)

    monkeypatch.setattr(slabs, "_run", noted)
    return tried


REGIONS = RegionScheme.of({"whole": [1, 2, 3], "core": [2, 3], "tip": 3, "rest": 4})


@pytest.mark.parametrize(
    ("kind", "filter_name", "regions"), [("plain", "lattice", None), ("box", "truncated", REGIONS), ("empty planes", "truncated", None)]
)
def test_a_case_beyond_the_memory_has_the_result_of_one_piece(kind, filter_name, regions, monkeypatch):
    """The same bits with direct sums; never more memory than there is; a note; what needs all voxels together is left out."""
    case, large = case_of(kind), StrictDevice()
    changes = {"mean_field.filter": filter_name}
    expected = run(large, monkeypatch, case, changes, regions=regions)
    tried = cuts(monkeypatch)
    assert (expected.notes, tried) == ((), [])
    small = StrictDevice(int(0.7 * large.most))
    found = run(small, monkeypatch, case, changes, regions=regions)
    assert small.most <= small.limit
    assert len(tried[-1]) > 1
    tolerance = 0.0 if filter_name == "truncated" else 1e-6
    np.testing.assert_allclose(found.marginals, expected.marginals, rtol=0.0, atol=tolerance)
    np.testing.assert_array_equal(found.label_map, expected.label_map)
    np.testing.assert_array_equal(found.network_label_map, expected.network_label_map)
    assert found.changes == expected.changes
    assert (found.num_iterations, found.converged, found.energy) == (2, False, ())
    assert all(line.endswith(f", in {len(tried[-1])} slabs") for line in found.filters)
    height = tried[-1][0].stop
    assert found.notes == (
        f"the case does not fit into the device's memory at once: refined in {len(tried[-1])} slabs of {height} planes, "
        "with all 2 steps, and without an energy",
    )


@pytest.mark.parametrize("is_told", [True, False])
def test_slabs_get_smaller_until_they_fit(is_told, monkeypatch):
    """Also where the device does not tell what is free, so that allocations fail in the middle: nothing of them stays."""
    case, large = case_of(), StrictDevice()
    changes = {"mean_field.num_iterations": 1, "mean_field.filter": "lattice"}
    run(large, monkeypatch, case, changes)
    tried = cuts(monkeypatch)
    small = StrictDevice(int(0.4 * large.most), is_told=is_told)
    found = run(small, monkeypatch, case, changes)
    assert small.most <= small.limit
    assert len(tried) > 1
    extents = [max(slab.extent for slab in each) for each in tried]
    assert extents == sorted(set(extents), reverse=True)
    assert len(found.notes) == 1


def test_all_slabs_have_the_filter_that_the_fullest_chooses(monkeypatch):
    """Messages of different filters differ by percents: borders of slabs would show."""
    case, large = case_of("empty planes"), StrictDevice()
    run(large, monkeypatch, case, {})
    asked = []
    inner = CudaBackend.mean_field

    def noted(self, logits, image, spec, *options):
        asked.append((spec.kernels.filter, image.num_voxels))
        return inner(self, logits, image, spec, *options)

    monkeypatch.setattr(CudaBackend, "mean_field", noted)
    run(StrictDevice(int(0.6 * large.most)), monkeypatch, case, {"mean_field.filter": "auto"})
    done = asked[-len([name for name, _ in asked if name != "auto"]) - 1 :]
    assert done[0][0] == "auto"
    assert len({name for name, _ in done[1:]}) == 1
    assert len(done) > 1
    assert done[0][1] == max(count for _, count in done)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            r"not even slabs of 8 of the 98 planes fit, each with up to 16 more on either side: 2 steps with kernels that reach 4 planes "
            r"depend on these; .*of \d+ voxels.* needs about 0\.0 GB on cuda-shim, where 0\.0 GB are free; use a mask.*--device cpu",
        ),
        ({"volume.weight": 0.5, "volume.keep": "argmax"}, r"volume.weight above 0 needs the whole volume at once, and .* needs about 0\.0"),
    ],
)
def test_what_does_not_fit_in_slabs_is_refused_with_the_sizes(changes, message, monkeypatch):
    with pytest.raises(CapacityError, match=message):
        run(StrictDevice(20_000), monkeypatch, case_of(), changes)


@pytest.mark.parametrize("fits", [True, False])
def test_a_folder_run_says_so(fits, tmp_path, monkeypatch):
    """In the summary; what does not fit in slabs either is not written, and no part of it."""
    case, large = case_of(), StrictDevice()
    run(large, monkeypatch, case, {})
    folders = Folders(tmp_path / "images", tmp_path / "logits", tmp_path / "out")
    folders.images.mkdir()
    folders.logits.mkdir()
    # In a file the first axis is the fastest one; slabs are cut along the slowest.
    save_nifti(folders.images / "a_0000.nii.gz", case.image[0].T)
    save_nifti(folders.logits / "a.nii.gz", np.moveaxis(case.logits, 0, -1).transpose(2, 1, 0, 3))
    small = CudaBackend(StrictDevice(int(0.7 * large.most) if fits else 20_000))
    use(small, monkeypatch)
    given = {"images": (folders.images,), "logits": (folders.logits,), "output": folders.output}
    (record,) = run_inference(InferenceOptions(**given, parameters=CrfParameters().replace(**SETTINGS), device="cuda")).cases
    if fits:
        assert record.status == "done"
        assert any(re.search(r"does not fit into the device's memory at once: refined in \d slabs", note) for note in record.notes)
    else:
        assert record.status == "failed"
        assert "not even slabs of 8 of the 98 planes fit" in record.failures[0].message
        assert files_in(folders.output) == []
