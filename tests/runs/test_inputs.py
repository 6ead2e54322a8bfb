"""The page opens what `infer` takes: folders of nnU-Net, manifests, regions; and counts labels together."""

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import load_nifti
from nnunet_helpers import write_predictions, write_tree
from tune_helpers import open_session, options_for, whole_result, write_labeled

from crfrefine.errors import ConfigError
from crfrefine.metrics.regions import parse_region
from crfrefine.runs.options import InferenceOptions
from crfrefine.runs.tune.session import Session, TuneOptions, score_labels


@pytest.fixture
def opened():
    with contextlib.ExitStack() as stack:
        yield lambda options: stack.enter_context(open_session(options))


def given(**changes):
    return TuneOptions(InferenceOptions(**({"images": (), "logits": (), "output": Path(), "threads": 1, "preview": True} | changes)))


def regions(*texts):
    return tuple(map(parse_region, texts))


def test_a_trained_network_of_nnunet_brings_its_references_and_predictions_have_those_that_are_given(opened, tmp_path):
    tree = write_tree(tmp_path)
    described = opened(given(nnunet=tree.network)).describe()
    assert described["case"] == "case0"
    assert described["has_reference"]
    assert [label["name"] for label in described["labels"]] == ["1 shell", "2 core", "3 cyst"]
    assert not tree.trap.exists()
    predictions = write_predictions(tree)
    assert not opened(given(nnunet=predictions)).describe()["has_reference"]
    assert opened(dataclasses.replace(given(nnunet=predictions), labels=tree.raw / "labelsTr")).describe()["has_reference"]


def test_labels_count_together_in_regions(opened, tmp_path):
    """Of a network with a softmax over labels: Dice of their unions, and the label map is that without regions."""
    folders, labels = write_labeled(tmp_path, "a")
    both = regions("whole=1+2+3", "core=2+3")
    session = opened(dataclasses.replace(options_for(folders, labels), regions=both))
    rows = whole_result(session)["labels"]
    assert [row.get("label", row.get("region")) for row in rows] == [1, 2, 3, "whole", "core"]
    truth, refined = load_nifti(labels / "a.nii.gz"), session.shown[0]
    assert rows == score_labels(session.case.network_labels, refined, truth, 4, both)[0]
    assert session.case.regions is None
    with pytest.raises(ConfigError, match="sigmoid channels"):
        Session(dataclasses.replace(options_for(folders), regions=regions("whole=1+2+3"), class_order=(1,)))


def test_scores_are_those_of_plain_counts():
    rng = np.random.default_rng(3)
    before, after, truth = (rng.integers(0, 4, (3, 5, 7, 6)) * (rng.random((3, 5, 7, 6)) < 0.3)).astype(np.uint8)
    before = np.asfortranarray(before)
    rows, num_changed = score_labels(before, after, truth, 6, regions("both=1+5", "absent=4+5+70"))
    assert num_changed == np.count_nonzero(before != after)
    assert [row.get("label", row.get("region")) for row in rows] == [1, 2, 3, "both", "absent"]
    for row, members in zip(rows, ([1], [2], [3], [1, 5], [4, 5]), strict=True):
        is_in = [np.isin(labels, members) for labels in (before, after, truth)]
        assert (row["before"], row["after"]) == (is_in[0].sum(), is_in[1].sum())
        for when, one in zip(("before", "after"), is_in, strict=False):
            total = one.sum() + is_in[2].sum()
            wanted = 2 * (one & is_in[2]).sum() / total if total else None
            assert row[f"dice_{when}"] == (wanted if wanted is None else pytest.approx(wanted))
    assert all(row["dice_after"] is None for row in score_labels(before, after, None, 6)[0])
