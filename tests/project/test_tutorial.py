"""The figures that the tutorial shows are those that its commands print."""

import re
from pathlib import Path

import pytest
from cli_helpers import run_here

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"
_BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
_ROW = re.compile(r"^\| ([\w ]+) \| (0\.\d+) \|$", re.MULTILINE)


def quotes(text):
    """The lines of a page that begin with the sign of a quotation."""
    return re.findall(r"^> (.+)$", text, re.MULTILINE)


def numbers(text):
    return [float(number) for number in _NUMBER.findall(text)]


def words(text):
    return _NUMBER.sub("#", text)


def find_line(output, beginning):
    lines = output.splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.startswith(beginning)]
    return " ".join(lines[start:])


def find_mean_dice(output, method):
    row = re.search(rf"^mean\t{method}\t(0\.\d+)\b", output, re.MULTILINE)
    return float(row[1])


@pytest.mark.long
def test_the_tutorial_shows_what_its_commands_print(tmp_path, monkeypatch):
    """Another processor and another version of PyTorch change a training's last digits: figures
    agree to a tenth of a point of Dice, or to a twentieth where they are p values.
    """
    pytest.importorskip("torch", reason="train-crf needs PyTorch")
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    blocks = [*_BLOCK.finditer(text)]
    num_compared = 0
    for block, end in zip(blocks, [*(each.start() for each in blocks[1:]), len(text)], strict=True):
        if block[1] == "python":
            exec(compile(block[2], PAGE, "exec"), {})
            continue
        statement = block[2].strip()
        if "imagesTs" in statement:  # a reader's own cases
            continue
        result = run_here(*statement.split()[1:], status=0)
        output = result.stdout + result.stderr
        shown = text[block.end() : end]
        for quote in quotes(shown):
            line = find_line(output, quote.split()[0])
            assert words(line).startswith(words(quote))
            found = numbers(line)[: len(numbers(quote))]
            assert found == pytest.approx(numbers(quote), rel=0.05, abs=0.1), line
            num_compared += 1
        for method, dice in _ROW.findall(shown):
            assert find_mean_dice(output, method) == pytest.approx(float(dice), abs=0.001), method
            num_compared += 1
    assert num_compared == len(quotes(text)) + len(_ROW.findall(text)) > 5
