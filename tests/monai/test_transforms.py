"""The transforms of MONAI: the results of `refine`, with the metadata, devices and types of
MONAI's pipelines.
"""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pytest
from script_imports import importing_from

import crfrefine
from crfrefine.errors import BackendUnavailableError, ConfigError, GridMismatchError, InputError

pytest.importorskip("monai", reason="MONAI is not installed")
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch, list_data_collate

from crfrefine.monai import CrfRefine, CrfRefineD, CrfRefined, CrfRefineDict

GRID = (9, 7, 6)
SPACING = (0.9, 1.4, 2.5)
PARAMETERS = crfrefine.CrfParameters().replace(
    **{"bilateral.theta_alpha": 2.0, "mean_field.num_iterations": 3}
)


def make_case(seed=0, labels=3, modalities=2):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(labels, *GRID)).astype(np.float32), rng.normal(
        size=(modalities, *GRID)
    ).astype(np.float32)


def placed(values, file="sub/case7_0000.nii.gz", spacing=SPACING):
    """A MetaTensor as LoadImage and EnsureChannelFirst leave it: LPS, so that the affine has
    negative entries.
    """
    affine = torch.diag(
        torch.tensor([-spacing[0], -spacing[1], spacing[2], 1.0], dtype=torch.float64)
    )
    affine[:3, 3] = torch.tensor([11.0, -7.0, 30.0])
    return MetaTensor(
        torch.as_tensor(values),
        affine=affine,
        meta={} if file is None else {"filename_or_obj": file},
    )


def wanted(logits, image, spacing=SPACING, **options):
    return crfrefine.refine(logits, image, spacing=spacing, parameters=PARAMETERS, **options)


def test_a_case_is_what_refine_makes_of_it():
    for last in (slice(None), 3):
        logits, image = (array[..., last] for array in make_case())
        spacing = SPACING[: image.ndim - 1]
        result = wanted(logits, image, spacing)
        for output, expected in (
            ("logits", result.logits),
            ("probabilities", result.marginals),
            ("labels", result.label_map[None]),
        ):
            given = placed(logits).requires_grad_() * 1.0
            found = CrfRefine(PARAMETERS, output=output)(given, placed(image))
            assert isinstance(found, MetaTensor)
            assert not found.requires_grad
            assert found.dtype == (torch.uint8 if output == "labels" else torch.float32)
            np.testing.assert_array_equal(found.numpy(), expected)
            # The spacing took part: with another one, the result is another.
            other = CrfRefine(PARAMETERS, output=output, spacing=spacing[::-1])(
                placed(logits), placed(image)
            )
            assert not np.array_equal(found.numpy(), other.numpy())
    many = np.random.default_rng(14).normal(size=(260, 4, 3)).astype(np.float32)
    many[258, 1, 2] = 50.0
    found = CrfRefine(PARAMETERS, spacing=(1.0, 2.0), output="labels")(
        torch.as_tensor(many), torch.zeros(1, 4, 3)
    )
    assert (found.dtype, found[0, 1, 2]) == (torch.int32, 258)


def test_plain_arrays_and_tensors_need_a_spacing_and_keep_their_kind():
    """That of either is enough, as is the affine of either."""
    logits, image = make_case(1)
    expected = wanted(logits, image).logits
    for kind in (np.asarray, torch.as_tensor):
        found = CrfRefine(PARAMETERS, spacing=SPACING)(kind(logits), kind(image))
        assert type(found) is type(kind(logits))
        np.testing.assert_array_equal(np.asarray(found), expected)
        with pytest.raises(
            InputError,
            match=r"the spacing is unknown: neither.*; "
            r"give spacing=\(\.\.\.\), in mm, one per axis",
        ):
            CrfRefine(PARAMETERS)(kind(logits), kind(image))
        plain = CrfRefine(PARAMETERS)(kind(logits), placed(image))
        assert type(plain) is type(kind(logits))
        np.testing.assert_array_equal(np.asarray(plain), expected)
        np.testing.assert_array_equal(
            CrfRefine(PARAMETERS)(placed(logits), kind(image)).numpy(), expected
        )


def test_one_distance_for_all_axes_is_enough_where_shapes_tell_a_case_from_a_batch():
    logits, image = (torch.as_tensor(array) for array in make_case(1))
    transform = CrfRefine(PARAMETERS, spacing=1.5)
    expected = wanted(logits.numpy(), image.numpy(), 1.5).logits
    np.testing.assert_array_equal(transform(logits, image).numpy(), expected)
    batch = transform(logits[None], image[None])
    assert batch.shape == (1, *logits.shape)
    np.testing.assert_array_equal(batch[0].numpy(), expected)
    of_planes = CrfRefine(PARAMETERS, spacing=1.5)(
        logits.movedim(-1, 0)[:2], image.movedim(-1, 0)[:2]
    )
    plane = wanted(logits[..., 1].numpy(), image[..., 1].numpy(), 1.5).logits
    np.testing.assert_array_equal(of_planes[1].numpy(), plane)

    # Two labels and two modalities of a volume, or two planes of nine channels each.
    with pytest.raises(
        InputError, match=r"can be one case, .* or a batch.*give spacing=\(\.\.\.\)"
    ):
        transform(logits[:2], image)
    labels = logits.argmax(0, keepdim=True)
    of_labels = CrfRefine(PARAMETERS, spacing=1.5, input_type="labels")(labels, image[:1])
    assert of_labels.shape == labels.shape
    with pytest.raises(GridMismatchError):
        transform(logits, image[..., 1:])


def test_metadata_and_applied_operations_stay_and_inputs_too():
    logits, image = make_case(10)
    for dtype in (torch.bfloat16, torch.float64):
        data = {"pred": placed(logits).to(dtype), "image": placed(image), "name": "case7"}
        data["pred"].applied_operations = [{"class": "Something", "extra_info": {}}]
        before = {key: data[key].clone() for key in ("pred", "image")}
        done = CrfRefined("pred", parameters=PARAMETERS)(data)
        assert done["name"] == "case7"
        assert done["pred"].applied_operations == [{"class": "Something", "extra_info": {}}]
        assert done["pred"].meta.keys() == data["pred"].meta.keys()
        assert done["pred"].meta is not data["pred"].meta
        assert all(torch.equal(data[key], values) for key, values in before.items())
        assert done["pred"].dtype == dtype
        expected = torch.as_tensor(wanted(before["pred"].float().numpy(), image).logits).to(dtype)
        assert torch.equal(done["pred"].as_tensor(), expected)


def test_a_batch_of_plain_tensors_is_known_by_the_number_of_distances():
    """With a mask each."""
    cases = [make_case(5), make_case(6)]
    mask = np.zeros((2, 1, *GRID), np.uint8)
    mask[0, 0, 2:7] = 1
    mask[1, 0, :, 1:5] = 1
    given = (torch.as_tensor(np.stack(arrays)) for arrays in (*zip(*cases, strict=True), mask))
    found = CrfRefine(PARAMETERS, spacing=SPACING)(*given)
    for one, case, where in zip(found, cases, mask, strict=True):
        np.testing.assert_array_equal(one.numpy(), wanted(*case, mask=where[0]).logits)


def test_a_batch_is_its_cases_each_with_its_own_spacing():
    other = (2.0, 0.7, 1.1)
    cases = [(make_case(3), SPACING, "a.nii"), (make_case(4), other, "b.nii")]
    items = []
    for (logits, image), spacing, file in cases:
        pred = placed(logits, file, spacing)
        items.append({"pred": pred, "image": placed(image, file, spacing)})
    batch = list_data_collate(items)
    assert batch["pred"].is_batch
    for output in ("logits", "labels"):
        done = CrfRefined("pred", parameters=PARAMETERS, output=output)(batch)
        assert done["image"] is batch["image"]
        assert done["pred"].is_batch
        for item, (case, spacing, file) in zip(decollate_batch(done), cases, strict=True):
            expected = wanted(*case, spacing)
            np.testing.assert_array_equal(
                item["pred"].numpy(),
                expected.logits if output == "logits" else expected.label_map[None],
            )
            assert item["pred"].meta["filename_or_obj"] == file
            np.testing.assert_array_equal(
                item["pred"].affine, placed(case[0], file, spacing).affine
            )
    batch["image"][1, 1, 2, 3, 4] = np.inf
    with pytest.raises(
        InputError,
        match=r"^case 1 of the batch, b\.nii: image: channel 1 has 1 values that are not finite",
    ):
        CrfRefined("pred", parameters=PARAMETERS)(batch)


def test_several_keys_and_missing_ones():
    logits, image = make_case(11)
    other = make_case(12)[0]
    mask = np.zeros((1, *GRID), bool)
    mask[:, 1:8, 2:] = True
    data = {"a": placed(logits), "b": placed(other), "image": placed(image), "head": placed(mask)}
    done = CrfRefined(("a", "b"), parameters=PARAMETERS, mask_key=(None, "head"))(data)
    np.testing.assert_array_equal(done["a"].numpy(), wanted(logits, image).logits)
    np.testing.assert_array_equal(done["b"].numpy(), wanted(other, image, mask=mask[0]).logits)
    with pytest.raises(KeyError, match="Key `c` of transform `CrfRefined` was missing"):
        CrfRefined(("a", "c"), parameters=PARAMETERS)(data)
    skipped = CrfRefined(("a", "c"), parameters=PARAMETERS, allow_missing_keys=True)(data)
    np.testing.assert_array_equal(skipped["a"].numpy(), done["a"].numpy())
    with pytest.raises(
        KeyError,
        match="Key `t1` of transform `CrfRefined` was missing in the data, which has logits in `a`",
    ):
        CrfRefined("a", "t1", PARAMETERS, allow_missing_keys=True)(data)
    assert CrfRefineD is CrfRefined
    assert CrfRefineDict is CrfRefined


def test_threads_and_workers_of_a_loader_share_one_transform():
    items = []
    for seed in range(20, 24):
        logits, image = make_case(seed)
        items.append({"pred": placed(logits), "image": placed(image)})
    expected = [wanted(item["pred"].numpy(), item["image"].numpy()).logits for item in items]
    transform = CrfRefined("pred", parameters=PARAMETERS, threads=1)
    with ThreadPoolExecutor(4) as pool:
        found = [item["pred"] for item in pool.map(pickle.loads(pickle.dumps(transform)), items)]
    (batch,) = DataLoader(Dataset(items, transform), batch_size=4, num_workers=1)
    for answers in (found, batch["pred"]):
        np.testing.assert_array_equal(np.stack([one.numpy() for one in answers]), expected)


# ---- What is refused


def test_other_grids_are_named_with_their_files():
    logits, image = make_case(23)
    with pytest.raises(GridMismatchError) as caught:
        CrfRefine(PARAMETERS)(
            placed(logits, "sub/pred.nii.gz"), placed(image[..., :-1], "sub/t1.nii.gz")
        )
    for part in ("logits (sub/pred.nii.gz)", "image (sub/t1.nii.gz)", "9×7×6", "Invertd"):
        assert part in str(caught.value)


def test_a_metatensor_that_nobody_placed_has_no_spacing():
    """MONAI gives it the unit matrix, as if voxels of 1 mm were known."""
    logits, image = (MetaTensor(torch.as_tensor(array)) for array in make_case(24))
    with pytest.raises(
        InputError,
        match="the spacing is unknown: neither logits nor image have metadata with an affine of "
        "their own",
    ):
        CrfRefine(PARAMETERS)(logits, image)
    named = placed(make_case(24)[1])
    del named.meta["affine"]
    with pytest.raises(InputError, match=r"^sub/case7_0000\.nii\.gz: the spacing is unknown"):
        CrfRefine(PARAMETERS)(logits, named)
    one = CrfRefine(PARAMETERS, spacing=(1.0, 1.0, 1.0))(logits, image)
    np.testing.assert_array_equal(one.numpy(), wanted(*make_case(24), (1.0, 1.0, 1.0)).logits)
    # A file's unit matrix is an affine.
    of_file = placed(make_case(24)[1])
    of_file.affine = torch.eye(4, dtype=torch.float64)
    np.testing.assert_array_equal(CrfRefine(PARAMETERS)(logits, of_file).numpy(), one.numpy())


def test_input_that_does_not_fit():
    logits, image = make_case(27)
    three = PARAMETERS.replace(**{"bilateral.theta_beta": [0.1, 0.2, 0.3]})
    pending = placed(image)
    pending.push_pending_operation({"lazy_affine": torch.eye(4), "lazy_shape": GRID})
    given = placed(logits), placed(image)
    wider = placed(image, spacing=(0.9, 1.4, 2.6))
    short = placed(np.ones((1, 9, 7, 5)))
    for kind, options, tensors, message in (
        (
            InputError,
            {},
            (placed(logits[:1]), given[1]),
            r"case7_0000\.nii\.gz: logits have 1 label; at least two",
        ),
        (
            ConfigError,
            {"parameters": three},
            given,
            r"case7_0000\.nii\.gz: bilateral\.theta_beta.*3.*2",
        ),
        (
            ConfigError,
            {"output": "mask"},
            given,
            "output: .* expected one of logits, probabilities, labels; got 'mask'",
        ),
        (
            ConfigError,
            {"input_type": "labels", "output": "logits"},
            given,
            "output: with input_type='labels' expected one of labels; got",
        ),
        (GridMismatchError, {}, (given[0], wider), "different grids"),
        (GridMismatchError, {}, (*given, short), "logits and mask are on different grids"),
        (
            InputError,
            {"input_type": "labels"},
            given,
            r"the label map has shape \(3, 9, 7, 6\); expected one channel",
        ),
        (
            ConfigError,
            {"network_spacing": 3.0},
            given,
            "network_spacing: it is that of a label map",
        ),
        (
            ConfigError,
            {"regions": "core"},
            given,
            "regions: expected a dictionary of names and their labels",
        ),
        (InputError, {"spacing": [1.0]}, given, "spacing has 1 distances"),
        (InputError, {"spacing": (1.0, 2.0)}, given, r"batches of 3 and 2 cases"),
        (
            InputError,
            {},
            (*given, placed(np.ones((2, *GRID)))),
            r"the mask has shape \(2, 9, 7, 6\); expected one channel",
        ),
        (InputError, {}, (given[0], pending), r"image \(.*\): lazy operations are pending"),
        (
            InputError,
            {"spacing": (1.0,) * 3},
            (logits, np.ma.masked_less(image, 0.0)),
            "image is a masked array",
        ),
        (
            InputError,
            {},
            (given[0], "image.nii.gz"),
            r"expected tensors or arrays, got 'image\.nii\.gz'; LoadImage reads files",
        ),
    ):
        with pytest.raises(kind, match=message):
            CrfRefine(**({"parameters": PARAMETERS} | options))(*tensors)
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailableError):
            CrfRefine(PARAMETERS, device="cuda")(*given)


def test_a_label_map_is_refined_as_its_error_advises():
    """With a channel, as LoadImaged and EnsureChannelFirstd leave it, of floats; the result is a
    label map, too.
    """
    logits, image = make_case(30)
    labels = logits.argmax(0)
    given = placed(labels[None].astype(np.float32))
    with pytest.raises(InputError, match=r'needs input_type="labels"'):
        CrfRefine(PARAMETERS)(given, placed(image))
    found = CrfRefine(PARAMETERS, input_type="labels")(given, placed(image))
    np.testing.assert_array_equal(
        found[0].numpy(), wanted(labels, image, input_type="labels").label_map
    )
    assert found.dtype == torch.uint8


def test_a_transform_is_of_its_arguments_as_they_were():
    logits, image = make_case(30)
    labels = logits.argmax(0)
    given = placed(labels[None].astype(np.float32))
    distances = np.array(SPACING) * 2
    changed = CrfRefine(input_type="labels", network_spacing=distances)
    expected = changed(given, placed(image))
    distances *= 3
    np.testing.assert_array_equal(changed(given, placed(image)), expected)


# ---- In the configuration of a bundle, and the example that writes one


def test_a_configuration_names_the_transform(tmp_path):
    entry = {
        "_target_": "crfrefine.monai.CrfRefined",
        "keys": ["pred"],
        "image_key": "t1",
        "parameters": {"bilateral": {"theta_alpha": 3.0}, "mean_field": {"num_iterations": 2}},
        "regions": [["whole", [1, 2]], ["core", 2]],
        "output": "labels",
        "spacing": [1.0, 2.0, 3.0],
        "threads": 1,
    }
    file = tmp_path / "inference.yaml"
    ConfigParser.export_config_file(
        {"post": {"_target_": "Compose", "transforms": [entry]}}, str(file), fmt="yaml"
    )
    parser = ConfigParser(ConfigParser.load_config_file(str(file)))
    (transform,) = parser.get_parsed_content("post").transforms
    assert isinstance(transform, CrfRefined)
    assert transform.parameters == crfrefine.CrfParameters().replace(
        **{"bilateral.theta_alpha": 3.0, "mean_field.num_iterations": 2}
    )
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 6, 4)).astype(np.float32)
    image = rng.normal(size=(1, 5, 6, 4)).astype(np.float32)
    found = transform({"pred": torch.as_tensor(logits), "t1": torch.as_tensor(image)})["pred"]
    scheme = crfrefine.RegionScheme.of({"whole": [1, 2], "core": 2})
    wanted = crfrefine.refine(
        logits, image, spacing=(1, 2, 3), parameters=transform.parameters, regions=scheme
    ).label_map
    np.testing.assert_array_equal(found[0].numpy(), wanted)


def test_the_example_writes_a_bundle_that_refines(one_torch_thread, monkeypatch, tmp_path, capsys):
    with importing_from(Path(__file__).resolve().parents[2] / "examples") as load:
        recipe = load("end_to_end")
        monkeypatch.setattr(recipe, "GRID", (16, 12, 8))
        example = load("bundle_monai")
        scores = example.main(["--cases", "2", "--epochs", "2", "--output", str(tmp_path)])
    assert f"crf: mean Dice {scores['crf']:.3f}" in capsys.readouterr().out
    entries = json.loads((tmp_path / "bundle" / "configs" / "inference.json").read_text())[
        "postprocessing"
    ]["transforms"]
    assert [entry["_target_"] for entry in entries].count("crfrefine.monai.CrfRefined") == 1
    for case in ("case1000", "case1001", "case1002"):
        image = nibabel.load(tmp_path / "images" / f"{case}_0000.nii.gz")
        maps = [
            nibabel.load(tmp_path / "bundle" / "refined" / f"{case}_0000_{name}.nii.gz")
            for name in ("network", "crf")
        ]
        for found in maps:
            assert found.shape == image.shape
            np.testing.assert_allclose(found.affine, image.affine)
            assert found.get_data_dtype() == np.uint8
        assert (np.asarray(maps[0].dataobj) != np.asarray(maps[1].dataobj)).any()
