"""The recipe of `end_to_end.py` with MONAI.

Its U-Net, transforms and loader, files as input, and what `crfrefine infer` needs as output.

    pip install '.[train]' monai
    python examples/end_to_end_monai.py [--cases 4] [--epochs 8] [--autocast [float16]]
        [--output DIR]

DIR gets generated images/ and labels/, logits/ of volumes that were held out, params.toml and
training.pt, from which the same command goes on. Afterwards, without PyTorch:

    crfrefine infer -i DIR/images -p DIR/logits -o DIR/refined -c DIR/params.toml
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import end_to_end as recipe
import nibabel
import numpy as np
import torch
from monai.data import CacheDataset, DataLoader
from monai.data.utils import affine_to_spacing
from monai.networks.nets import UNet
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, RandFlipd

from crfrefine import CrfRnn


class Batches:
    """A DataLoader's batches as the recipe takes them: plain tensors, and the names of the volumes.

    Random transforms follow PyTorch's generator, as shuffling does: a training that goes on from a
    checkpoint then sees the same batches.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[recipe.Batch]:
        self.loader.dataset.transform.set_random_state(int(torch.randint(2**31, ())))
        for batch in self.loader:
            # The layer takes tensors; a MetaTensor's geometry is of no use to it but for the
            # spacing, below.
            yield {
                "image": batch["image"].as_tensor(),
                "label": batch["label"].as_tensor(),
                "name": batch["name"],
            }


def write_cases(folder: Path, seeds: Sequence[int]) -> list[dict[str, str]]:
    """Write made-up volumes as NIfTI, a file per modality; return what MONAI's transforms read."""
    affine = np.diag([*recipe.SPACING, 1.0])
    found = []
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        volume = recipe.make_volume(seed)
        name = f"case{seed}"
        files = [
            folder / "images" / f"{name}_{modality:04d}.nii.gz"
            for modality in range(recipe.NUM_MODALITIES)
        ]
        for file, values in zip(files, volume["image"][0].numpy(), strict=True):
            nibabel.save(nibabel.Nifti1Image(values, affine), file)
        labels = folder / "labels" / f"{name}.nii.gz"
        nibabel.save(
            nibabel.Nifti1Image(volume["label"][0, 0].numpy().astype(np.uint8), affine), labels
        )
        found.append({"image": [str(file) for file in files], "label": str(labels), "name": name})
    return found


def load(cases: list[dict[str, str]], *, is_training: bool) -> Batches:
    """Return batches of two volumes, flipped at random in training.

    Flips keep every voxel; interpolation would blur what the CRF sees.
    """
    keys = ("image", "label")
    read = [LoadImaged(keys), EnsureChannelFirstd(keys)]
    if is_training:
        flips = [RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)]
    else:
        flips = []
    data = CacheDataset(cases, Compose([*read, *flips]), progress=False)
    return Batches(DataLoader(data, batch_size=2, shuffle=is_training))


def spacing_of(batches: Batches) -> tuple[float, ...]:
    """The voxel size that the transforms ended with, in mm.

    That of `Spacingd(pixdim=...)` where volumes are resampled.
    """
    return tuple(affine_to_spacing(batches.loader.dataset[0]["image"].affine).tolist())


def write_logits(model: recipe.Segmenter, cases: list[dict[str, str]], folder: Path) -> None:
    """Write the logits of the network, before the CRF: `crfrefine infer` refines these."""
    folder.mkdir(exist_ok=True)
    names = iter(cases)
    with torch.inference_mode():
        for batch in load(cases, is_training=False):
            for logits in model.network(batch["image"]):
                file = folder / f"{next(names)['name']}.nii.gz"
                values = np.moveaxis(logits.float().numpy(), 0, -1)
                nibabel.save(nibabel.Nifti1Image(values, np.diag([*recipe.SPACING, 1.0])), file)


def main(arguments: Sequence[str] | None = None) -> recipe.Segmenter:
    """Train, say what came of it, write what `infer` needs; return the model."""
    parser = argparse.ArgumentParser(
        description="Train MONAI's U-Net with the dense CRF as its last layer on generated volumes."
    )
    parser.add_argument("--cases", type=int, default=4, help="volumes to train on")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of each phase")
    precisions = recipe.PRECISIONS
    parser.add_argument(
        "--autocast",
        nargs="?",
        choices=precisions,
        const="bfloat16",
        help="mixed precision, of bfloat16 unless named",
    )
    parser.add_argument(
        "--output", type=Path, help="folder to write into; default: a temporary one"
    )
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output or Path(temporary)
        batches = load(write_cases(folder / "training", range(options.cases)), is_training=True)
        held_out = write_cases(folder, range(1000, 1003))
        network = UNet(
            spatial_dims=3,
            in_channels=recipe.NUM_MODALITIES,
            out_channels=recipe.NUM_LABELS,
            channels=(8, 16, 32),
            strides=(2, 2),
            num_res_units=1,
        )
        # raw intensities come in
        normalized = torch.nn.Sequential(torch.nn.InstanceNorm3d(recipe.NUM_MODALITIES), network)
        model = recipe.Segmenter(
            normalized,
            CrfRnn(recipe.NUM_LABELS, recipe.NUM_MODALITIES, 3, recipe.START, spatial=True),
        )
        spacing = spacing_of(batches)
        recipe.train(
            model,
            batches,
            spacing,
            options.epochs,
            folder / "training.pt",
            autocast=precisions.get(options.autocast),
        )
        for name, scores in recipe.evaluate(
            model, load(held_out, is_training=False), spacing
        ).items():
            print(
                f"{name}: Dice "
                + ", ".join(
                    f"label {label}: {score:.3f}" for label, score in enumerate(scores, start=1)
                )
            )
        write_logits(model, held_out, folder / "logits")
        recipe.learned_parameters(model).save(
            folder / "params.toml", comment="Trained end to end with MONAI on generated volumes."
        )
    return model


if __name__ == "__main__":
    main()
