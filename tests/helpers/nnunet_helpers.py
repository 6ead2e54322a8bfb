"""Folder trees as nnU-Net 2.8 leaves them: raw data, preprocessed data, a trained network,
predictions. Written without nnU-Net.
"""

import json
import pickle
from pathlib import Path

import numpy as np
from cli_helpers import save_nifti
from oracles import softmax
from training_helpers import phantom

DATASET = "Dataset007_Phantom"
NETWORK = "nnUNetTrainer__nnUNetPlans__3d_fullres"
NAMES = {"background": 0, "shell": 1, "core": 2, "cyst": 3}
AFFINE = np.array(
    [[-3.6, 0.0, 0.0, 10.0], [0.0, -4.1, 0.0, -20.0], [0.0, 0.0, 5.5, 30.0], [0.0, 0.0, 0.0, 1.0]]
)  # toward LPS


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Tree:
    """The folders of nnU-Net below one root, with one dataset and one trained network; `trap` is
    there once a pickle was read.
    """

    def __init__(self, root):
        self.root = root
        self.predictions = root / "predictions"
        self.trap = root / "unpickled"
        self.raw = root / "nnUNet_raw" / DATASET
        self.preprocessed = root / "nnUNet_preprocessed" / DATASET
        self.network = root / "nnUNet_results" / DATASET / NETWORK

    def validation(self, fold):
        return self.network / f"fold_{fold}" / "validation"

    def archive(self, fold, number):
        return self.validation(fold) / f"case{number}.npz"


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


def write_output(folder, case_id, case, trap, *, npz=True):
    """Write what nnU-Net writes for a case: the label map; with probabilities, the .npz in (label,
    z, y, x) and a .pkl.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_nifti(folder / f"{case_id}.nii.gz", case.logits.argmax(axis=0).astype(np.uint8), AFFINE)
    if npz:
        np.savez_compressed(
            folder / f"{case_id}.npz",
            probabilities=softmax(case.logits).astype(np.float32).transpose(0, 3, 2, 1),
        )
        (folder / f"{case_id}.pkl").write_bytes(pickle.dumps(Trap(trap)))


def write_raw(tree, count, images="imagesTr"):
    for number in range(count):
        case = phantom(number)
        for modality, values in enumerate(case.image):
            save_nifti(
                tree.raw / images / f"case{number}_{modality:04d}.nii.gz",
                values.astype(np.int16),
                AFFINE,
            )
        if images == "imagesTr":
            save_nifti(tree.raw / "labelsTr" / f"case{number}.nii.gz", case.labels, AFFINE)


def describe(**changes):
    """The content of a `dataset.json`."""
    return {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": NAMES,
        "numTraining": 4,
        "file_ending": ".nii.gz",
        **changes,
    }


def plans(**changes):
    """Of a plans.json, what the tests need."""
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "configurations": {},
        **changes,
    }


def write_tree(root, count=4, num_folds=2):
    """A network that is trained on all its folds, each validated with --npz: fold k holds out the
    cases k, k + num_folds, ...
    """
    tree = Tree(root)
    write_raw(tree, count)
    cases = [f"case{number}" for number in range(count)]
    splits = [
        {
            "train": [c for i, c in enumerate(cases) if i % num_folds != k],
            "val": cases[k::num_folds],
        }
        for k in range(num_folds)
    ]
    write_json(tree.preprocessed / "splits_final.json", splits)
    for folder in (tree.raw, tree.preprocessed, tree.network):
        write_json(folder / "dataset.json", describe())
    write_json(tree.network / "plans.json", plans())
    for fold in range(num_folds):
        write_fold(tree, fold, range(fold, count, num_folds))
    return tree


def write_fold(tree, fold, numbers):
    for number in numbers:
        write_output(tree.validation(fold), f"case{number}", phantom(number), tree.trap)
    write_json(tree.validation(fold) / "summary.json", {"foreground_mean": {"Dice": 0.8}})
    for checkpoint in ("best", "final"):
        (tree.validation(fold).parent / f"checkpoint_{checkpoint}.pth").write_bytes(b"weights")


def write_predictions(tree, count=3, *, npz=True, **arguments):
    """A folder as `nnUNetv2_predict` leaves it, of cases whose images are in imagesTs."""
    write_raw(tree, count, "imagesTs")
    for number in range(count):
        write_output(tree.predictions, f"case{number}", phantom(number), tree.trap, npz=npz)
    write_json(tree.predictions / "dataset.json", describe())
    write_json(tree.predictions / "plans.json", plans())
    arguments = {
        "list_of_lists_or_source_folder": str(tree.raw / "imagesTs"),
        "save_probabilities": npz,
        **arguments,
    }
    write_json(tree.predictions / "predict_from_raw_data_args.json", arguments)
    return tree.predictions
