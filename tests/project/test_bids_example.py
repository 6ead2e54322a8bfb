"""`examples/bids.py` refines the derivatives of a BIDS dataset into a derived dataset."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from cli_helpers import FAST, GRID_SHAPE, SPACING, load_nifti, save_nifti
from oracles import softmax

import crfrefine
from crfrefine.runs.demo.phantom import make_phantom

ROOT = Path(__file__).resolve().parents[2]
CASES = {"sub-01_acq-x": "sub-01/anat", "sub-02_ses-a": "sub-02/ses-a/anat"}


def write_dataset(dataset):
    """Two cases of two modalities, with the probabilities of a network in derivatives."""
    for seed, (name, folder) in enumerate(CASES.items()):
        phantom = make_phantom(seed, GRID_SHAPE, SPACING)
        for suffix, values in zip(("T1w", "FLAIR"), phantom.image, strict=True):
            save_nifti(dataset / folder / f"{name}_{suffix}.nii.gz", values.astype(np.float32))
        probabilities = np.moveaxis(softmax(phantom.logits), 0, -1).astype(np.float32)
        save_nifti(dataset / "derivatives" / "net" / folder / f"{name}_desc-net_probseg.nii.gz", probabilities)
    content = {"Name": "Phantoms", "BIDSVersion": "1.9.0"}
    (dataset / "dataset_description.json").write_text(json.dumps(content), encoding="utf-8")


def run_example(*arguments):
    command = [sys.executable, ROOT / "examples" / "bids.py", *arguments, "--threads", "1", *FAST]
    environment = {**os.environ, "PYTHONPATH": str(Path(crfrefine.__file__).parents[1])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_each_segmentation_is_refined_into_a_derived_dataset(tmp_path):
    dataset, output = tmp_path / "data set", tmp_path / "data set" / "derivatives" / "crf"
    write_dataset(dataset)
    done = run_example(dataset, "net", output, "--modality", "FLAIR", "--modality", "T1w")
    assert done.returncode == 0, done.stderr
    parameters = crfrefine.CrfParameters().replace(**{"mean_field.filter": "lattice"})
    for name, folder in CASES.items():
        images = [f"{folder}/{name}_{suffix}.nii.gz" for suffix in ("FLAIR", "T1w")]
        network = f"derivatives/net/{folder}/{name}_desc-net_probseg.nii.gz"
        image = np.stack([load_nifti(dataset / path) for path in images])
        scores = np.moveaxis(load_nifti(dataset / network), -1, 0)
        wanted = crfrefine.refine(scores, image, spacing=SPACING, parameters=parameters, input_type="probabilities")
        np.testing.assert_array_equal(load_nifti(output / folder / f"{name}_desc-crf_dseg.nii.gz"), wanted.label_map)
        sidecar = json.loads((output / folder / f"{name}_desc-crf_dseg.json").read_text(encoding="utf-8"))
        assert sidecar["Sources"] == [f"bids:raw:{path}" for path in (*images, network)]
    described = json.loads((output / "dataset_description.json").read_text(encoding="utf-8"))
    assert described["DatasetType"] == "derivative"
    assert (output / described["DatasetLinks"]["raw"]).samefile(dataset)
