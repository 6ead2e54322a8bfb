"""The sentence of the verdict in each of its branches, what decides it, and what got worse."""

import itertools
import json
import math

import numpy as np
import pytest
from evaluation_helpers import spread, table_of

from crfrefine.errors import InputError
from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.statistics.comparison import MEAN, ResultTable, summarize
from crfrefine.statistics.harm import Change, find_harm, judge_probabilities
from crfrefine.statistics.paired import (
    cases_to_find,
    compare_pairs,
    detectable_difference,
    holm,
)
from crfrefine.statistics.texts import format_p
from crfrefine.statistics.verdict import Outcome, not_tested, verdict

SUBJECT = "the trained CRF"


def _table(gains, *, regions=("left", "right"), network=0.8):
    """Methods whose Dice is that of the network plus their gains, in points, in every region."""
    num_cases = len(next(iter(gains.values())))
    dice = {}
    for method, points in {"network": np.zeros(num_cases), **gains}.items():
        for region in regions:
            dice[method, region] = network + np.asarray(points) / 100
    return table_of(dice)


HELPS = Outcome.HELPS
SIMPLE = Outcome.NOT_BETTER_THAN_SIMPLE
ONE_POINT = (
    "Mean Dice +1.00 points against network "
    "(95 % CI 0.91 to 1.09, p 2e-12, 40 of 40 cases better): the trained CRF helps."
)
BEST_RIVAL = (
    "scaling: the trained CRF +1.00, scaling +0.10 points "
    "(p 7e-10 after Holm over 2 rivals, 36 of 40 cases better)."
)
NONE_OF_30 = (
    "(95 % CI -0.16 to 0.26, p 0.66, 16 of 30 cases better): the trained CRF is not shown to help."
)
GAINS = {
    "crf": (1.0, 0.5),
    "scaling": (0.1, 0.6),
    "weak": (-0.5, 0.3),
    "filter": (1.05, 0.5),
    "none": (0.05, 1.0),
    "worse": (-2.0, 1.0),
}
# With seven cases and four rivals p is at least 4 x 2 / 2**7 = 0.0625, however far the method is
# ahead; with eight it is half of that.
FOUR = {"crf": (14, 3)} | {f"rival {n}": (0.1 * n, 1.0) for n in range(4)}


def some(*names):
    """The judged method, whose gain is the first, and its rivals."""
    return {"crf": GAINS[names[0]], **{name: GAINS[name] for name in names[1:]}}


@pytest.mark.parametrize(
    ("num_cases", "gains", "outcome", "beaten", "parts"),
    [
        (
            40,
            some("crf", "scaling", "weak"),
            HELPS,
            [True, True],
            (ONE_POINT, f"every rival, the best of which is {BEST_RIVAL}"),
        ),
        (
            40,
            some("crf", "scaling", "filter"),
            SIMPLE,
            [True, False],
            (ONE_POINT, "more than filter:", "(p 0.69 after Holm over 2"),
        ),
        (
            40,
            some("crf", "filter"),
            SIMPLE,
            [False],
            (ONE_POINT, "filter +1.05 points (p 0.69, 21 of 40 cases worse)."),
        ),
        (
            30,
            some("none"),
            Outcome.NO_DIFFERENCE,
            [],
            (NONE_OF_30, "A true difference of 0.33 points would be found"),
        ),
        (
            20,
            some("worse"),
            Outcome.HURTS,
            [],
            ("p 2e-6, 20 of 20 cases worse): the trained CRF hurts. Advice: do not",),
        ),
        (
            7,
            FOUR,
            Outcome.TOO_FEW,
            [False] * 4,
            (
                "p 0.016, 7 of 7 cases better): the trained CRF helps. Too few cases to tell ",
                "whether it gains more than rival 3: ",
                "(p 0.062 after Holm over 4 rivals, 7 of 7 cases better). At least 8 are needed ",
            ),
        ),
        (
            8,
            FOUR,
            HELPS,
            [True] * 4,
            ("(p 0.031 after Holm over 4 rivals, 8 of 8 cases better).",),
        ),
        (
            8,
            some("none"),
            Outcome.TOO_FEW,
            [],
            (
                "too few cases to tell whether the trained CRF helps. If the mean and the scatter "
                "of these cases are typical, more than 1000 would show",
            ),
        ),
    ],
)
def test_outcome_and_sentence(num_cases, gains, outcome, beaten, parts):
    spreads = {name: spread(num_cases, *values)[::-1] for name, values in gains.items()}
    spreads["crf"] = spreads["crf"][::-1]
    judged = verdict(_table(spreads), "crf", "network", rivals=list(gains)[1:], subject=SUBJECT)
    assert (judged.outcome, judged.notes) == (outcome, ())
    for part in parts:
        assert part in judged.sentence
    assert ("simpler" in judged.sentence) == (outcome == SIMPLE)
    assert [rival.is_beaten for rival in judged.rivals] == beaten
    p_values = [rival.comparison.p_value for rival in judged.rivals]
    content = judged.to_dict()
    adjusted = [rival.p_adjusted for rival in judged.rivals]
    assert adjusted == list(holm(p_values))
    assert adjusted == [rival["p_adjusted"] for rival in content["rivals"]]
    assert content["p_adjusted"] == judged.comparison.p_value


def test_no_difference_at_all_and_no_case_at_all():
    """Training that ends at the identity, with few cases; Dice that is undefined everywhere."""
    for num_cases, words in ((1, "1 case"), (3, "3 cases"), (5, "5 cases")):
        judged = verdict(_table({"crf": np.zeros(num_cases)}), "crf", "network", subject=SUBJECT)
        assert judged.outcome == Outcome.TOO_FEW
        assert judged.sentence == (
            f"Mean Dice +0.00 points against network (p 1, 0 of {words} better): "
            "too few cases, at least 6 are needed for p < 0.05."
        )
    judged = verdict(_table({"crf": np.zeros(6)}), "crf", "network", subject=SUBJECT)
    assert judged.outcome == Outcome.NO_DIFFERENCE
    start = (
        "Mean Dice +0.00 points against network (95 % CI 0.00 to 0.00, p 1, 0 of 6 cases better): "
    )
    assert judged.sentence == f"{start}the trained CRF is not shown to help. Advice: do not use it."
    judged = verdict(_table({"crf": [math.nan]}, network=math.nan), "crf", "network")
    assert judged.outcome == Outcome.TOO_FEW
    assert judged.sentence == (
        "No case allows a comparison with network: "
        "too few cases, at least 6 are needed for p < 0.05."
    )
    judged = not_tested("crf", "network", ["left"], "the time ran out")
    assert (judged.outcome, judged.sentence) == (
        Outcome.NOT_TESTED,
        "Not tested: the time ran out.",
    )
    assert json.loads(json.dumps(judged.to_dict(), allow_nan=False))["comparison"]["num_pairs"] == 0


def test_six_cases_are_enough_whatever_the_rivals():
    for num_cases, num_rivals, p_value in ((4, 0, "p 0.12"), (5, 4, "p 0.062"), (6, 0, "p 0.031")):
        rivals = {f"rival {number}": -spread(num_cases, 5.0, 1.0) for number in range(num_rivals)}
        judged = verdict(
            _table({"crf": spread(num_cases, 14, 3), **rivals}),
            "crf",
            "network",
            rivals=tuple(rivals),
        )
        is_enough = num_cases == 6
        end = "crf helps." if is_enough else "too few cases, at least 6 are needed for p < 0.05."
        assert judged.outcome == (HELPS if is_enough else Outcome.TOO_FEW)
        assert f"{p_value}, {num_cases} of {num_cases} cases better): {end}" in judged.sentence
        content = json.loads(json.dumps(judged.to_dict(), allow_nan=False))
        assert (content["outcome"], content["regions"]) == (str(judged.outcome), ["left", "right"])
        assert (
            content["comparison"]["num_pairs"],
            [rival["name"] for rival in content["rivals"]],
        ) == (num_cases, list(rivals))
        assert (content["comparison"]["detectable_difference"] is None) == (not is_enough)


def test_ranks_and_mean_that_disagree_are_no_finding():
    """A few large losses against many gains.

    Then a few large gains lift the mean, where most cases change little.
    """
    gains = spread(50, 0.5, 0.3)
    gains[[3, 17, 40]] = -12.0, -15.0, -9.0
    for sign in (1, -1):
        judged = verdict(_table({"crf": sign * gains}), "crf", "network", subject=SUBJECT)
        assert judged.outcome == Outcome.MIXED
        advice = "Advice: look at the worst cases before using it ("
        assert f"no clear benefit, as ranks and mean disagree. {advice}" in judged.sentence
        assert ("(case_17 -15.00, case_3 -12.00, case_40 -9.00)." in judged.sentence) == (sign > 0)
    gains = np.where(np.arange(20) % 2, 0.1, -0.1) * (1 + np.arange(20) / 100)
    for sign in (1, -1):
        gains[:4] = sign * np.array([3.0, 4.0, 5.0, 6.0])
        judged = verdict(_table({"crf": gains}), "crf", "network", subject=SUBJECT)
        low, high = judged.comparison.interval
        assert low > 0 or high < 0
        assert judged.comparison.p_value > 0.05
        assert judged.outcome == Outcome.NO_DIFFERENCE


def test_the_mean_over_regions_decides_and_regions_can_be_chosen():
    """Gains in one region and equal losses in the other are no difference; the one by itself is."""
    gains = 2.0 + 0.5 * spread(20, 0.0, 1.0)
    left = _table({"crf": gains}, regions=("left",), network=0.7)
    right = _table({"crf": -gains}, regions=("right",), network=0.7)
    table = ResultTable([*left, *right])
    for regions, outcome in (
        (None, Outcome.NO_DIFFERENCE),
        (["left"], Outcome.HELPS),
        (["right"], Outcome.HURTS),
    ):
        assert verdict(table, "crf", "network", regions=regions).outcome == outcome


def test_what_is_left_out_is_said():
    """A case without the region in both maps, false alarms, and a case that one method lacks."""
    values = {
        "network": [0.7] * 8 + [math.nan, math.nan, 0.0, 0.0],
        "crf": [0.8, 0.75, 0.72, 0.74, 0.76, 0.77, 0.78, 0.79, math.nan, 0.0, math.nan],
    }
    table = table_of({(method, "lesion"): row for method, row in values.items()})
    judged = verdict(table, "crf", "network")
    assert judged.outcome == Outcome.HELPS
    assert "8 of 8 cases better" in judged.sentence
    assert judged.notes == (
        "4 of 12 cases are left out: no region has a Dice in both methods.",
        "crf has no measurements of case_11.",
        "Regions that one of the two methods finds although the reference lacks them, "
        "which the mean leaves out: 1 by crf, 1 by network.",
    )


def test_a_rival_without_a_case_in_common_is_not_beaten():
    """It must not vanish: what was asked is not answered."""
    gains = {"crf": [*spread(9, 1.0, 0.5), math.nan], "rival": [math.nan] * 9 + [0.0]}
    judged = verdict(_table(gains), "crf", "network", rivals=["rival", "other"])
    assert judged.outcome == Outcome.NOT_BETTER_THAN_SIMPLE
    assert judged.sentence.endswith(
        "p 0.0039, 9 of 9 cases better): crf helps. "
        "No case allows a comparison with rival or other."
    )
    for rival, name in zip(judged.rivals, ("rival", "other"), strict=True):
        assert (rival.name, rival.is_beaten, rival.comparison.num_pairs) == (name, False, 0)
    assert judged.notes[1:] == (
        "The comparison with rival is over 0 cases, not 9.",
        "The comparison with other is over 0 cases, not 9.",
    )
    json.dumps(judged.to_dict(), allow_nan=False)
    gains = {"crf": spread(20, 1.0, 0.5), "rival": [*spread(19, 0.1, 0.6)[::-1], math.nan]}
    judged = verdict(_table(gains), "crf", "network", rivals=["rival", "other"])
    assert judged.outcome == Outcome.NOT_BETTER_THAN_SIMPLE
    assert (
        "It gains more than every rival, the best of which is rival: crf +0.97," in judged.sentence
    )
    assert judged.sentence.endswith(
        "17 of 19 cases better). No case allows a comparison with other."
    )
    assert judged.notes[0] == "The comparison with rival is over 19 cases, not 20."


def test_gains_that_are_compared_are_over_the_same_regions_and_cases():
    """The network and the CRF find a right region that no reference has, the filter does not."""
    wobble = 1e-3 * np.arange(20)
    dice = {
        ("network", "left"): 0.5 + 0 * wobble,
        ("network", "right"): 0 * wobble,
        ("crf", "left"): 0.9 - wobble,
        ("crf", "right"): 0 * wobble,
        ("filter", "left"): 1.0 - wobble,
        ("filter", "right"): np.full(20, math.nan),
    }
    judged = verdict(table_of(dice), "crf", "network", rivals=["filter"])
    assert judged.comparison.mean_difference == pytest.approx(0.2 - wobble.mean() / 2)
    (rival,) = judged.rivals
    assert rival.comparison.mean_difference == pytest.approx(-0.1)
    assert rival.gain_of_method - rival.gain == pytest.approx(-0.1)
    assert ": crf +39.05, filter +49.05 points (p " in judged.sentence
    assert "The comparison with filter leaves out regions in which it has no Dice." in judged.notes
    dice["network", "left"][0] = math.nan  # A case that the baseline lacks counts for no gain.
    (rival,) = verdict(table_of(dice), "crf", "network", rivals=["filter"]).rivals
    assert rival.comparison.num_pairs == 19
    assert rival.gain == pytest.approx(0.5 - wobble[1:].mean())


def test_too_few_cases_say_how_many_could_tell():
    """A gain that eight cases do not show is one that as many as are named do show."""
    gains = 0.6 * np.array([1.0, -0.8, 2.2, 0.4, -0.6, 1.9, 1.2, -0.7])
    judged = verdict(_table({"crf": gains}), "crf", "network")
    assert judged.outcome == Outcome.TOO_FEW
    assert judged.comparison.p_value > 0.05
    assert "do not use" not in judged.sentence
    assert "95 % CI" in judged.sentence
    enough = cases_to_find(gains.mean(), gains.std(ddof=1))
    assert f"about {enough} would show the difference with probability 80 %." in judged.sentence
    assert detectable_difference(gains.std(ddof=1), enough) <= gains.mean()
    assert detectable_difference(gains.std(ddof=1), enough - 1) > gains.mean()
    five = verdict(_table({"crf": np.tile(gains, 5)}), "crf", "network")
    assert five.outcome == HELPS


def test_methods_must_differ_and_be_measured_once():
    table = _table({"crf": [1.0], "a": [2.0]})
    for method, rivals, text in (
        ("crf", ("network",), "must differ"),
        ("c", (), "no method 'c' in the table; there are network, crf, a"),
    ):
        with pytest.raises(InputError, match=text):
            verdict(table, method, "network", rivals=rivals)
    twice = "case 'case_0', region 'left': dice of 'network' appears twice"
    with pytest.raises(InputError, match=twice):
        ResultTable([*table, *table])


TITLES = {"1": "1 front", "2": "2 back"}


def _changed(changes, *, base=0.5):
    """Values of a network, the same in all cases, and of a CRF; changes by metric and region."""
    values = {}
    for (metric, region), steps in changes.items():
        values["network", region, metric] = base + 0 * steps
    for (metric, region), steps in changes.items():
        values["crf", region, metric] = base + steps
    return table_of(values)


def _harm(table, regions=("1", "2"), **options):
    return find_harm(summarize(table, "network", mean_regions=regions), "crf", **options)


def test_worse_in_more_than_half_of_the_cases_is_named_apart_from_what_is_significant():
    """Sensitivity falls clearly in 24 of 30 cases, HD95 rises in 19 of 30, and precision rises."""
    falls = -0.01 * spread(30, 0.6, 1.0)
    distances = np.where(np.arange(30) < 19, 0.1, -0.2) + 1e-4 * np.arange(30)
    table = _changed(
        {
            ("dice", "1"): 0.01 + 0 * falls,
            ("sensitivity", "1"): falls,
            ("precision", "1"): -falls,
            ("hd95_mm", "1"): distances,
        },
        base=3.0,
    )
    harm = _harm(table, ["1"])
    (sensitivity,) = harm.significant
    assert (sensitivity.metric, sensitivity.comparison.losses) == ("sensitivity", 24)
    (distance,) = harm.in_most_cases
    assert (distance.metric, distance.comparison.losses) == ("hd95_mm", 19)
    p_values = []
    for metric in ("sensitivity", "precision", "hd95_mm"):
        p_values.append(table.compare("crf", "network", "1", metric).p_value)
    assert sensitivity.p_adjusted == holm(p_values)[0] < 0.001
    assert distance.p_adjusted == holm(p_values)[2] > 0.05
    assert harm.num_comparisons == 3
    p_value = format_p(sensitivity.p_adjusted)
    figures = f"({100 * falls.mean():.2f} points on average, p {p_value})"
    others = f"(but better on average, {distances.mean():.2f} mm, p {distance.p_adjusted:.2g})"
    assert harm.sentence.startswith(
        f"What got worse: sensitivity in 24 of 30 cases {figures}. "
        "Worse in most cases, but not significantly: "
    )
    assert harm.sentence.endswith(f" HD95 in 19 of 30 cases {others}.")


def test_few_cases_are_not_told_as_most_of_many():
    for num_cases, expected in (
        (1, "Worse in the only case, which is no evidence for others: sensitivity (-2.00 points)."),
        (3, "Worse in most cases, which are too few for a test: sensitivity in 3 of 3 cases ("),
        (6, "Worse in most cases, but not significantly: "),
    ):
        losses = np.where(np.arange(num_cases) < 4, -0.02, 0.03)
        table = _changed({("dice", "1"): 0 * losses, ("sensitivity", "1"): losses})
        assert expected in _harm(table, ["1"]).sentence


def test_a_method_that_is_no_refinement_is_compared_by_its_name():
    """Of another network nothing was refined, so that nothing helps."""
    random = np.random.default_rng(4)
    for gain, sentence in (
        (0.03, "ensemble is better than network."),
        (-0.03, "ensemble is worse than network. Advice: prefer network."),
        (0.0, "ensemble is not shown to be better than network. Advice: prefer network if it is "),
    ):
        table = _table({"ensemble": gain + random.normal(0, 0.01, 40)})
        judged = verdict(table, "ensemble", "network", is_refinement=False)
        assert sentence in judged.sentence
        assert "help" not in judged.sentence
    table = _table({"ensemble": np.tile([0.01, -0.012], 4)})
    judged = verdict(table, "ensemble", "network", is_refinement=False)
    assert "too few cases to tell whether ensemble is better than network" in judged.sentence


def test_where_the_mean_is_better_although_most_cases_are_worse_the_sentence_says_so():
    """Of ten cases six lose, and the others gain more; a mean that is shown as 0 is no gain."""
    losses = np.where(np.arange(10) < 6, -0.01, 0.05)
    falls = np.where(np.arange(10) < 6, -0.01, 0.01500001)
    table = _changed({("dice", "1"): 0 * losses, ("sensitivity", "1"): losses})
    worse = "sensitivity in 6 of 10 cases (but better on average, +1.40 points, p "
    assert worse in _harm(table, ["1"]).sentence
    table = _changed({("dice", "1"): 0 * losses, ("sensitivity", "1"): falls})
    assert (
        "sensitivity in 6 of 10 cases (+0.00 points on average, p " in _harm(table, ["1"]).sentence
    )
    volumes = _changed({("dice", "1"): 0 * losses, ("volume_difference_ml", "1"): -losses}, base=3)
    assert (
        "volume error in 6 of 10 cases (but better on average, -0.01 ml"
        in _harm(volumes, ["1"]).sentence
    )


def test_a_label_whose_dice_falls_while_the_mean_rises_is_named():
    changes = {("dice", "1"): spread(20, 0.06, 0.01), ("dice", "2"): spread(20, -0.02, 0.01)}
    table = _changed(changes)
    judged = verdict(table, "crf", "network", summary=summarize(table, "network"), titles=TITLES)
    assert judged.outcome == Outcome.HELPS
    assert judged.sentence.endswith(
        " crf helps. But significantly worse than with network: Dice of 2 back."
    )
    (decline,) = judged.harm.significant
    assert (decline.region, decline.name, decline.is_overall) == ("2", "Dice of 2 back", False)
    assert decline.p_adjusted == 2 * decline.comparison.p_value == 2 * 2 / 2**20
    change = 100 * changes["dice", "2"].mean()
    assert judged.harm.sentence == (
        "What got worse: Dice of 2 back in 20 of 20 cases "
        f"({change:.2f} points on average, p 4e-6)."
    )


def test_many_labels_do_not_hide_what_is_worse_in_the_mean_and_long_lists_are_cut_in_the_sentence():
    """The mean is a family of its own.

    Of eight cases, 2 / 2**8 = 0.0078 would not survive Holm's correction over thirty labels. The
    regions of a metric that is worse in the mean are listed, but not in the sentence.
    """
    rise = spread(20, 0.05, 0.01)
    changes = {
        ("dice", "1"): rise,
        ("dice", "2"): rise,
        ("sensitivity", "1"): -rise,
        ("sensitivity", "2"): -rise,
    }
    harm = _harm(_changed(changes), titles=TITLES)
    assert [(decline.name, decline.region) for decline in harm.significant] == [
        ("sensitivity", MEAN),
        ("sensitivity of 1 front", "1"),
        ("sensitivity of 2 back", "2"),
    ]
    assert harm.headline == "sensitivity"
    assert "1 front" not in harm.sentence
    regions = [str(number) for number in range(1, 31)]
    changes = {}
    for region in regions:
        changes["dice", region] = rise[:8]
        changes["sensitivity", region] = -rise[:8]
    harm = _harm(_changed(changes), regions)
    (decline,) = harm.significant
    assert (decline.name, decline.p_adjusted) == ("sensitivity", 2 / 2**8)
    assert harm.num_comparisons == 1 + 2 * 30
    changes = {}
    for region in regions[:9]:
        changes["dice", region] = spread(20, -0.05, 0.01)
    for region in regions[9:12]:
        changes["dice", region] = spread(20, 0.5, 0.01)
    harm = _harm(_changed(changes), regions[:12])
    assert len(harm.significant) == 9
    assert harm.headline.endswith("Dice of 6 and 3 more")
    assert "Dice of 6 in 20 of 20 cases (" in harm.sentence
    assert harm.sentence.endswith(" and 3 more.")


def test_where_nothing_is_worse_the_sentence_says_so():
    """IoU is a function of Dice.

    Precision that rises in 7 of 9 cases and falls far in two is no majority, but not "no worse"
    either.
    """
    up = spread(9, 0.1, 0.01)
    few_losses = np.where(np.arange(9) < 7, 0.01, -0.2) + 1e-4 * np.arange(9)
    assert few_losses.mean() < 0
    half = np.where(np.arange(8) < 4, 0.01, -0.02) + 1e-4 * np.arange(8)
    all_up = dict.fromkeys(itertools.product(("dice", "precision"), "12"), up)
    for changes, regions, num_comparisons in (
        ({("dice", "1"): -up, ("iou", "1"): -up}, "1", 0),
        ({("dice", "1"): up, ("precision", "1"): few_losses}, "1", 1),
        ({("dice", "1"): up[:8], ("precision", "1"): half}, "1", 1),
        (all_up, "12", 5),
    ):
        harm = _harm(_changed(changes), list(regions))
        what = "got significantly worse" if num_comparisons else "could be compared"
        assert (harm.num_comparisons, harm.sentence) == (
            num_comparisons,
            f"No other metric {what}.",
        )
        assert (harm.significant, harm.in_most_cases, harm.headline) == ((), (), "")


FALLS = -0.01 * (1.0 + np.linspace(-1.4, 1.0, 24))  # in 20 of 24 cases


def _change(steps):
    changes = {(metric, ALL_LABELS): values for metric, values in steps.items()}
    table = _changed(changes, base=0.05)
    return judge_probabilities(summarize(table, "network"), "crf")


def test_better_and_worse():
    for sign, change, word in ((1, Change.BETTER, "better"), (-1, Change.WORSE, "worse")):
        found = _change(
            {"nll": sign * FALLS, "ece": -0.001 + 0 * FALLS, "brier": 0.002 + 0 * FALLS}
        )
        p_value = compare_pairs(0.05 + sign * FALLS, 0.05 + 0 * FALLS).p_value
        wins = int((sign * FALLS < 0).sum())
        assert found.change == change
        nll = (
            f"negative log likelihood 0.05000 → {0.05 + sign * FALLS.mean():.5f} "
            f"(better in {wins} of 24 cases, p {format_p(p_value)})"
        )
        others = "calibration error (ECE) 0.05000 → 0.04900, Brier score 0.05000 → 0.05200."
        assert found.sentence == f"The probabilities of all labels: {word}, {nll}, {others}"


def test_no_difference_and_too_few():
    assert (
        _change({"nll": 0.01 * np.cos(np.arange(24) * np.pi) * (1 + np.arange(24) / 100)}).change
        == Change.NO_DIFFERENCE
    )
    few = _change({"nll": FALLS[-5:]})
    assert few.change == Change.TOO_FEW
    assert few.sentence.startswith(
        "The probabilities of all labels: too few cases to tell, negative log likelihood "
    )
    for same in (
        _change({"nll": 0 * FALLS, "ece": 0 * FALLS}),
        _change({"nll": -1e-9 - 1e-10 * np.arange(24)}),
    ):
        assert same.change == Change.NO_DIFFERENCE
        assert same.sentence.startswith(
            "The probabilities of all labels: unchanged up to rounding in 24 cases, "
            "negative log likelihood 0.05000 → 0.05000"
        )
