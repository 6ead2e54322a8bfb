"""Ties take part, padding does not: in memory, streamed, on each engine and in the layer."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from cli_helpers import Folders, load_nifti, run_here, save_nifti, set_streaming
from scipy import ndimage

from crfrefine import CrfParameters, CrfRnn, RegionScheme, refine

SHAPE = (19, 23, 17)
SPACING = (1.1, 0.8, 1.6)
RADIUS = 7.0  # mm, of the organ
MODEL = {
    "bilateral.weight": 4.0,
    "bilateral.theta_alpha": 3.0,
    "bilateral.theta_beta": 0.15,
    "spatial.weight": 1.0,
    "intensity.normalization": "none",
    "mean_field.label_threshold": 0.0,
    "mean_field.tolerance": 0.0,
}


@dataclasses.dataclass(frozen=True)
class Votes:
    """Shares of two raters' votes on an organ that the border of the grid cuts, and the truth."""

    shares: np.ndarray
    image: np.ndarray
    truth: np.ndarray

    @property
    def ties(self):
        return self.shares[0] == self.shares[1]


def make_votes(shift=2):
    """One rater draws the organ too small, the other too large: ties lie around its border."""
    places = np.moveaxis(np.indices(SHAPE), 0, -1) - np.array((9.0, 11.0, 3.0))
    radius = np.sqrt(((places * SPACING) ** 2).sum(axis=-1))
    truth = radius < RADIUS
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=SHAPE), 2.0)
    raters = [radius + 6 * noise < RADIUS + step for step in (-shift / 2, shift / 2)]
    share = np.mean(raters, axis=0, dtype=np.float32)
    image = truth + np.random.default_rng(1).normal(scale=0.05, size=SHAPE)
    shares = np.stack([1 - share, share])
    image = 0.3 * image
    return Votes(shares, image.astype(np.float32)[None], truth.astype(np.uint8))


def dice(labels, truth):
    return 2 * np.count_nonzero((labels == 1) & (truth == 1)) / (labels.sum() + truth.sum())


def parameters(**changes):
    return CrfParameters().replace(**(MODEL | changes))


def test_split_votes_take_part(backend):
    """As if a hair of difference had decided them; left out, the organ loses its rim."""
    votes = make_votes()
    near = slice(11)  # planes, in which the organ lies: PyTorch sums over all pairs of voxels
    votes = Votes(votes.shares[..., near], votes.image[..., near], votes.truth[..., near])
    assert 500 < np.count_nonzero(votes.ties) < votes.ties.size / 4
    logits = np.log(np.maximum(votes.shares, 1e-7))
    settings = {"parameters": parameters(**{"mean_field.filter": "truncated"}), "spacing": SPACING}
    settings |= {"device": backend.name}
    found = refine(votes.shares, votes.image, input_type="probabilities", **settings)
    assert (found.num_padding_voxels, found.notes) == (0, ())
    nudged = logits + np.array([0.0, 1e-6])[:, None, None, None] * votes.ties
    expected = refine(nudged.astype(np.float32), votes.image, input_type="logits", **settings)
    # The nudge itself, times what a few steps of the mean field make of it.
    np.testing.assert_allclose(found.marginals, expected.marginals, atol=1e-4)
    assert dice(found.label_map, votes.truth) > 0.98
    left_out = refine(
        votes.shares, votes.image, input_type="probabilities", mask=~votes.ties, **settings
    )
    assert dice(left_out.label_map, votes.truth) < 0.9


def test_votes_of_three_raters_on_three_labels_take_part():
    """Where each of them chose another label, the sheets have the logarithm of a third."""
    votes = make_votes()
    rng = np.random.default_rng(3)
    ties = votes.ties & (rng.random(SHAPE) < 0.7)
    shares = np.stack([1.0 - votes.truth, votes.truth, np.zeros(SHAPE)]).astype(np.float32)
    shares[:, ties] = np.float32(1 / 3)
    result = refine(
        shares,
        votes.image,
        input_type="probabilities",
        parameters=parameters(),
        spacing=SPACING,
    )
    assert result.num_padding_voxels == 0
    assert dice(result.label_map, votes.truth) > 0.98


def test_a_crop_is_refined_as_its_grid_is():
    """Padding around votes changes nothing inside, whatever its constant."""
    votes = make_votes()
    logits = np.log(np.maximum(votes.shares, 1e-7))
    box = np.s_[3:22, 1:24, 5:22]
    shape = (24, 25, 23)
    image = np.zeros((1, *shape), np.float32)
    image[(slice(None), *box)] = votes.image
    settings = {"parameters": parameters(**{"mean_field.filter": "truncated"}), "spacing": SPACING}
    expected = refine(logits, votes.image, input_type="logits", **settings)
    for constant in (0.0, np.log(0.5), -500.0, np.finfo(np.float32).min):
        padded = np.full((2, *shape), constant, np.float32)
        padded[(slice(None), *box)] = logits
        result = refine(padded, image, input_type="logits", **settings)
        assert result.num_padding_voxels == np.prod(shape) - np.prod(SHAPE)
        np.testing.assert_array_equal(result.label_map[box], expected.label_map)
        # Sums over the same voxels in another order, in float32.
        np.testing.assert_allclose(result.logits[(slice(None), *box)], expected.logits, atol=1e-4)


def test_regions_that_raters_disagree_on_take_part():
    votes = make_votes()
    scheme = RegionScheme.of({"organ": (1,)})
    result = refine(
        votes.shares[1:],
        votes.image,
        input_type="probabilities",
        regions=scheme,
        parameters=parameters(),
        spacing=SPACING,
    )
    assert result.num_padding_voxels == 0
    assert dice(result.label_map, votes.truth) > 0.98


@pytest.mark.parametrize("kind", ["probabilities", "logits"])
def test_streamed_votes_are_as_in_memory(kind, tmp_path, monkeypatch):
    """Ties, a hole without a prediction, and what a crop left, of a value that is no share."""
    votes = make_votes()
    shares = np.concatenate([votes.shares, 0 * votes.shares[:1]])
    # Three raters, so that all three labels may be equal.
    shares[:, votes.ties] = np.float32(1 / 3)
    values = shares if kind == "probabilities" else np.log(np.maximum(shares, 1e-7))
    values[:, 7:16, 2:11, 8:16] = 0.0
    values[:, -2:] = 0.0
    folders = Folders(tmp_path / "images", tmp_path / "logits", tmp_path / "out")
    save_nifti(folders.images / "a_0000.nii.gz", votes.image[0])
    save_nifti(folders.logits / "a.nii.gz", np.moveaxis(values, 0, -1).astype(np.float32))
    found = []
    for name in ("memory", "streamed"):
        set_streaming(monkeypatch, name == "streamed")
        own = Folders(folders.images, folders.logits, tmp_path / name)
        result = run_here("infer", *own.arguments, "--device", "cpu", status=0)
        for num_unseen in (2 * 23 * 17, 9 * 9 * 8):  # around the field of view, and in the hole
            assert f"{num_unseen} of {votes.truth.size} voxels" in result.stderr
        found.append(load_nifti(own.output / "a.nii.gz"))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_layer_has_the_ties_of_refine(dtype):
    """The same voxels take part: beside votes, a slice of zeros and two of equal shares."""
    votes = make_votes()
    values = torch.from_numpy(np.log(np.maximum(votes.shares, 1e-4))).to(dtype)
    values[:, :, :, -1] = 0.0
    values[:, :2] = torch.tensor(np.log(0.5)).to(dtype)
    model = parameters(**{"mean_field.filter": "truncated"})
    result = refine(
        values.float().numpy(), votes.image, input_type="logits", parameters=model, spacing=SPACING
    )
    assert result.num_padding_voxels == 19 * 23 + 2 * 23 * 16
    layer = CrfRnn(2, 1, parameters=model, threads=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refined = layer(values[None].float(), torch.from_numpy(votes.image)[None], SPACING)
        rounded = layer(values[None], torch.from_numpy(votes.image)[None], SPACING)
    # Both are the same sums in float32; the layer's come in another order. Where the network saw
    # nothing, the layer returns its logits, and `refine` certain background.
    logits = refined[0].detach().numpy()
    unseen = result.logits[1] == -1e4
    assert np.count_nonzero(unseen) == result.num_padding_voxels
    np.testing.assert_allclose(logits[:, ~unseen], result.logits[:, ~unseen], atol=1e-4)
    np.testing.assert_array_equal(logits[:, unseen], values.float().numpy()[:, unseen])
    torch.testing.assert_close(rounded, refined.to(dtype), rtol=0, atol=0)


def test_scores_that_meet_in_half_precision_take_part_in_the_layer():
    """No mask gives the same as one that is True everywhere."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, *SHAPE, generator=generator).to(torch.bfloat16)
    ties = logits[:, 0] == logits[:, 1]
    assert ties.sum() > 5
    image = torch.rand(1, 1, *SHAPE, generator=generator)
    layer = CrfRnn(2, 1, parameters=parameters(), threads=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refined = layer(logits, image, SPACING)
    everywhere = layer(logits, image, SPACING, torch.ones(SHAPE))
    torch.testing.assert_close(refined, everywhere, rtol=0, atol=0)
    changed = refined[0, 0][ties[0]] != refined[0, 1][ties[0]]
    assert changed.float().mean() > 0.9, "neighbors decide them"
