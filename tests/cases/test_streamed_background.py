"""The background of channels that stay in their files."""

import weakref
from pathlib import Path

import nibabel as nib
import numpy as np

from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.case_headers import read_case_headers
from crfrefine.cases.foreground import Background, scaled_pieces
from crfrefine.cases.reading_options import ReadingOptions


def test_background_is_gone_before_the_other_channels_come(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    affine = np.diag([-0.8, -1.1, 2.5, 1.0])
    foreground = rng.uniform(0, 0.6, (11, 9, 7, 2)).astype(np.float32)
    foreground /= np.maximum(foreground.sum(-1, keepdims=True), 1)
    nib.save(nib.Nifti1Image(np.zeros((11, 9, 7), np.int16), affine), tmp_path / "image.nii")
    nib.save(nib.Nifti1Image(foreground, affine), tmp_path / "foreground.nii")
    options = ReadingOptions(add_background=True)
    files = CaseFiles("a", (tmp_path / "image.nii",), (tmp_path / "foreground.nii",))
    network = read_case_headers(files, options).network
    background = Background(network, options, scaled_pieces(network, None))
    pieces = background.read_pieces()
    piece = next(pieces)
    of_background = piece.values.copy()
    in_memory = weakref.ref(piece.values)
    del piece
    piece = next(pieces)
    assert in_memory() is None  # The other channels come without it.
    assert piece.channels == slice(1, 2)
    total = of_background[0] + piece.values[0] + next(pieces).values[0]
    np.testing.assert_allclose(total, 1, atol=1e-6)
