"""The transform in the configuration of a bundle, and the example that writes one."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from script_imports import importing_from

import crfrefine

pytest.importorskip("monai", reason="MONAI is not installed")
from monai.bundle import ConfigParser

from crfrefine.monai import CrfRefined

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


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
    ConfigParser.export_config_file({"post": {"_target_": "Compose", "transforms": [entry]}}, str(file), fmt="yaml")
    parser = ConfigParser(ConfigParser.load_config_file(str(file)))
    (transform,) = parser.get_parsed_content("post").transforms
    assert isinstance(transform, CrfRefined)
    assert transform.parameters == crfrefine.CrfParameters().replace(**{"bilateral.theta_alpha": 3.0, "mean_field.num_iterations": 2})
    rng = np.random.default_rng(0)
    logits, image = rng.normal(size=(2, 5, 6, 4)).astype(np.float32), rng.normal(size=(1, 5, 6, 4)).astype(np.float32)
    found = transform({"pred": torch.as_tensor(logits), "t1": torch.as_tensor(image)})["pred"]
    scheme = crfrefine.RegionScheme.of({"whole": [1, 2], "core": 2})
    wanted = crfrefine.refine(logits, image, spacing=(1, 2, 3), parameters=transform.parameters, regions=scheme).label_map
    np.testing.assert_array_equal(found[0].numpy(), wanted)


def test_the_example_writes_a_bundle_that_refines(one_torch_thread, monkeypatch, tmp_path, capsys):
    with importing_from(EXAMPLES) as load:
        recipe = load("end_to_end")
        monkeypatch.setattr(recipe, "GRID", (16, 12, 8))
        example = load("bundle_monai")
        scores = example.main(["--cases", "2", "--epochs", "2", "--output", str(tmp_path)])
    assert f"crf: mean Dice {scores['crf']:.3f}" in capsys.readouterr().out
    entries = json.loads((tmp_path / "bundle" / "configs" / "inference.json").read_text())["postprocessing"]["transforms"]
    assert [entry["_target_"] for entry in entries].count("crfrefine.monai.CrfRefined") == 1
    for case in ("case1000", "case1001", "case1002"):
        image = nibabel.load(tmp_path / "images" / f"{case}_0000.nii.gz")
        maps = [nibabel.load(tmp_path / "bundle" / "refined" / f"{case}_0000_{name}.nii.gz") for name in ("network", "crf")]
        for found in maps:
            assert found.shape == image.shape
            np.testing.assert_allclose(found.affine, image.affine)
            assert found.get_data_dtype() == np.uint8
        assert (np.asarray(maps[0].dataobj) != np.asarray(maps[1].dataobj)).any()
