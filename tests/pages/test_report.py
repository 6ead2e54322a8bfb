"""The page as text: one file that asks for nothing, in which what users name stays text, and whose numbers are those of the table."""

import base64
import hashlib
import html.parser
import itertools
import json
import re
import sys

import numpy as np
import pytest
from report_helpers import NASTY, make_images, make_report, make_table

from crfrefine.errors import CrfRefineError, InputError
from crfrefine.pages.pictures.display import label_color
from crfrefine.pages.report import missing_viewer, page, write_report
from crfrefine.pages.report.page import CaseView, _groups
from crfrefine.pages.report.pairs import ShownCase, choose_cases, pairs_of, region_choices
from crfrefine.statistics.comparison import MEAN, Measurement, ResultTable, format_p, summarize
from crfrefine.statistics.verdict import Outcome, verdict

VOID = {"meta", "input", "img", "br", "link", "hr"}


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.scripts = {}
        self.feed(text)
        self.close()
        assert self.open == [], "elements that are never closed"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id")))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1]}, line {self.getpos()[0]}"
        self.open.pop()
        if tag in {"td", "th"}:
            self.texts.append(" ")

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.scripts[self.open[-1][1]] = self.scripts.get(self.open[-1][1], "") + data
        elif self.open and self.open[-1][0] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.texts))


def written(tmp_path, report, **options):
    path = tmp_path / "report.html"
    write_report(path, report, **options)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return written(tmp_path_factory.mktemp("report"), make_report())


def test_the_page_is_well_formed_and_names_are_unique(text):
    found = Page(text)
    names = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(names) == len(set(names))
    for _, attributes in found.elements:
        for key in ("aria-labelledby", "aria-controls", "for"):
            assert set((attributes.get(key) or "").split()) <= set(names)
        if (attributes.get("href") or "").startswith("#"):
            assert attributes["href"][1:] in names
    assert ("html", {"lang": "en"}) in found.elements
    assert sum(tag == "h1" for tag, _ in found.elements) == 1
    headings = [int(tag[1]) for tag, _ in found.elements if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings)), "no level is left out"
    assert all("alt" in attributes for tag, attributes in found.elements if tag == "img")


def test_what_users_name_stays_text(text):
    """Markup, and a mark of direction, which would turn around the rest of its sentence, so that it is written out."""
    found = Page(text)
    for name in (NASTY, "Report on <b>crf</b> & others", "cut off </dl></script>", "1 front <part>", r"☃\u200e\u202egpj\u2066\u2069"):
        assert name in found.text
    assert not set(found.text) & set("\u200e\u202e\u2066\u2069")
    assert not any("onerror" in attributes for _, attributes in found.elements)
    assert {tag for tag, _ in found.elements}.isdisjoint({"b", "part"})
    assert {NASTY, "Ünï—코드 ☃\u200e\u202egpj\u2066\u2069"} < set(json.loads(found.scripts["data"])["cases"])


def test_the_page_asks_for_nothing_outside_of_itself_and_runs_its_own_scripts_alone(text):
    """The policy allows the scripts of the page by their hashes, pictures and styles in the page, and nothing else."""
    assert re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z]", text) == []
    assert "@import" not in text
    found = Page(text)
    for tag, attributes in found.elements:
        assert tag not in {"link", "iframe", "object", "embed"}
        for key in ("src", "href", "data", "action", "poster", "srcset"):
            assert (attributes.get(key) or "#").startswith(("#", "data:image/png;base64,"))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    (policy,) = [attributes["content"] for _, attributes in found.elements if attributes.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digests = {f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts}
    assert len(digests) == 4
    assert set(rules.pop("script-src").split()) == digests
    others = {"default-src": "'none'", "base-uri": "'none'", "form-action": "'none'"}
    assert rules == others | {"style-src": "'unsafe-inline'", "img-src": "data:"}
    assert text.index("Content-Security-Policy") < text.index("<title>") < text.index("<script>")


def test_the_verdict_comes_first_and_nothing_is_dropped_unsaid(text):
    report, found = make_report(), Page(text)
    start = found.text.index("Verdict")
    assert found.text[start:].startswith(f"Verdict {report.verdict.sentence}")
    assert start < found.text.index("Summary", start)
    for said in ("1 case could not be evaluated", *(f"2: Dice is undefined for {one} of 13 cases" for one in ("network in 2", "crf in 1"))):
        assert said in found.text


def test_the_verdicts_mark_says_what_its_sentence_says(tmp_path):
    for method, baseline, tone in (("crf", "network", "good"), ("network", "crf", "bad"), ("smoothing", "network", "open")):
        table = make_table(30)
        judged = verdict(table, method, baseline, num_resamples=100)
        rows = summarize(table, baseline, num_resamples=20)
        report = make_report(table=table, method=method, baseline=baseline, summary=rows, verdict=judged)
        found = Page(written(tmp_path, report, num_shown=1))
        assert any(attributes.get("class") == f"verdict {tone}" for _, attributes in found.elements), judged.sentence


def test_what_got_worse_stands_beside_the_verdict_and_takes_away_its_color(tmp_path):
    """Dice rises in every case; the size of the volume difference, too."""
    table = ResultTable(
        Measurement(f"case {number}", region, metric, value + (method == "crf") * change * (1 + number / 50), method)
        for metric, value, change in (("dice", 0.6, 0.1), ("volume_difference_ml", 0.2, 0.3))
        for number in range(12)
        for region in ("1", "2")
        for method in ("network", "crf")
    )
    rows = summarize(table, "network", num_resamples=200)
    judged = verdict(table, "crf", "network", summary=rows, titles={"1": "1 front <part>"}, num_resamples=200)
    found = Page(written(tmp_path, make_report(table=table, summary=rows, verdict=judged), num_shown=1))
    assert judged.outcome == Outcome.HELPS
    assert f"Verdict {judged.sentence} {judged.harm.sentence} " in found.text
    assert "But significantly worse than with network: volume error. What got worse: volume error in 12 of 12 cases (" in found.text
    assert any(attributes.get("class") == "verdict open" for _, attributes in found.elements)
    mean, front = judged.harm.significant[:2]
    for decline, name in ((mean, "mean over regions"), (front, "1 front <part>")):
        change = f"{decline.comparison.mean_difference:+.2f} ml"
        assert f"Volume difference {name} ▲ 0 ● 0 ▼ 12 {change} " in found.text
    assert f" {format_p(mean.p_holm)} Volume difference 1 front" in found.text


def test_metrics_that_only_describe_have_their_mean_over_regions_and_their_change(tmp_path):
    """Cases that only one of the methods has are in neither mean; a metric that only one has gets no chart, but its mean and its values."""
    table = ResultTable(
        Measurement(f"case {number}", region, metric, (number + 2.0) * factor + (method == "crf") * 0.5, method)
        for number in range(5)
        for region, factor in (("1", 1.0), ("2", 3.0))
        for method, metric in (*itertools.product(("network", "crf"), ("volume_ml", "dice")), ("crf", "ece"))
        if (number, method) != (4, "crf")
    )
    rows = summarize(table, "network", num_resamples=200)
    found = Page(written(tmp_path, make_report(table=table, summary=rows, verdict=None), num_shown=1))
    # (2 + 3 + 4 + 5) / 4 is 3.5 in region 1, three times that in region 2, and twice that in their mean.
    for region, before in (("mean over regions", 7.0), ("1 front <part>", 3.5), ("2", 10.5)):
        assert f" {region} {before:.2f} {before + 0.5:.2f} +0.50 – – – – 4 1 " in found.text
    data = json.loads(found.scripts["data"])
    assert (MEAN, "mean over regions") in [tuple(choice) for choice in data["choices"]["volume_ml"]]
    assert "tab-ece" not in [attributes.get("id") for _, attributes in found.elements]
    assert "ece" not in [attributes.get("data-metric") for tag, attributes in found.elements if tag == "section"]
    assert "No case has a value" not in found.text
    assert " 1 front <part> – 4.00000 – – – – – 0 5 " in found.text
    assert data["values"]["ece"]["1"][1] == [2.5, 3.5, 4.5, 5.5, None]


def test_the_numbers_on_the_page_are_those_of_the_table(text):
    """Seven digits are written; of differences that are better near zero, the magnitudes."""
    report = make_report()
    data = json.loads(Page(text).scripts["data"])
    assert data["cases"] == list(report.table.cases)
    assert data["methods"] == ["network", "crf", "smoothing"]
    assert data["compared"] is True
    for metric in ("dice", "hd95_mm", "volume_ml", "volume_difference_ml"):
        for region in ("1", "2"):
            expected = np.array([report.table.values(method, region, metric) for method in data["methods"]])
            found = np.array(data["values"][metric][region], float)
            np.testing.assert_allclose(found, np.abs(expected), rtol=1e-6)
            assert (np.array(data["values"][metric][region]) == None).tolist() == np.isnan(expected).tolist()  # noqa: E711 - elements
    means = np.array(data["values"]["dice"][MEAN][:2], float)
    np.testing.assert_allclose(means, report.table.means("dice", ["network", "crf"]), rtol=1e-6)


def test_the_summary_has_the_numbers_of_the_comparison_and_the_legend_the_colors_of_the_pictures(text):
    row = next(row for row in make_report().summary if (row.method, row.metric, row.region) == ("crf", "dice", "1"))
    comparison, found = row.comparison, Page(text)
    expected = f"1 front <part> {comparison.mean_baseline:.4f} {comparison.mean:.4f} {100 * comparison.mean_difference:+.2f} "
    assert expected.replace("-", "\u2212") in found.text
    low, high = (f"{100 * end:+.2f}".replace("-", "\u2212") for end in comparison.interval)
    assert f"{low} to {high} {format_p(row.p_adjusted)} {comparison.effect_size:+.2f} " in found.text
    assert f"▲ {comparison.wins} ● {comparison.ties} ▼ {comparison.losses}" in found.text
    colors = [attributes["style"] for _, attributes in found.elements if attributes.get("class") == "swatch"]
    assert colors == [f"background:{label_color(label)}" for label in (1, 2)]
    assert "1 front <part> 2 gained a label" in found.text
    assert set(re.findall(r'class="contour" style="stroke:(#\w+)"><title>1 front &lt;part&gt;<', text)) == {label_color(1)}


def test_each_chart_shows_the_pairs_of_its_metric_and_region(text):
    report = make_report()
    sets = [attributes for _, attributes in Page(text).elements if attributes.get("class") == "chart-set"]
    shown = {(attributes["data-metric"], attributes["data-region"]) for attributes in sets}
    assert shown == {(metric, region) for metric in ("dice", "hd95_mm", "volume_difference_ml") for region in (MEAN, "1", "2")}
    assert [("hidden" in attributes) for attributes in sets] == [False] + [True] * 8
    assert sets[0]["data-metric"] == "dice"
    assert len(pairs_of(report, "2", "dice").cases) == 11, "two are undefined"
    assert list(pairs_of(report, "2", "hd95_mm").gains) == list(pairs_of(report, "2", "dice").gains), "smaller distances are better"
    values = {"network": (0.3, 0.3), "crf": (0.1 + 0.2, 0.4)}
    lines = [Measurement(f"c{place}", "1", "dice", row[place], method) for method, row in values.items() for place in range(2)]
    assert list(pairs_of(make_report(table=ResultTable(lines)), "1", "dice").gains) == [0, 1], "rounding is no gain"


def test_worst_median_and_best_are_those_by_the_difference_in_mean_dice(tmp_path):
    report = make_report()
    shown = choose_cases(report, 2)
    means = report.table.means("dice", ["network", "crf"])
    order = [report.table.cases[index] for index in np.argsort(means[1] - means[0], kind="stable")]
    assert [one.case for one in shown if one.reason == "worst"] == order[:2]
    assert [one.case for one in shown if one.reason == "best"] == order[-1:-3:-1]
    assert {one.case for one in shown if one.reason == "median"} <= set(order[5:8])
    assert len({one.case for one in shown}) == 6
    for count in (2, 4):
        kept = ResultTable(line for line in report.table if line.case in report.table.cases[:count])
        judged = verdict(kept, "crf", "network", num_resamples=100)
        few = make_report(4, table=kept, summary=summarize(kept, "network", num_resamples=100), verdict=judged)
        assert sorted(one.case for one in choose_cases(few, 3)) == sorted(kept.cases), "once each"
        assert (f"Too few cases. n = {count}" in Page(written(tmp_path, few)).text) or count > 2


def test_where_a_single_region_is_judged_it_leads_everything(tmp_path):
    report = make_report()
    judged = verdict(report.table, "crf", "network", regions=["2"], num_resamples=100)
    report = make_report(summary=summarize(report.table, "network", mean_regions=["2"], num_resamples=100), verdict=judged)
    assert region_choices(report, "dice") == ("2", "1")
    differences = report.table.values("crf", "2", "dice") - report.table.values("network", "2", "dice")
    assert choose_cases(report, 1)[0].case == report.table.cases[int(np.nanargmin(differences))]
    found = Page(written(tmp_path, report, num_shown=1))
    assert "by the Dice of 2 in each case" in found.text
    assert "By the difference in Dice of 2." in found.text
    (first,) = (
        attributes["data-region"]
        for _, attributes in found.elements
        if attributes.get("data-metric") == "dice" and "hidden" not in attributes and attributes.get("class") == "chart-set"
    )
    assert first == "2"


def test_without_a_baseline_the_method_is_shown_alone(tmp_path):
    text = written(tmp_path, make_report(compared=False))
    found = Page(text)
    assert "there is no verdict" in found.text
    assert "Bland-Altman" not in found.text
    assert "Difference" not in found.text
    assert "Errors" in found.text
    assert region_choices(make_report(compared=False), "dice") == (MEAN, "1", "2")
    report = make_report(compared=False)
    signed = json.loads(found.scripts["data"])["values"]["volume_difference_ml"]["1"][0]
    np.testing.assert_allclose(np.array(signed, float), report.table.values("crf", "1", "volume_difference_ml"), rtol=1e-6)
    assert "without its sign" not in found.text, "in the summary it has its sign as well"


def test_what_cannot_be_shown_is_named_on_the_page(tmp_path):
    def load(case):
        if case == NASTY:
            raise InputError(f"images/{case}.nii.gz: cut off")
        return make_images(case, has_image=False)

    named = {"settings": {"folder": "labels/\udcff"}, "failures": [("case \udcfe", "labels/\udcfe.nii.gz: cut off")]}
    found = Page(written(tmp_path, make_report(4, load_case=load, **named)))
    assert f"This case cannot be shown: images/{NASTY}.nii.gz: cut off" in found.text
    assert not any(tag == "image" for tag, _ in found.elements)
    assert sum(attributes.get("class") == "nothing" for _, attributes in found.elements) == 9
    assert r"labels/\udcff" in found.text
    assert r"case \udcfe" in found.text


def test_thousands_of_cases_do_not_make_the_page_large(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST_VALUES", 20_000)
    table = make_table(1000)
    rows = summarize(table, "network", num_resamples=20)
    judged = verdict(table, "crf", "network", num_resamples=20)
    text = written(tmp_path, make_report(3, table=table, summary=rows, verdict=judged), num_shown=1)
    found = Page(text)
    data = json.loads(found.scripts["data"])
    assert len(data["cases"]) == 20_000 // (12 * 3), "12 choices of metric and region, 3 methods"
    assert f"Of 1000 cases, the {len(data['cases'])} whose mean Dice changed most" in found.text
    assert "There are 1000 cases" in found.text
    changes = np.abs(np.diff(table.means("dice", ["network", "crf"]), axis=0)[0])
    assert table.cases[int(np.argmax(changes))] in data["cases"]
    # Nine sets of three charts of at most 300 marks and lines, some twenty bytes each.
    assert len(text) < 800_000


def test_a_page_is_written_whole_or_not_at_all_the_same_for_the_same_input_and_names_each_case_that_is_drawn(tmp_path):
    seen, paths = [], [tmp_path / "one.html", tmp_path / "other.html"]
    for path in paths:
        write_report(path, make_report(), num_shown=1, progress=lambda *step: seen.append(step))
    assert [step[1:] for step in seen] == [(0, 3), (1, 3), (2, 3)] * 2
    assert seen[0][0] == choose_cases(make_report(), 1)[0].case
    before = paths[0].read_bytes()
    assert before == paths[1].read_bytes()

    def load(case):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        write_report(paths[0], make_report(load_case=load))
    assert paths[0].read_bytes() == before
    assert sorted(tmp_path.iterdir()) == paths
    with pytest.raises(CrfRefineError, match="cannot be written"):
        write_report(tmp_path / "none" / "report.html", make_report())


def test_the_viewer_is_there_with_its_license_and_without_it_the_page_says_what_to_install(text, tmp_path, monkeypatch):
    """Nilearn is not imported."""
    if not missing_viewer():
        assert "function brainsprite(" in text
        assert "Pierre Bellec and the Brainsprite contributors" in text
        assert "nilearn" not in sys.modules
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "nilearn", None)
        assert "nilearn, which is not installed" in missing_viewer()
        found = Page(written(tmp_path, make_report(), num_shown=1))
    assert "This report has no interactive viewer" in found.text
    assert "pip install 'crfrefine[report]'" in found.text
    assert not any("viewer" in (attributes.get("class") or "") for _, attributes in found.elements)
    viewer = tmp_path / "nilearn" / "_assets" / "js" / "brainsprite.min.js"
    viewer.parent.mkdir(parents=True)
    (tmp_path / "nilearn" / "__init__.py").write_text("raise AssertionError('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "install nilearn 0.12 to 0.14" in missing_viewer()
    viewer.write_text("export default class Another {}", encoding="utf-8")
    assert f"{viewer}: expected a slice viewer" in missing_viewer()


def test_headings_of_pictures_are_true():
    """No case that gained is under "Worst"; without a baseline there are neither gains nor losses."""
    for reason, changes, expected in (
        ("worst", [-0.02, 0.01], {"Worst": [-0.02], "Smallest gains": [0.01]}),
        ("worst", [0.0, 0.108], {"Smallest gains: no case is worse": [0.0, 0.108]}),
        ("best", [0.03, -0.01], {"Best": [0.03], "Smallest losses": [-0.01]}),
        ("worst", [None], {"Worst": [None]}),
    ):
        cases = [ShownCase("case", reason, None if change is None else 0.0, change or 0.0) for change in changes]
        found = _groups([CaseView(shown, (), None) for shown in cases])
        shown = {heading: [None if view.shown.before is None else view.shown.after for view in group] for heading, group in found}
        assert shown == expected
