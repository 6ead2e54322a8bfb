"""The page as text: one file that asks for nothing, in which what users name stays text, and whose numbers are those of the table."""

import base64
import html.parser
import io
import itertools
import re
import sys

import numpy as np
import pytest
from browser_helpers import missing_browser, requested, resize
from PIL import Image
from report_helpers import NASTY, make_images, make_report, make_table

from crfrefine.errors import CrfRefineError, InputError
from crfrefine.pages.report import draw_charts, write_report
from crfrefine.statistics.comparison import MEAN, Measurement, ResultTable, format_p, summarize
from crfrefine.statistics.verdict import Outcome, verdict

VOID = {"meta", "input", "img", "br", "link", "hr"}


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
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
        if self.open and self.open[-1][0] != "style":
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


def test_the_page_asks_for_nothing_outside_of_itself_and_runs_no_script(text):
    """The policy allows pictures and styles in the page, and nothing else."""
    assert re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z]", re.sub(r'"data:[^"]*"', "", text)) == []
    assert "@import" not in text
    for tag, attributes in Page(text).elements:
        assert tag not in {"link", "iframe", "object", "embed", "script"}
        for key in ("src", "href", "data", "action", "poster", "srcset"):
            assert (attributes.get(key) or "#").startswith(("#", "data:image/png;base64,"))
        policy = attributes["content"] if attributes.get("http-equiv") == "Content-Security-Policy" else ""
        if policy:
            assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    assert "url(" not in text
    assert text.index("Content-Security-Policy") < text.index("<title>")


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
        assert f"Volume difference {name} 0 / 0 / 12 {change} " in found.text
    assert f" {format_p(mean.p_adjusted)} Volume difference 1 front" in found.text


def test_metrics_that_only_describe_have_their_mean_over_regions_and_their_change(tmp_path):
    """Cases that only one of the methods has are in neither mean; a metric that only one has gets its mean."""
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
    assert " 1 front <part> – 4.00000 – – – – – 0 5 " in found.text


def pictures(text, kind):
    """The pictures in the page by their alternative text: charts, or those of cases."""
    shown = [attributes for tag, attributes in Page(text).elements if tag == "img"]
    chosen = [attributes for attributes in shown if (attributes.get("class") == "picture") == (kind == "cases")]
    return {one["alt"]: Image.open(io.BytesIO(base64.b64decode(one["src"].partition(",")[2]))) for one in chosen}


def test_the_summary_has_the_numbers_of_the_comparison(text):
    row = next(row for row in make_report().summary if (row.method, row.metric, row.region) == ("crf", "dice", "1"))
    comparison, found = row.comparison, Page(text)
    expected = f"1 front <part> {comparison.mean_baseline:.4f} {comparison.mean:.4f} {100 * comparison.mean_difference:+.2f} "
    assert expected.replace("-", "\u2212") in found.text
    low, high = (f"{100 * end:+.2f}".replace("-", "\u2212") for end in comparison.interval)
    counts = f"{comparison.wins} / {comparison.ties} / {comparison.losses}"
    assert f"{low} to {high} {format_p(row.p_adjusted)} {comparison.effect_size:+.2f} {counts} 13 0 " in found.text


def test_there_are_three_charts_and_a_picture_of_each_shown_case(text, tmp_path):
    """A picture of a case has a panel more than that of `infer`: the reference."""
    assert [alt.partition(":")[0] for alt in pictures(text, "charts")] == ["Before and after", "Agreement (Bland-Altman)", "Each region"]
    assert all(picture.width == 690 and picture.height >= 500 for picture in pictures(text, "charts").values())
    cases = pictures(text, "cases")
    assert len(cases) == 9
    assert {picture.width for picture in cases.values()} == {5 * 320 + 4 * 8 + 2 * 14}
    alone = written(tmp_path, make_report(compared=False), num_shown=1)
    assert [alt.partition(":")[0] for alt in pictures(alone, "charts")] == ["Each region"]
    assert {picture.width for picture in pictures(alone, "cases").values()} == {4 * 320 + 3 * 8 + 2 * 14}


def test_marks_of_the_charts_lie_at_the_values_of_their_cases(monkeypatch):
    """Better cases are blue, worse ones orange, equal ones gray; names that look like formulas are text."""
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda axes, x, y, **style: drawn.append((np.array(x), np.array(y), style)) or plot(axes, x, y, **style)
    )
    values = {"network": (0.3, 0.3, 0.5), "$x_$": (0.1 + 0.2, 0.4, 0.1)}
    lines = [Measurement(f"c{place}", "1", "dice", row[place], method) for method, row in values.items() for place in range(3)]
    table = ResultTable(lines)
    summary = summarize(table, "network", num_resamples=100)
    named = {"method": "$x_$", "region_titles": {"1": "$\\alpha"}, "mean_regions": ["1"]}
    report = make_report(table=table, summary=summary, verdict=None, **named)
    assert [title for title, _ in draw_charts(report)] == ["Before and after", "Agreement (Bland-Altman)", "Each region"]
    marks = {}
    for x, y, style in drawn:
        marks.setdefault(style["color"], []).append((x, y))
    for color, before, after in (("#5c656e", 0.3, 0.3), ("#00649c", 0.3, 0.4), ("#a84300", 0.5, 0.1)):
        paired, agreement, region = marks[color]
        np.testing.assert_allclose(paired[1][:, 0], (before, after))
        np.testing.assert_allclose((agreement[0][0], agreement[1][0]), ((before + after) / 2, 100 * (after - before)), atol=1e-9)
        np.testing.assert_allclose(region[0], [100 * (after - before)], atol=1e-9)
    interval = next(x for x, _, style in drawn if style.get("linewidth") == 2)
    np.testing.assert_allclose(interval, np.multiply(100, next(row.comparison.interval for row in summary if row.method == "$x_$")))


def test_lowest_median_and_highest_are_those_by_the_difference_in_mean_dice():
    report = make_report()
    shown = report.shown_cases(2)
    means = report.table.means("dice", ["network", "crf"])
    order = [report.table.cases[index] for index in np.argsort(means[1] - means[0], kind="stable")]
    assert [one.case for one in shown if one.place == "lowest"] == order[:2]
    assert [one.case for one in shown if one.place == "highest"] == order[-1:-3:-1]
    assert {one.case for one in shown if one.place == "median"} <= set(order[5:8])
    assert len({one.case for one in shown}) == 6
    for count, expected in ((1, "lowest"), (2, "lowest highest"), (3, "lowest median highest"), (4, "lowest lowest highest highest")):
        kept = ResultTable(line for line in report.table if line.case in report.table.cases[:count])
        few = make_report(table=kept, summary=(), verdict=None).shown_cases(3)
        assert [one.place for one in few] == expected.split()
        assert len({one.case for one in few}) == count, "once each"


def test_where_a_single_region_is_judged_it_leads_everything(tmp_path):
    report = make_report()
    judged = verdict(report.table, "crf", "network", regions=["2"], num_resamples=100)
    rows = summarize(report.table, "network", mean_regions=["2"], num_resamples=100)
    report = make_report(summary=rows, verdict=judged, mean_regions=["2"])
    assert report.regions_of("dice") == ("2", "1")
    differences = report.table.values("crf", "2", "dice") - report.table.values("network", "2", "dice")
    assert report.shown_cases(1)[0].case == report.table.cases[int(np.nanargmin(differences))]
    found = Page(written(tmp_path, report, num_shown=1))
    assert "by the Dice of 2 in each case" in found.text
    assert "highest difference in Dice (2)" in found.text


def test_without_a_baseline_the_method_is_shown_alone(tmp_path):
    report = make_report(compared=False)
    found = Page(written(tmp_path, report, num_shown=1))
    assert "there is no verdict" in found.text
    assert "Bland-Altman" not in found.text
    assert "Difference" not in found.text
    assert "highest Dice (mean over regions)" in found.text
    assert report.regions_of("dice") == (MEAN, "1", "2")
    signed = report.table.values("crf", "1", "volume_difference_ml").mean()
    assert f" 1 front <part> {signed:.2f} 13 0 ".replace("-", "\u2212") in found.text
    assert "without its sign" not in found.text


def test_what_cannot_be_shown_is_named_on_the_page(tmp_path):
    def load(case):
        if case == NASTY:
            raise InputError(f"images/{case}.nii.gz: cut off")
        return make_images(case, has_image=False)

    named = {"settings": {"folder": "labels/\udcff"}, "failures": [("case \udcfe", "labels/\udcfe.nii.gz: cut off")]}
    text = written(tmp_path, make_report(3, load_case=load, **named))
    found = Page(text)
    assert f"This case cannot be shown: images/{NASTY}.nii.gz: cut off" in found.text
    assert len(pictures(text, "cases")) == 2
    assert r"labels/\udcff" in found.text
    assert r"case \udcfe" in found.text


def test_thousands_of_cases_and_regions_do_not_make_the_page_large(tmp_path):
    rng = np.random.default_rng(1)
    lines = [
        Measurement(f"case {case}", f"{region}", "dice", rng.uniform(0.5, 0.9), method)
        for case in range(1000)
        for region in range(1, 31)
        for method in ("network", "crf")
    ]
    labels = {f"{number}": (number,) for number in range(1, 31)}
    report = make_report(table=ResultTable(lines), summary=(), verdict=None, region_labels=labels, mean_regions=tuple(labels))
    text = written(tmp_path, report, num_shown=1)
    assert "The first 20 of 31 regions" in text
    assert sum(len(picture) for picture in re.findall(r'src="data:image/png;base64,([^"]*)" alt="[^"]*of each case"', text)) < 1_500_000


def test_a_page_is_written_whole_or_not_at_all_the_same_for_the_same_input_and_names_each_case_that_is_drawn(tmp_path):
    seen, paths = [], [tmp_path / "one.html", tmp_path / "other.html"]
    for path in paths:
        assert write_report(path, make_report(), num_shown=1, progress=lambda *step: seen.append(step)) == ""
    assert [step[1:] for step in seen] == [(0, 3), (1, 3), (2, 3)] * 2
    assert seen[0][0] == make_report().shown_cases(1)[0].case
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


def test_without_matplotlib_the_page_has_all_but_the_charts_and_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = tmp_path / "report.html"
    problem = write_report(path, make_report(), num_shown=1)
    assert "pip install 'crfrefine[report]'" in problem
    text = path.read_text(encoding="utf-8")
    assert problem in Page(text).text
    assert len(pictures(text, "cases")) == 3
    assert pictures(text, "charts") == {}
    assert make_report().verdict.sentence in Page(text).text


@pytest.mark.long
@pytest.mark.skipif(bool(missing_browser()), reason=missing_browser() or "there is a browser")
def test_a_browser_shows_every_picture_asks_for_nothing_and_needs_no_more_width_than_there_is(browser, text, tmp_path):
    """On a phone and at a desk; tables and pictures of cases scroll by themselves."""
    path = tmp_path / "report.html"
    path.write_text(text, encoding="utf-8")
    browser.get_log("browser")
    for width in (360, 390, 1280):
        resize(browser, width)
        requested(browser)
        browser.get(path.as_uri())
        assert [address for address in requested(browser) if not address.startswith("data:")] == [path.as_uri()]
        assert browser.execute_script("return document.documentElement.scrollWidth") == width
        assert browser.execute_script("return [...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert browser.get_log("browser") == []
