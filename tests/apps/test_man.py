"""The manual page has every command and option of the help, and groff takes it without a warning."""

import re
import shutil
import subprocess

import pytest
import typer.main
from cli_helpers import run_here

import crfrefine
from crfrefine.apps.tools.descriptors.command import Manual
from crfrefine.apps.tools.descriptors.man import man_page
from crfrefine.cli.main import app

GROFF = shutil.which("groff")
needs_groff = pytest.mark.skipif(GROFF is None, reason="needs groff")

ODD = r"""'quoted' at the start, C:\fBpath\nc, a - b -- c, "d", ~x^2 `e`, é – …"""


@pytest.fixture(scope="module")
def page():
    done = run_here("describe", "man", status=0)
    return done.stdout


def shown(page):
    """The page as a terminal shows it: one long line per paragraph, without bold."""
    done = subprocess.run(
        [GROFF, "-man", "-ww", "-Tutf8", "-P-cbou", "-rLL=2000n"], input=page, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    return done.stdout


def test_every_command_and_option_is_there(page):
    sections = dict(re.findall(r"^\.SS crfrefine (\S+)\n(.*?)(?=^\.S[SH] )", page.replace("\\-", "-"), re.MULTILINE | re.DOTALL))
    commands = typer.main.get_command(app).commands
    assert sections.keys() == commands.keys()
    for name, command in commands.items():
        for parameter in command.params:
            names = parameter.opts if parameter.param_type_name == "option" else []
            assert all(re.search(rf"^\\fB.*{re.escape(text)}\b", sections[name], re.MULTILINE) for text in names), parameter.opts


def test_it_has_the_version_and_the_usual_sections(page):
    assert page.startswith(f'.TH CRFREFINE 1 "" "crfrefine {crfrefine.__version__}"')
    assert re.findall(r"^\.SH (.*)$", page, re.MULTILINE) == ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "COMMANDS", "EXIT STATUS"]
    assert page.isascii()
    assert not re.search(r"(?<!\\)-", page), "roff may show it as another dash, which no shell understands"
    assert {line.split()[0] for line in page.splitlines() if line[0] in ".'"} == {".TH", ".ad", ".nh", ".SH", ".SS", ".PP", ".TP"}


@needs_groff
def test_options_and_odd_texts_are_shown_as_they_are(page):
    """Roff reads lines that begin with a dot or a quote as requests, and backslashes as escapes."""
    text = shown(page)
    assert "-i, --images PATH" in text
    assert "--set bilateral.theta_alpha=6; repeatable." in text
    manual = Manual("odd", "[OPTIONS]", f"{ODD}\n\n.TH {ODD}", ((f"--odd '{ODD}", f".so /etc/passwd {ODD}"),))
    text = shown(man_page([manual, manual]))
    assert text.count(ODD) == 9  # in the name once, then twice in the paragraphs and twice in the option of each
    assert text.count(f".so /etc/passwd {ODD}") == 2


def test_the_manual_is_of_no_single_command():
    done = run_here("describe", "man", "infer", status=2)
    assert "the manual has all commands" in done.stderr
