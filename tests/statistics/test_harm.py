"""What got worse beside the verdict, and whether probabilities got better: comparisons, their significance, and the sentences."""

import numpy as np
from report_helpers import spread, table_of

from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.statistics.comparison import MEAN, format_p, summarize
from crfrefine.statistics.harm import Change, find_harm, judge_probabilities
from crfrefine.statistics.paired import compare_pairs, holm
from crfrefine.statistics.verdict import Outcome, verdict

TITLES = {"1": "1 front", "2": "2 back"}


def _table(changes, *, base=0.5):
    """Values of a network, the same in all cases, and of a CRF; changes by metric and region."""
    network = {("network", *key[::-1]): base + 0 * steps for key, steps in changes.items()}
    return table_of(network | {("crf", *key[::-1]): base + own for key, own in changes.items()})


def _harm(table, regions=("1", "2"), **options):
    return find_harm(summarize(table, "network", mean_regions=regions), "crf", **options)


def test_worse_in_more_than_half_of_the_cases_is_named_apart_from_what_is_significant():
    """Sensitivity falls in 24 of 30 cases and HD95 rises in 19 of 30, one clearly and one not; precision rises."""
    falls = -0.01 * spread(30, 0.6, 1.0)
    distances = np.where(np.arange(30) < 19, 0.1, -0.2) + 1e-4 * np.arange(30)
    table = _table(
        {("dice", "1"): 0.01 + 0 * falls, ("sensitivity", "1"): falls, ("precision", "1"): -falls, ("hd95_mm", "1"): distances}, base=3.0
    )
    harm = _harm(table, ["1"])
    assert [(decline.metric, decline.comparison.losses) for decline in harm.significant] == [("sensitivity", 24)]
    assert [(decline.metric, decline.comparison.losses) for decline in harm.in_most_cases] == [("hd95_mm", 19)]
    p_values = [table.compare("crf", "network", "1", metric).p_value for metric in ("sensitivity", "precision", "hd95_mm")]
    assert harm.significant[0].p_adjusted == holm(p_values)[0] < 0.001
    assert harm.in_most_cases[0].p_adjusted == holm(p_values)[2] > 0.05
    assert harm.num_comparisons == 3
    figures = f"({100 * falls.mean():.2f} points on average, p {format_p(harm.significant[0].p_adjusted)})"
    others = f"({distances.mean():.2f} mm on average, p {harm.in_most_cases[0].p_adjusted:.2g})"
    assert harm.sentence.startswith(
        f"What got worse: sensitivity in 24 of 30 cases {figures}. Worse in most cases, but not significantly: "
    )
    assert harm.sentence.endswith(f" HD95 in 19 of 30 cases {others}.")


def test_a_label_whose_dice_falls_while_the_mean_rises_is_named():
    changes = {("dice", "1"): spread(20, 0.06, 0.01), ("dice", "2"): spread(20, -0.02, 0.01)}
    table = _table(changes)
    judged = verdict(table, "crf", "network", summary=summarize(table, "network"), titles=TITLES)
    assert judged.outcome == Outcome.HELPS
    assert judged.sentence.endswith(" crf helps. But significantly worse than with network: Dice of 2 back.")
    (decline,) = judged.harm.significant
    assert (decline.region, decline.name, decline.is_overall) == ("2", "Dice of 2 back", False)
    assert decline.p_adjusted == 2 * decline.comparison.p_value == 2 * 2 / 2**20
    change = 100 * changes["dice", "2"].mean()
    assert judged.harm.sentence == f"What got worse: Dice of 2 back in 20 of 20 cases ({change:.2f} points on average, p 4e-6)."


def test_many_labels_do_not_hide_what_is_worse_in_the_mean_and_long_lists_are_cut_in_the_sentence():
    """Eight cases: 2 / 2**8 = 0.0078 would not survive Holm's correction over thirty labels; the mean is a family of its own.

    The regions of a metric that is worse in the mean are listed, but not in the sentence.
    """
    changes = {(metric, region): sign * spread(20, 0.05, 0.01) for metric, sign in (("dice", 1), ("sensitivity", -1)) for region in "12"}
    harm = _harm(_table(changes), titles=TITLES)
    assert [decline.name for decline in harm.significant] == ["sensitivity", "sensitivity of 1 front", "sensitivity of 2 back"]
    assert [decline.region for decline in harm.significant] == [MEAN, "1", "2"]
    assert harm.headline == "sensitivity"
    assert "1 front" not in harm.sentence
    regions = [str(number) for number in range(1, 31)]
    changes = {(metric, region): step[:8] for (metric, _), step in changes.items() for region in regions}
    harm = _harm(_table(changes), regions)
    assert [(decline.name, decline.p_adjusted) for decline in harm.significant] == [("sensitivity", 2 / 2**8)]
    assert harm.num_comparisons == 1 + 2 * 30
    changes = {("dice", region): spread(20, -0.05, 0.01) if int(region) < 10 else spread(20, 0.5, 0.01) for region in regions[:12]}
    harm = _harm(_table(changes), regions[:12])
    assert len(harm.significant) == 9
    assert harm.headline.endswith("Dice of 6 and 3 more")
    assert "Dice of 6 in 20 of 20 cases (" in harm.sentence
    assert harm.sentence.endswith(" and 3 more.")


def test_where_nothing_is_worse_the_sentence_says_so():
    """IoU is a function of Dice; precision that rises in 7 of 9 cases and falls far in two is no majority, but not "no worse" either."""
    up, few_losses = spread(9, 0.1, 0.01), np.where(np.arange(9) < 7, 0.01, -0.2) + 1e-4 * np.arange(9)
    assert few_losses.mean() < 0
    half = np.where(np.arange(8) < 4, 0.01, -0.02) + 1e-4 * np.arange(8)
    for changes, regions, num_comparisons in (
        ({("dice", "1"): -up, ("iou", "1"): -up}, "1", 0),
        ({("dice", "1"): up, ("precision", "1"): few_losses}, "1", 1),
        ({("dice", "1"): up[:8], ("precision", "1"): half}, "1", 1),
        ({(metric, region): up for metric in ("dice", "precision") for region in "12"}, "12", 5),
    ):
        harm = _harm(_table(changes), list(regions))
        what = "got significantly worse" if num_comparisons else "could be compared"
        assert (harm.num_comparisons, harm.sentence) == (num_comparisons, f"No other metric {what}.")
        assert (harm.significant, harm.in_most_cases, harm.headline) == ((), (), "")


FALLS = -0.01 * (1.0 + np.linspace(-1.4, 1.0, 24))  # in 20 of 24 cases


def _change(steps):
    table = _table({(metric, ALL_LABELS): changes for metric, changes in steps.items()}, base=0.05)
    return judge_probabilities(summarize(table, "network"), "crf")


def test_better_and_worse():
    for sign, change, word in ((1, Change.BETTER, "better"), (-1, Change.WORSE, "worse")):
        found = _change({"nll": sign * FALLS, "ece": -0.001 + 0 * FALLS, "brier": 0.002 + 0 * FALLS})
        p_value = compare_pairs(0.05 + sign * FALLS, 0.05 + 0 * FALLS).p_value
        wins = int((sign * FALLS < 0).sum())
        assert found.change == change
        nll = f"negative log likelihood 0.05000 → {0.05 + sign * FALLS.mean():.5f} (better in {wins} of 24 cases, p {format_p(p_value)})"
        others = "calibration error (ECE) 0.05000 → 0.04900, Brier score 0.05000 → 0.05200."
        assert found.sentence == f"The probabilities of all labels: {word}, {nll}, {others}"


def test_no_difference_and_too_few():
    assert _change({"nll": 0.01 * np.cos(np.arange(24) * np.pi) * (1 + np.arange(24) / 100)}).change == Change.NO_DIFFERENCE
    few = _change({"nll": FALLS[-5:]})
    assert few.change == Change.TOO_FEW
    assert few.sentence.startswith("The probabilities of all labels: too few cases to tell, negative log likelihood ")
    for same in (_change({"nll": 0 * FALLS, "ece": 0 * FALLS}), _change({"nll": -1e-9 - 1e-10 * np.arange(24)})):
        assert same.change == Change.NO_DIFFERENCE
        assert same.sentence.startswith(
            "The probabilities of all labels: neither significantly better nor worse, negative log likelihood 0.05000 → 0.05000 ("
        )
