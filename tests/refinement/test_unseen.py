"""What a network did not see is certain background, and strokes there have their label."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from crfrefine import CrfParameters, RegionScheme, refine
from crfrefine.arrays.network import StreamedNetwork
from crfrefine.arrays.strokes import Strokes
from crfrefine.engines import get_backend
from crfrefine.io.reading import Piece
from crfrefine.refinement.refining import refine_network

SHAPE = (29, 22, 26)
SPACING = (1.1, 0.8, 1.6)
HOLE = np.s_[10:19, 8:17, 9:18]
ABSENT = -1e4


def make_case(num_labels, edge, seed=0):
    """Logits of smooth labels, certain inside, with padding from x = `edge` on and a hole."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    fields = gaussian_filter(rng.normal(size=(num_labels, *SHAPE)), (0, 3, 3, 3))
    logits = (fields / fields.std() * 6).astype(np.float32)
    image = (fields[0] + rng.normal(scale=0.1, size=SHAPE)).astype(np.float32)
    unseen = np.zeros(SHAPE, bool)
    unseen[edge:] = True
    unseen[HOLE] = True
    logits[:, unseen] = 7.5
    return logits, image, unseen


def stream_of(logits):
    """A network whose logits come in pieces, z first."""
    stored = logits.transpose(0, *range(logits.ndim - 1, 0, -1))

    def read():
        for label, channel in enumerate(stored):
            step = 8 if channel.ndim == 3 else len(channel)
            for start in range(0, len(channel), step):
                planes = slice(start, min(start + step, len(channel)))
                values = np.ascontiguousarray(channel[None, planes])
                yield Piece(slice(label, label + 1), planes, values)

    kind = "logits"
    return StreamedNetwork(read, len(logits), stored.shape[1:], kind, kind, Path(kind))


def assert_certain(result, where, label=0):
    """The label has the probability 1 there, all others 0, and their logits are finite."""
    assert (result.label_map[where] == label).all()
    is_label = np.arange(len(result.logits)) == label
    expected = np.broadcast_to(is_label[:, None], (len(is_label), np.count_nonzero(where)))
    np.testing.assert_array_equal(result.marginals[:, where], expected)
    np.testing.assert_array_equal(result.logits[:, where], np.where(expected, 0.0, ABSENT))
    np.testing.assert_array_equal(result.marginals_at(where), expected)


@pytest.mark.parametrize(
    ("num_labels", "edge", "changes"),
    [
        (3, 28, {"mean_field.label_threshold": 0.0}),  # all labels in the whole grid
        (3, 12, {"mean_field.label_threshold": 0.0}),  # all labels in the box of the mask
        (12, 27, {"mean_field.filter": "truncated"}),  # labels on tiles
        (12, 27, {"mean_field.output_temperature": 20.0}),
        (3, 28, {"mean_field.temperature": 2.0, "mean_field.bias": [-3.0, 4.0, 0.0]}),
    ],
    ids=["whole", "box", "tiles", "output temperature", "bias"],
)
def test_padding_and_holes_are_certain_background(num_labels, edge, changes):
    """Inside or outside the mask; elsewhere the result is that of a mask without them."""
    logits, image, unseen = make_case(num_labels, edge)
    changes = {"intensity.normalization": "none"} | changes
    settings = {"spacing": SPACING, "parameters": CrfParameters().replace(**changes)}
    result = refine(logits, image, input_type="logits", **settings)
    assert result.num_padding_voxels == np.count_nonzero(unseen)
    assert_certain(result, unseen)
    masked = refine(logits, image, input_type="logits", mask=~unseen, **settings)
    assert_certain(masked, unseen)
    np.testing.assert_array_equal(result.logits, masked.logits)
    assert np.isfinite(result.logits).all()
    assert (result.marginals[:, ~unseen].max(axis=0) < 1).any()


def test_what_a_network_of_regions_did_not_see_lies_in_none():
    logits, image, _ = make_case(3, SHAPE[0])
    unseen = np.zeros(SHAPE, bool)
    unseen[:, -2:] = True
    logits[:, unseen] = 0.0
    scheme = RegionScheme.of({"whole": (1, 2, 3), "core": (2, 3), "cyst": (3,)})
    drawn = np.zeros(SHAPE, np.uint8)
    drawn[3, -1, 5] = 2
    result = refine(
        logits,
        image,
        input_type="logits",
        regions=scheme,
        spacing=SPACING,
        parameters=CrfParameters(),
        strokes=drawn,
    )
    unseen[3, -1, 5] = False
    assert (result.label_map[unseen] == 0).all()
    assert (result.marginals[:, unseen] == 0).all()
    assert (result.logits[:, unseen] == ABSENT).all()
    assert result.label_map[3, -1, 5] == 2
    assert result.marginals[:, 3, -1, 5].tolist() == [1, 1, 0]


@pytest.mark.parametrize("changes", [{"mean_field.label_threshold": 0.0}, {}], ids=["all", "tiles"])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_strokes_have_their_label_where_nothing_was_seen_and_outside_the_mask(is_streamed, changes):
    logits, image, unseen = make_case(8, 25)
    mask = np.ones(SHAPE, bool)
    mask[:3] = False
    drawn = np.zeros(SHAPE, np.uint8)
    places = {"padding": (27, 5, 5), "hole": (14, 12, 13), "outside the mask": (1, 6, 7)}
    for place in places.values():
        drawn[place] = 3
    network = stream_of(logits)
    run = partial(
        refine_network,
        image=image,
        spacing=SPACING,
        parameters=CrfParameters().replace(**changes),
        mask=mask,
        backend=get_backend("cpu"),
    )
    if is_streamed:
        result = run(network, strokes=Strokes.of_array(drawn, SHAPE, 8))
    else:
        settings = {"spacing": SPACING, "parameters": CrfParameters().replace(**changes)}
        result = refine(logits, image, input_type="logits", mask=mask, strokes=drawn, **settings)
    is_drawn = drawn != 0
    assert_certain(result, is_drawn, label=3)
    assert_certain(result, unseen & ~is_drawn)


def test_streamed_planes_are_as_in_memory():
    logits, image, unseen = make_case(6, 25)
    logits = logits[..., 3]
    image = image[..., 3]
    unseen = unseen[..., 3]  # without the hole
    drawn = np.zeros(image.shape, np.uint8)
    drawn[26, 4] = 2
    settings = {
        "spacing": SPACING[:2],
        "parameters": CrfParameters(),
        "strokes": Strokes.of_array(drawn, drawn.shape, 6),
        "backend": get_backend("cpu"),
    }
    result = refine_network(stream_of(logits), image, **settings)
    assert result.num_padding_voxels == np.count_nonzero(unseen)
    assert_certain(result, drawn != 0, label=2)
    assert_certain(result, unseen & (drawn == 0))


def test_holes_are_told_apart_from_padding_around_a_crop():
    logits, image, unseen = make_case(3, 27)
    result = refine(logits, image, input_type="logits", spacing=SPACING, parameters=CrfParameters())
    num_inside = 9**3
    num_around = np.count_nonzero(unseen) - num_inside
    around, holes = map(str, result.notes)
    assert f"around a cropped output, are excluded and become background: {num_around} of" in around
    assert "no sliding window of the network looked" in holes
    assert f"{num_inside} of {unseen.size} voxels (4.4%) in 1 hole;" in holes
