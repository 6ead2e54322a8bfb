"""What passes between the stages of a run: what is done so far, what is planned, how much of it is told."""

import json

import pytest
from training_helpers import start

from crfrefine.base.plain import from_plain, to_plain
from crfrefine.errors import InputError
from crfrefine.parameters.sections import PostprocessParameters
from crfrefine.train.baselines import VectorScaling
from crfrefine.train.budget import Budget
from crfrefine.train.candidates import no_crf
from crfrefine.train.checkpoint import Checkpoint, Done, Part
from crfrefine.train.dice_rival import DiceDecision
from crfrefine.train.observer import TrainingObserver
from crfrefine.train.session import Session
from crfrefine.train.small_objects import ChosenRules
from crfrefine.train.starts import Schedule

RULES = ChosenRules(PostprocessParameters(), PostprocessParameters(("none", "each"), (0.0, 0.3), fill_holes="foreground"))
DECISION = DiceDecision(VectorScaling(1.4, (0.2, -0.2)))
FIT = no_crf(start(4.0).parameters, 0.7, (0.25, -0.5), histories={"a": [{"iteration": 0, "score": 0.1}]}, stopped_by_time=True)


@pytest.fixture
def done():
    measured = {"case1": {"network": {"core": {"dice": 0.1 + 0.2, "hd95_mm": 3.0}}}}
    folds = (
        Part(halves=(FIT, FIT)),
        Part(fit=FIT, scaling=VectorScaling(0.9, (0.1, -0.1)), measured=measured, rules=RULES, decision=DECISION),
    )
    return Done((*folds, Part()), screening=[[0.5, 0.25]], training={"rung": 1}, seconds=12.5)


def test_a_session_replaces_and_never_alters(done, tmp_path):
    """What somebody has read from it stays as it was; a part that is finished ends the training that was going on."""
    before = json.dumps(to_plain(done))
    assert from_plain(Done, json.loads(before)) == done
    checkpoint = Checkpoint(tmp_path / "c.json", "digest")
    session = Session(None, done, checkpoint, Budget(None, done.seconds), None, TrainingObserver())
    session.note_training({"rung": 2})
    assert session.done.training == {"rung": 2}
    session.note_part(2, fit=FIT)
    session.save()
    assert json.dumps(to_plain(done)) == before
    saved = checkpoint.load()
    assert saved.parts == (*done.parts[:2], Part(fit=FIT))
    assert saved.training is None
    assert saved.seconds >= 12.5
    with pytest.raises(InputError, match="of a run with other data, options or another version"):
        Checkpoint(tmp_path / "c.json", "another").load()
    content = json.loads((tmp_path / "c.json").read_text())
    del content["state"]["parts"][1]["fit"]
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"not a checkpoint of train-crf .*'fit'.*; remove it to start anew"):
        checkpoint.load()


@pytest.mark.parametrize(("rungs", "expected"), [((), 12), (((3, 1),), 9), (((0, 1),), 6), (((8, 1),), 12), (((2, 2), (4, 1)), 10)])
def test_a_schedule_knows_how_many_steps_a_training_makes(rungs, expected):
    """Of two starts. Without rungs both are trained to the end; a rung beyond the end is at the end."""
    assert Schedule(6, rungs=rungs).num_planned(2) == expected
