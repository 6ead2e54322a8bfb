"""The page as text: one file that asks for nothing, in which what users name stays text, and whose
numbers are those of the table.
"""

import base64
import html.parser
import io
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import run_here
from evaluation_helpers import write_study
from PIL import Image

from crfrefine.base.failures import Failure
from crfrefine.errors import InputError
from crfrefine.evaluate import report as page
from crfrefine.evaluate.evaluation import Evaluation, EvaluationObserver
from crfrefine.evaluate.measuring import CaseResult, MeasuredRegions
from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.evaluate.report import draw_charts, write_report
from crfrefine.evaluate.report.numbers import dice_by_region
from crfrefine.statistics.comparison import Measurement, ResultTable, measurements_of, summarize
from crfrefine.statistics.texts import format_p
from crfrefine.statistics.verdict import verdict

NASTY = "</script><img src=x onerror=alert(1)>\"'&amp;"
TURNED = "☃\u200e\u202egpj\u2066\u2069"
DRAW_CASE = page.draw_case


class Page(html.parser.HTMLParser):
    """The elements of a page, and its text with single spaces; an element that is closed wrongly is
    an error.
    """

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open = []
        self.elements = []
        self.texts = []
        self.feed(text)
        self.close()
        assert self.open == [], "elements that are never closed"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "input", "img", "br", "link", "hr"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}>, line {self.getpos()[0]}"
        if tag in {"td", "th"}:
            self.texts.append(" ")

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.texts))


@pytest.fixture(autouse=True, scope="module")
def drawn():
    """Pictures of the cases that need no files."""
    buffer = io.BytesIO()
    Image.new("RGB", (5, 3)).save(buffer, format="png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "draw_case", lambda *_: buffer.getvalue())
        yield


def make_table(num_cases=13, *, methods=("network", "crf", "smoothing")):
    """Dice of two labels, HD95 and volume, with a case that both methods leave undefined and one
    that only one of them does.
    """
    rng = np.random.default_rng(3)
    names = [
        "case 0",
        NASTY,
        f"Ünï—코드 {TURNED}",
        *(f"case {number}" for number in range(3, num_cases)),
    ]
    lines = []
    for place, case in enumerate(names[:num_cases]):
        for region in ("1", "2"):
            base = rng.uniform(0.5, 0.9)
            for method in methods:
                gain = {
                    "network": 0.0,
                    "crf": rng.normal(0.02, 0.02),
                    "smoothing": rng.normal(0, 0.03),
                }[method]
                dice = base if place == 4 else base + gain
                if region == "2" and (place == 5 or (place == 6 and method == "network")):
                    dice = math.nan
                values = {
                    "dice": dice,
                    "hd95_mm": 20 * (1 - dice),
                    "volume_ml": 3 * base,
                    "volume_difference_ml": 5 * gain - 0.05,
                }
                values |= {"sensitivity": dice, "precision": dice}
                lines += measurements_of(case, method, {region: values})
    return ResultTable(lines)


def make_evaluation(table, method="crf", *, compared=True, label_names=((1, "front <part>"),)):
    """An evaluation with this table, and a failed case; with names that look like markup."""
    baselines = [(name, Path(name)) for name in table.methods if name != method] if compared else ()
    command = f"crfrefine evaluate {NASTY} {TURNED}"
    options = EvaluationOptions(
        Path(method),
        Path("labels"),
        Path("out"),
        name=method,
        baselines=baselines,
        command_line=command,
    )
    failed = CaseResult(
        f"broken {NASTY}",
        failures=[Failure("labels/\udcff.nii.gz: cut off </dl></script>", "InputError")],
    )
    evaluation = Evaluation(
        options, MeasuredRegions(options, label_names=dict(label_names)), (), [failed]
    )
    evaluation.table = table
    evaluation.regions = {name: (int(name),) for name in table.regions}
    evaluation.summary = summarize(table, "network" if compared else method)
    rivals = [name for name, _ in baselines[1:]]
    judged = {"rivals": rivals, "summary": evaluation.summary, "titles": evaluation.titles}
    evaluation.verdict = verdict(table, method, "network", **judged) if compared else None
    return evaluation


@pytest.fixture(scope="module")
def evaluation():
    return make_evaluation(make_table())


class Events(EvaluationObserver):
    """The notes of a run and the steps of its cases."""

    def __init__(self):
        self.notes = []
        self.steps = []

    def note(self, note, **_):
        self.notes.append(note)

    def stage_changed(self, name, stage, *step):
        self.steps.append((name, *step))


def written(tmp_path, evaluation, events=None):
    events = events or Events()
    path = tmp_path / "report.html"
    write_report(path, evaluation, events)
    assert not events.notes
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(tmp_path_factory, evaluation):
    return written(tmp_path_factory.mktemp("report"), evaluation)


def test_what_users_name_stays_text(text):
    """Markup, and a mark of direction, which would turn around the rest of its sentence, so that it
    is written out.
    """
    found = Page(text)
    for name in (
        NASTY,
        "cut off </dl></script>",
        "1 front <part>",
        r"☃\u200e\u202egpj\u2066\u2069",
        r"labels/\udcff",
    ):
        assert name in found.text
    assert not set(found.text) & set("\u200e\u202e\u2066\u2069")
    for tag, attributes in found.elements:
        assert "onerror" not in attributes
        assert tag not in {"b", "part"}


def test_the_page_is_well_formed_asks_for_nothing_outside_of_itself_and_runs_no_script(text):
    """The policy allows pictures and styles in the page, and nothing else."""
    elements = Page(text).elements
    names = []
    links = []
    for tag, attributes in elements:
        if "id" in attributes:
            names.append(attributes["id"])
        if "href" in attributes:
            links.append(attributes["href"])
        if tag == "img":
            assert "alt" in attributes
    assert len(names) == len(set(names))
    assert set(links) <= {f"#{name}" for name in names}
    assert re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z]", re.sub(r'"data:[^"]*"', "", text)) == []
    for tag, attributes in elements:
        assert tag not in {"link", "iframe", "object", "embed", "script"}
        for key in ("src", "href", "data", "action", "poster", "srcset"):
            assert (attributes.get(key) or "#").startswith(("#", "data:image/png;base64,"))
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    assert (
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        in text.partition("<title>")[0]
    )
    assert not re.search(r"url\(|@import", text)


def test_the_verdict_comes_first_and_the_numbers_are_those_of_the_comparison(text, evaluation):
    shown = Page(text).text
    assert shown.partition("Verdict ")[2].startswith(evaluation.verdict.sentence)
    assert "1 case could not be evaluated" in shown
    for method in ("network in 2", "crf in 1"):
        assert f"2: Dice is undefined for {method} of 13 cases" in shown
    row = next(
        row
        for row in evaluation.summary
        if (row.method, row.metric, row.region) == ("crf", "dice", "1")
    )
    comparison = row.comparison
    low, high = comparison.interval
    worst_case, worst_difference = comparison.worst[0]
    expected = (
        f"1 front <part> {comparison.mean_baseline:.4f} {comparison.mean:.4f} "
        f"{100 * comparison.mean_difference:+.2f} {100 * low:+.2f} to {100 * high:+.2f} "
        f"{format_p(row.p_adjusted)} {comparison.effect_size:+.2f} "
        f"{comparison.wins} / {comparison.ties} / {comparison.losses} "
        f"{100 * comparison.large_losses / 13:.3g}% ({worst_case} {100 * worst_difference:.2f}) "
        "13 0 "
    )
    assert expected.replace("-", "\u2212") in shown


def pictures(text, kind):
    """The pictures in the page by their alternative text: charts, or those of cases."""
    found = {}
    for tag, attributes in Page(text).elements:
        is_of_case = attributes.get("class") == "picture"
        if tag == "img" and is_of_case == (kind == "cases"):
            _, _, content = attributes["src"].partition(",")
            found[attributes["alt"]] = Image.open(io.BytesIO(base64.b64decode(content)))
    return found


def test_there_are_three_charts_and_a_picture_of_each_shown_case(tmp_path, monkeypatch):
    """A picture of a case has a panel more than that of `infer`: the reference."""
    monkeypatch.setattr(page, "draw_case", DRAW_CASE)
    study = write_study(tmp_path, 4)
    arguments = study.with_report
    for words, panels, expected in (
        (arguments, 5, ["Before and after", "Agreement (Bland-Altman)", "Each region"]),
        (arguments[:3] + arguments[5:], 4, ["Each region"]),
    ):
        run_here(*words, status=0)
        text = (study.output / "report.html").read_text(encoding="utf-8")
        charts = pictures(text, "charts")
        cases = pictures(text, "cases")
        assert [alt.partition(":")[0] for alt in charts] == expected
        for picture in charts.values():
            assert picture.width == 690
            assert picture.height >= 500
        assert len(cases) == 4
        for picture in cases.values():
            assert picture.width == panels * 320 + (panels - 1) * 8 + 2 * 14


def test_marks_of_the_charts_lie_at_the_values_of_their_cases(monkeypatch):
    """Better cases are blue, worse ones orange, equal ones gray; names that look like formulas are
    text.
    """
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes,
        "plot",
        lambda axes, x, y, **style: (
            drawn.append((np.array(x), np.array(y), style)) or plot(axes, x, y, **style)
        ),
    )
    values = {"network": (0.3, 0.3, 0.5), "$x_$": (0.1 + 0.2, 0.4, 0.1)}
    lines = []
    for method, row in values.items():
        for place, dice in enumerate(row):
            lines.append(Measurement(f"c{place}", "1", "dice", dice, method))
    evaluation = make_evaluation(ResultTable(lines), "$x_$", label_names=[(1, "$\\alpha")])
    assert list(draw_charts(evaluation, dice_by_region(evaluation))) == [
        "Before and after",
        "Agreement (Bland-Altman)",
        "Each region",
    ]
    marks = {}
    for x, y, style in drawn:
        marks.setdefault(style["color"], []).append((x, y))
    for color, before, after in (
        ("#5c656e", 0.3, 0.3),
        ("#00649c", 0.3, 0.4),
        ("#a84300", 0.5, 0.1),
    ):
        paired, agreement, region = marks[color]
        np.testing.assert_allclose(paired[1][:, 0], (before, after))
        np.testing.assert_allclose(
            (agreement[0][0], agreement[1][0]),
            ((before + after) / 2, 100 * (after - before)),
            atol=1e-9,
        )
        np.testing.assert_allclose(region[0], [100 * (after - before)], atol=1e-9)
    interval = next(x for x, _, style in drawn if style.get("linewidth") == 2)
    judged = next(row for row in evaluation.summary if row.method == "$x_$")
    np.testing.assert_allclose(interval, 100 * np.array(judged.comparison.interval))


def test_what_cannot_be_shown_is_named_on_the_page_and_a_bug_leaves_the_old_page(
    tmp_path, monkeypatch
):
    events = Events()
    problems = {NASTY: InputError(f"images/{NASTY}.nii.gz: cut off")}

    def draw(report, shown, *_):
        raise problems.get(shown.case) or RuntimeError("a bug")

    monkeypatch.setattr(page, "draw_case", draw)
    few = make_evaluation(make_table(3))
    problems |= dict.fromkeys(few.table.cases, problems[NASTY])
    text = written(tmp_path, few, events)
    assert f"This case cannot be shown: images/{NASTY}.nii.gz: cut off" in Page(text).text
    assert pictures(text, "cases") == {}
    assert events.steps == [(case, number, 3) for number, (case, *_) in enumerate(events.steps)]
    problems.clear()
    with pytest.raises(RuntimeError):
        written(tmp_path, few)
    assert [path.read_text() for path in tmp_path.iterdir()] == [text]


def test_without_matplotlib_the_page_has_all_but_the_charts_and_says_what_to_install(
    tmp_path, monkeypatch, evaluation
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = tmp_path / "report.html"
    events = Events()
    write_report(path, evaluation, events)
    (problem,) = map(str, events.notes)
    text = path.read_text(encoding="utf-8")
    assert "pip install 'crfrefine[report]'" in problem
    assert problem.removeprefix("the report has no charts: ") in Page(text).text
    assert evaluation.verdict.sentence in Page(text).text
    assert (len(pictures(text, "cases")), pictures(text, "charts")) == (9, {})
