"""The time limit: who gets how much of it, and what a run leaves behind whose time is over."""

import json

import numpy as np
import pytest
from training_helpers import write_cases

from crfrefine.parameters.model import CrfParameters
from crfrefine.runs.execution.threads import Workers
from crfrefine.train import budget as budgets
from crfrefine.train.budget import Budget, TimeIsUpError
from crfrefine.train.observer import TrainingObserver
from crfrefine.train.options import TrainingOptions, locate_folders
from crfrefine.train.run import run_training
from crfrefine.train.starts import make_starts

STEPS = {"num_folds": 2, "num_optimizer_steps": 2, "learn": ("weights",), "threads": 1}


class _Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = _Clock()
    monkeypatch.setattr(budgets, "time", clock)
    return clock


def test_work_ends_while_there_is_time_to_write(clock):
    """A tenth of a short time before its end; what a resumed run has spent before does not count."""
    budget = Budget(1.0, 500.0, started=98.0)
    clock.now = 98.0 + 53.9
    budget.check()
    assert budget.spent_seconds == pytest.approx(500.0 + 53.9)
    clock.now += 0.2
    with pytest.raises(TimeIsUpError):
        budget.check()
    unlimited = Budget(None)
    clock.now += 1e6
    unlimited.check()
    assert not unlimited.is_part_over()


def test_a_training_leaves_the_time_that_the_part_before_needed_beside_its_training(clock):
    """Of 85 s for two parts the first trains for half of its 42.5; it then takes 30 s to measure, so the second one leaves as much."""
    budget = Budget(100 / 60)
    budget.start_part(2)
    for seconds, is_over in ((0.0, False), (21.0, False), (0.5, True)):
        clock.now += seconds
        assert budget.is_part_over() == is_over
    clock.now += 30.0
    budget.start_part(1)
    for seconds, is_over in ((3.0, False), (1.0, True)):  # 85 - 51.5 - 30 = 3.5
        clock.now += seconds
        assert budget.is_part_over() == is_over


@pytest.mark.parametrize("one_by_one", [False, True])
def test_every_item_is_begun_only_while_there_is_time(one_by_one):
    begun = []

    def check():
        if len(begun) >= 2:
            raise TimeIsUpError

    with Workers(3, one_by_one=one_by_one, check=check) as workers, pytest.raises(TimeIsUpError):
        workers.run_on_device(lambda item, threads: begun.append(item), range(20))
    assert 2 <= len(begun) < 5


@pytest.fixture
def data(monkeypatch, tmp_path):
    """Four cases; what takes most of the time of these runs and plays no part here is left out."""
    monkeypatch.setattr("crfrefine.train.baselines.SCALING_STEPS", 3)
    monkeypatch.setattr("crfrefine.statistics.paired.bootstrap_interval", lambda *_, **__: (0.0, 0.0))
    monkeypatch.setattr("crfrefine.train.report.draw_curves", lambda result: b"")
    monkeypatch.setattr("crfrefine.train.preparation.make_starts", lambda *arguments: make_starts(*arguments)[:4])
    return locate_folders(write_cases(tmp_path / "data", 4))


class _Over(TrainingObserver):
    """Ends the time when a stage begins."""

    def __init__(self, stage=None):
        self.is_over, self.notes = False, []
        self._stage = stage

    def stage_started(self, stage):
        self.is_over = self.is_over or stage == self._stage

    def note(self, text, case_id=None):
        self.notes.append(text)


def test_a_run_whose_time_is_over_leaves_its_best_parameters_and_goes_on_when_it_is_resumed(data, tmp_path, monkeypatch):
    """In reading, in measuring the second fold; then it ends."""

    def run(stage=None):
        observer, report = _Over(stage), tmp_path / "own.report.json"

        def check(self):
            if observer.is_over:
                raise TimeIsUpError

        monkeypatch.setattr(Budget, "check", check)
        run_training(TrainingOptions(data, output=tmp_path / "own.toml", resume=True, **STEPS), observer)
        assert any("run again with --resume" in note for note in observer.notes) == (stage is not None)
        assert report.with_name("own.checkpoint.json").exists() == (stage is not None)
        return json.loads(report.read_text())

    for stage, num_measured, has_weights in (
        ("reading", 0, False),
        ("cross-validation fold 2 of 2: measuring the cases held out", 2, True),
    ):
        report = run(stage)
        sentence = f"Not tested: the time ran out before all cases were measured ({num_measured} of 4)."
        assert (report["verdict"]["outcome"], report["verdict"]["sentence"]) == ("not tested", sentence)
        assert report["final"]["stopped_by_time"]
        assert sum(len(fold["held_out"]) for fold in report["folds"]) == num_measured
        written = (tmp_path / "own.toml").read_text()
        assert (": trained, " in written) == (num_measured > 0)
        assert sentence in " ".join(written.replace("#", " ").split())
        assert bool(np.any(CrfParameters.load(tmp_path / "own.toml").bilateral[0].weight)) == has_weights
    ended = run()
    assert ended["verdict"]["outcome"] == "too few cases"
    assert len(ended["folds"]) == 2
    assert ended["folds"][0] == report["folds"][0], "what was done is kept"


def test_trainings_that_were_cut_short_and_found_nothing_are_no_reason_against_the_crf(data, tmp_path, monkeypatch):
    """Every case was measured, with what there was, of which nothing follows for a training that is finished."""
    monkeypatch.setattr(Budget, "is_part_over", lambda self: True)
    judged = run_training(TrainingOptions(data, output=tmp_path / "p.toml", **STEPS)).comparison.verdict
    assert judged.sentence == "Not tested: the time ran out before the training was finished in 2 of 2 folds."
    assert (judged.outcome, judged.comparison.num_pairs) == ("not tested", 4)
