"""The finished work of a run, as it passes between stages and goes to a file."""

import json

import pytest
from fuzz_mutations import tampered
from training_helpers import half_done

from crfrefine.base.plain import from_plain, to_plain
from crfrefine.errors import InputError
from crfrefine.train.checkpoint import Checkpoint, Done, Part, checkpoint_text
from crfrefine.train.observer import TrainingObserver
from crfrefine.train.session import Session


def test_a_session_replaces_and_never_alters(tmp_path):
    """What somebody has read from it stays as it was."""
    done = half_done()
    before = json.dumps(to_plain(done))
    assert from_plain(Done, json.loads(before)) == done
    checkpoint = Checkpoint(tmp_path / "c.json", "digest")
    session = Session(None, done, checkpoint, None, TrainingObserver())
    session.note_part(2, fit=done.parts[1].fit)
    assert json.dumps(to_plain(done)) == before
    saved = checkpoint.load()
    assert saved.parts == (*done.parts[:2], Part(fit=done.parts[1].fit))
    assert saved.seconds >= 12.5
    with pytest.raises(InputError, match="of a run with other data, options or another version"):
        Checkpoint(tmp_path / "c.json", "another").load()
    state = json.loads((tmp_path / "c.json").read_text())["state"]
    del state["parts"][1]["fit"]
    (tmp_path / "c.json").write_text(checkpoint_text("digest", state))
    with pytest.raises(InputError, match=r"not a checkpoint of train-crf .*'fit'.*; remove it to start anew"):
        checkpoint.load()


def test_a_checkpoint_that_was_changed_is_refused_wherever_the_change_is(tmp_path):
    """Each entry in turn becomes every kind of JSON value; most would fail only in the middle of the training."""
    checkpoint = Checkpoint(tmp_path / "c.json", "digest")
    session = Session(None, half_done(), checkpoint, None, TrainingObserver())
    session.save()
    assert checkpoint.load().screening == [[0.5, 0.25]]
    text = (tmp_path / "c.json").read_text()
    for content in tampered(json.loads(text)):
        (tmp_path / "c.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"c\.json: (not a checkpoint of train-crf|is of a run with other data)"):
            checkpoint.load()
