"""What passes between the stages of a run: what is done so far, what is planned, how much of it is told."""

import json

import pytest
from training_helpers import start

from crfrefine.errors import InputError
from crfrefine.parameters.sections import PostprocessParameters
from crfrefine.train.baselines import VectorScaling
from crfrefine.train.budget import Budget
from crfrefine.train.checkpoint import Checkpoint
from crfrefine.train.dice_rival import DiceDecision
from crfrefine.train.done import Done, Part
from crfrefine.train.fit_result import no_crf
from crfrefine.train.journal import Journal
from crfrefine.train.schedule import Schedule
from crfrefine.train.small_objects import ChosenRules

RULES = ChosenRules(PostprocessParameters(), PostprocessParameters(("none", "each"), (0.0, 0.3), fill_holes="foreground"))
DECISION = DiceDecision(VectorScaling(1.4, (0.2, -0.2)))
FIT = no_crf(start(4.0).parameters, 0.7, (0.25, -0.5), {"a": [{"iteration": 0, "score": 0.1}]}, stopped_by_time=True)


@pytest.fixture
def done():
    measured = {"case1": {"network": {"core": {"dice": 0.1 + 0.2, "hd95_mm": 3.0}}}}
    folds = (
        Part(halves=(FIT, FIT)),
        Part(fit=FIT, scaling=VectorScaling(0.9, (0.1, -0.1)), measured=measured, rules=RULES, decision=DECISION),
    )
    return Done((*folds, Part()), screening=[[0.5, 0.25]], training={"rung": 1}, seconds=12.5)


def test_a_journal_replaces_and_never_alters(done, tmp_path):
    """What somebody has read from it stays as it was; a part that is finished ends the training that was going on."""
    before = json.dumps(done.to_dict())
    assert Done.from_dict(json.loads(before)) == done
    checkpoint = Checkpoint(tmp_path / "c.json", "digest")
    journal = Journal(done, checkpoint, Budget(None, done.seconds))
    journal.note_training({"rung": 2})
    assert journal.done.training == {"rung": 2}
    journal.note_part(2, Part(fit=FIT))
    journal.save()
    assert json.dumps(done.to_dict()) == before
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
