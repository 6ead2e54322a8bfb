"""More labels than the model can hold penalties for: an error at every border, before memory is
asked for.
"""

import subprocess
import sys

import numpy as np
import pytest
from cli_helpers import save_nifti

import crfrefine
from crfrefine.base.limits import MAX_LABELS
from crfrefine.errors import CapacityError

SHAPE = (5, 33, 26)  # More voxels than labels.
LIMITED = """
import resource
from crfrefine.cli.main import main
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
main()
"""
TOLD = f"{{}} labels; at most {MAX_LABELS} can be refined together"
TOLD_OF_MAPS = f"a label map with {MAX_LABELS + 1} different labels; expected at most {MAX_LABELS}"


def many_labels(shape=SHAPE, largest=65535):
    """A label map of MAX_LABELS + 1 labels, with gaps between them."""
    labels = np.linspace(0, largest, np.prod(shape)).astype(np.uint16)
    labels[labels > np.unique(labels)[MAX_LABELS]] = 0
    return labels.reshape(shape)


@pytest.mark.parametrize("kind", ["npz", "4-D", "label map", "one file per label"])
def test_infer(kind, tmp_path):
    count = MAX_LABELS + 1
    times = 1
    options = []
    image = save_nifti(
        tmp_path / "a_0000.nii.gz", np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    )
    network = tmp_path / ("a.npz" if kind == "npz" else "a.nii.gz")
    if kind == "npz":
        np.savez_compressed(network, probabilities=np.zeros((20_000, *SHAPE[::-1]), np.uint8))
        count = 20_000
    elif kind == "4-D":
        save_nifti(network, np.zeros((*SHAPE, count), np.uint8))
    elif kind == "label map":
        save_nifti(network, many_labels())
        options = ["--input-type", "labels"]
    else:
        save_nifti(network, np.zeros(SHAPE, np.uint8))
        times = count
    files = ["-i", image, "-o", tmp_path / "out.nii.gz", *["-p", network] * times]
    arguments = [sys.executable, "-c", LIMITED, "infer", *files, *options, "--max-memory", "500M"]
    done = subprocess.run(
        list(map(str, arguments)), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert (TOLD_OF_MAPS if kind == "label map" else TOLD.format(count)) in done.stderr, done.stderr
    assert not (tmp_path / "out.nii.gz").exists()


def test_refine_and_the_layer():
    image = np.zeros(SHAPE, np.float32)
    options = {"spacing": (1.0, 1.5, 2.0)}
    with pytest.raises(CapacityError, match=TOLD.format(MAX_LABELS + 1)):
        crfrefine.refine(
            np.zeros((MAX_LABELS + 1, 2, 3, 2), np.float32), image[:2, :3, :2], **options
        )
    with pytest.raises(CapacityError, match=TOLD_OF_MAPS):
        crfrefine.refine(many_labels(), image, input_type="labels", **options)
    pytest.importorskip("torch")
    with pytest.raises(CapacityError, match=TOLD.format(10**9)):
        crfrefine.CrfRnn(num_labels=10**9, num_modalities=1, spatial_dims=3)
