"""What passes between the stages of a run: what is done so far, what is planned, how much of it is told."""

import json

import pytest
from fuzz_mutations import tampered
from training_helpers import half_done

from crfrefine.base.plain import from_plain, to_plain
from crfrefine.errors import InputError
from crfrefine.train.budget import Budget
from crfrefine.train.checkpoint import Checkpoint, Done, Part, checkpoint_text
from crfrefine.train.observer import TrainingObserver
from crfrefine.train.session import Session
from crfrefine.train.starts import Schedule


def test_a_session_replaces_and_never_alters(tmp_path):
    """What somebody has read from it stays as it was; a part that is finished ends the training that was going on."""
    done = half_done()
    before = json.dumps(to_plain(done))
    assert from_plain(Done, json.loads(before)) == done
    checkpoint = Checkpoint(tmp_path / "c.json", "digest")
    session = Session(None, done, checkpoint, Budget(None, done.seconds), None, TrainingObserver())
    session.note_training({"rung": 2})
    assert session.done.training == {"rung": 2}
    session.note_part(2, fit=done.parts[1].fit)
    session.save()
    assert json.dumps(to_plain(done)) == before
    saved = checkpoint.load()
    assert saved.parts == (*done.parts[:2], Part(fit=done.parts[1].fit))
    assert saved.training is None
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
    session = Session(None, half_done(), checkpoint, Budget(None, 1.0), None, TrainingObserver())
    session.note_training(
        {"rung": 2, "active": [0, 1], "trajectories": [{"iteration": 3, "best_score": None, "moments": {"0": [0.5, -1e-30]}}]}
    )
    session.save()
    assert checkpoint.load().training["rung"] == 2
    text = (tmp_path / "c.json").read_text()
    for content in tampered(json.loads(text)):
        (tmp_path / "c.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"c\.json: (not a checkpoint of train-crf|is of a run with other data)"):
            checkpoint.load()


@pytest.mark.parametrize(("rungs", "expected"), [((), 12), (((3, 1),), 9), (((0, 1),), 6), (((8, 1),), 12), (((2, 2), (4, 1)), 10)])
def test_a_schedule_knows_how_many_steps_a_training_makes(rungs, expected):
    """Of two starts. Without rungs both are trained to the end; a rung beyond the end is at the end."""
    assert Schedule(6, rungs=rungs).num_planned(2) == expected
