"""The table of measurements as text."""

import csv
import io

from crfrefine.evaluate.outputs import metrics_csv
from crfrefine.statistics.comparison import Measurement, ResultTable


def test_no_name_is_a_formula():
    """Names are those of files: whoever sends a file may choose one, and a spreadsheet computes what begins like this."""
    for name in ("=1+1", "+a", "-a", "@a", "\ta", "\ra", '=HYPERLINK("x")'):
        table = ResultTable([Measurement(name, name, "dice", -0.5, name), Measurement("plain", name, "dice", 0.25, name)])
        rows = list(csv.DictReader(io.StringIO(metrics_csv(table), newline="")))
        assert [row["case"] for row in rows] == [f"'{name}", "plain"]
        assert {row["label"] for row in rows} == {row["method"] for row in rows} == {f"'{name}"}
        assert [float(row["value"]) for row in rows] == [-0.5, 0.25]
    table = ResultTable([Measurement("a=b, 'c' -1", "1", "dice", 0.5, "crf+x")])
    assert metrics_csv(table).splitlines()[1] == "\"a=b, 'c' -1\",1,dice,0.5,crf+x"
