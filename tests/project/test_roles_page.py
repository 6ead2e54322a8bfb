"""The page of every guess is that of its table, whose notes and errors exist and are tested."""

import ast
import re
import runpy
from pathlib import Path

import crfrefine

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(crfrefine.__file__).parent
ROLES = runpy.run_path(str(ROOT / "docs" / "roles.py"))
ALL = [guess for guesses in ROLES["GUESSES"].values() for guess in guesses]


def texts_of(folder):
    """All texts of the files in a folder, with those that a statement puts together."""
    texts = []
    for path in folder.rglob("*.py"):
        if path == Path(__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_the_page_is_that_of_the_table():
    page = (ROOT / "docs" / "reference" / "roles.md").read_text(encoding="utf-8")
    assert ROLES["page"]() == page, "run docs/roles.py"


def test_each_guess_can_be_contradicted_or_is_told():
    """A guess without a note and without an error would be made in silence."""
    silent = [guess.about for guess in ALL if not (guess.notes or guess.errors)]
    assert silent == ["a file in `convert` and `info`"]  # Their first line says it.
    assert all(guess.otherwise and guess.contradicted for guess in ALL)


def test_each_error_of_the_table_is_raised_and_tested():
    raised = texts_of(PACKAGE)
    tested = texts_of(ROOT / "tests")
    for guess in ALL:
        for error in guess.errors:
            assert error in raised, f"{guess.about}: {error}"
            assert error in tested, f"no test of: {guess.about}: {error}"


def test_each_note_of_the_table_is_tested():
    """By its kind, or by a piece of its sentence between the values."""
    tests = texts_of(ROOT / "tests")
    sources = "\n".join(
        path.read_text(encoding="utf-8")
        for path in (ROOT / "tests").rglob("*.py")
        if path != Path(__file__)
    )
    untested = set()
    for note in {note for guess in ALL for note in guess.notes}:
        pieces = [piece.strip() for piece in re.split(r"\{[^}]*\}", note.value)]
        words = [piece for piece in pieces if len(piece) > 8]
        is_named = f"NoteKind.{note.name}" in sources or f'"{note.name.lower()}"' in sources
        if not is_named and not any(has_part(piece, tests) for piece in words):
            untested.add(note.name)
    assert untested == set()


def has_part(piece, texts):
    """Whether texts have three words of a sentence that follow each other."""
    words = piece.split()
    size = min(3, len(words))
    return any(" ".join(words[at : at + size]) in texts for at in range(len(words) - size + 1))
