"""Small BIDS datasets: generated images, a network's probabilities in derivatives, and reference label maps."""

import json
from pathlib import Path

import numpy as np
from cli_helpers import GRID_SHAPE, SPACING, save_nifti
from oracles import softmax

from crfrefine.apps.demo.phantom import make_phantom


def describe(folder, *, derivative=False):
    folder.mkdir(parents=True, exist_ok=True)
    content = {"Name": f"Phantoms in {folder.name}", "BIDSVersion": "1.9.0", "License": "CC0"}
    if derivative:
        content |= {"DatasetType": "derivative", "GeneratedBy": [{"Name": "network"}]}
    (folder / "dataset_description.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "README").write_text(
        "Generated volumes of two modalities, to try programs on. They show nothing of anybody.\n" * 3, encoding="utf-8"
    )


def write_bids(root, *names, modalities=("T1w",)):
    """Write cases such as "sub-01" or "sub-02_ses-1", and return the dataset, the derivatives and the reference."""
    dataset = root / "dataset"
    derivatives, reference = dataset / "derivatives" / "network", root / "manual"
    for folder in (dataset, derivatives, reference):
        describe(folder, derivative=folder != dataset)
    for seed, name in enumerate(names):
        phantom = make_phantom(seed, GRID_SHAPE, SPACING)
        place = Path(*name.split("_")[:2]) / "anat" if "ses-" in name else Path(name.split("_")[0]) / "anat"
        for suffix, values in zip(modalities, phantom.image, strict=False):
            file = save_nifti(dataset / place / f"{name}_{suffix}.nii.gz", values.astype(np.int16))
            (file.parent / f"{name}_{suffix}.json").write_text("{}", encoding="utf-8")
        save_nifti(derivatives / place / f"{name}_probseg.nii.gz", np.moveaxis(softmax(phantom.logits), 0, -1).astype(np.float32))
        save_nifti(reference / place / f"{name}_desc-manual_dseg.nii.gz", phantom.labels.astype(np.uint8))
    return dataset, derivatives, reference
