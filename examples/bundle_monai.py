r"""A bundle of MONAI whose post-processing refines.

Train a small U-Net, write the bundle, run it on new cases. Seconds on one core.

    pip install '.[monai]'
    python examples/bundle_monai.py [--cases 4] [--epochs 20] [--output DIR]

DIR gets generated images/ and labels/, and bundle/ with configs/, models/ and, in refined/, the
label maps of new cases. What refines is one entry of `POSTPROCESSING`; any bundle's list takes it,
behind the network and before what turns logits into labels. MONAI's command runs the bundle, too
(it needs `pip install fire`):

    python -m monai.bundle run --config_file DIR/bundle/configs/inference.json \
        --bundle_root DIR/bundle --images DIR/images

`end_to_end_monai.py` trains the CRF with the network.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import end_to_end as recipe
import nibabel
import numpy as np
import torch
from end_to_end_monai import load, write_cases
from monai.bundle import ConfigParser
from monai.networks.nets import UNet

PARAMETERS = recipe.START.replace(**{"mean_field.num_iterations": 10})
"""For these volumes; `train-crf` finds those of yours."""

NETWORK = {
    "_target_": "UNet",
    "spatial_dims": 3,
    "in_channels": recipe.NUM_MODALITIES,
    "out_channels": recipe.NUM_LABELS,
    "channels": [8, 16],
    "strides": [2],
    "norm": "INSTANCE",
}
PREPROCESSING = [
    {"_target_": "LoadImaged", "keys": "image"},
    {"_target_": "EnsureChannelFirstd", "keys": "image"},
    {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
    {"_target_": "NormalizeIntensityd", "keys": "image", "channel_wise": True},
]
SAVING = {
    "_target_": "SaveImaged",
    "output_dir": "$@bundle_root + '/refined'",
    "output_dtype": "$numpy.uint8",
    "separate_folder": False,
    "resample": False,
    "print_log": False,
}
POSTPROCESSING = [
    {"_target_": "CopyItemsd", "keys": "pred", "names": "network"},
    {
        "_target_": "crfrefine.monai.CrfRefined",
        "keys": "pred",
        "image_key": "image",
        "parameters": "$@bundle_root + '/configs/crf.toml'",
    },
    {
        "_target_": "Invertd",
        "keys": ["pred", "network"],
        "transform": "@preprocessing",
        "orig_keys": "image",
        "nearest_interp": False,
    },
    {"_target_": "AsDiscreted", "keys": ["pred", "network"], "argmax": True},
    *(
        {**SAVING, "keys": key, "output_postfix": postfix}
        for key, postfix in (("pred", "crf"), ("network", "network"))
    ),
]
INFERENCE = {
    "imports": [
        "$import numpy",
        "$import torch",
        "$from pathlib import Path",
        "$from monai.data import decollate_batch",
    ],
    "bundle_root": ".",
    "images": "$@bundle_root + '/../images'",
    "cases": (
        "$sorted({str(file).rsplit('_', 1)[0] for file in Path(@images).glob('*_0000.nii.gz')})"
    ),
    "files": (
        f"$[{{'image': [f'{{case}}_{{m:04d}}.nii.gz' for m in range({recipe.NUM_MODALITIES})]}} "
        "for case in @cases]"
    ),
    "preprocessing": {"_target_": "Compose", "transforms": PREPROCESSING},
    "dataset": {"_target_": "Dataset", "data": "@files", "transform": "@preprocessing"},
    "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
    "network_def": NETWORK,
    "weights": "$torch.load(@bundle_root + '/models/model.pt', weights_only=True)",
    "inferer": {"_target_": "SimpleInferer"},
    "postprocessing": {"_target_": "Compose", "transforms": POSTPROCESSING},
    "predict": (
        "$torch.no_grad()(lambda batch: {**batch, 'pred': @inferer(batch['image'], @network_def)})"
    ),
    "initialize": ["$@network_def.load_state_dict(@weights)", "$@network_def.eval()"],
    "run": [
        "$[@postprocessing(case) for batch in @dataloader for case in "
        "decollate_batch(@predict(batch))]"
    ],
}


def train(cases: list[dict[str, str]], epochs: int) -> UNet:
    """Return a weak U-Net, trained on images as the bundle's transforms prepare them."""
    network = UNet(**{key: value for key, value in NETWORK.items() if key != "_target_"})
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(epochs):
        for batch in load(cases, is_training=True):
            image = batch["image"]
            normalized = (image - image.mean((2, 3, 4), keepdim=True)) / image.std(
                (2, 3, 4), keepdim=True
            )
            loss = torch.nn.functional.cross_entropy(
                network(normalized), batch["label"][:, 0].long()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network


def write_bundle(network: UNet, folder: Path) -> Path:
    """Write the bundle and return its configuration."""
    for name in ("configs", "models"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    PARAMETERS.save(
        folder / "configs" / "crf.toml", comment="For the bundle of examples/bundle_monai.py."
    )
    ConfigParser.export_config_file(
        {"version": "1.0.0", "monai_version": "1.3.0"},
        str(folder / "configs" / "metadata.json"),
        indent=2,
    )
    config = folder / "configs" / "inference.json"
    ConfigParser.export_config_file(INFERENCE, str(config), indent=2)
    return config


def run_bundle(config: Path, **overrides: Any) -> None:
    """What `python -m monai.bundle run` does with a configuration."""
    parser = ConfigParser(ConfigParser.load_config_file(str(config)))
    parser.update(overrides)
    for stage in ("initialize", "run"):
        parser.get_parsed_content(stage)


def dice(folder: Path, case: dict[str, str], postfix: str) -> float:
    """The mean Dice of the labels of a case."""
    truth = np.asarray(nibabel.load(case["label"]).dataobj)
    first = Path(case["image"][0]).name.removesuffix(".nii.gz")
    found = np.asarray(nibabel.load(folder / "refined" / f"{first}_{postfix}.nii.gz").dataobj)
    overlaps = [
        ((found == label) & (truth == label)).sum() for label in range(1, recipe.NUM_LABELS)
    ]
    sizes = [
        (found == label).sum() + (truth == label).sum() for label in range(1, recipe.NUM_LABELS)
    ]
    return float(
        np.mean([2 * overlap / size for overlap, size in zip(overlaps, sizes, strict=True)])
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, write and run the bundle, say what came of it.

    Return the mean Dice before and after.
    """
    parser = argparse.ArgumentParser(
        description="A MONAI bundle whose result the dense CRF refines, on generated volumes."
    )
    parser.add_argument("--cases", type=int, default=4, help="volumes to train on")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument(
        "--output", type=Path, help="folder to write into; default: a temporary one"
    )
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output or Path(temporary)
        network = train(write_cases(folder / "training", range(options.cases)), options.epochs)
        held_out = write_cases(folder, range(1000, 1003))
        bundle = folder / "bundle"
        run_bundle(write_bundle(network, bundle), bundle_root=str(bundle))
        scores = {
            postfix: float(np.mean([dice(bundle, case, postfix) for case in held_out]))
            for postfix in ("network", "crf")
        }
    print(", ".join(f"{name}: mean Dice {score:.3f}" for name, score in scores.items()))
    return scores


if __name__ == "__main__":
    main()
