"""Notes: each kind has the values of its sentence, and is the same after a record was read."""

import ast
import json
from pathlib import Path
from string import Formatter

import pytest

import crfrefine
from crfrefine.base.notes import Note, NoteKind

PACKAGE = Path(crfrefine.__file__).parent


def kinds_in(node):
    """The kinds that an expression or the body of a function names."""
    return [
        inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute)
        and isinstance(inner.value, ast.Name)
        and inner.value.id == "NoteKind"
    ]


def notes_made(path):
    """The kinds and the names of the values of each note that a file makes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        kinds_of_name = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                kinds_of_name.setdefault(node.targets[0].id, []).extend(kinds_in(node.value))
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                kinds = kinds_of_name.get(called)
                if called.removeprefix("NoteKind.") in NoteKind.__members__:
                    kinds = [called.removeprefix("NoteKind.")]
                if kinds:
                    yield kinds, {keyword.arg for keyword in node.keywords}


def test_each_note_has_the_values_of_its_sentence():
    made = set()
    for path in PACKAGE.rglob("*.py"):
        for kinds, names in notes_made(path):
            made.update(kinds)
            fields = set()
            for kind in kinds:
                parts = Formatter().parse(NoteKind[kind].value)
                fields |= {name for _, name, _, _ in parts if name is not None}
            assert names == fields, f"{path}: {kinds}"
    assert made | {"OTHER"} == {*NoteKind.__members__}, "a kind that nothing makes"


NOTES = {
    "1 of 9 cases is left out: none": NoteKind.LEFT_OUT(left_out=1, cases=9, reasons="none"),
    "2 of 9 cases are left out: none": NoteKind.LEFT_OUT(left_out=2, cases=9, reasons="none"),
    "a.nii: the file is compressed, although its name says otherwise": NoteKind.COMPRESSED("a.nii"),
    "files of an earlier result are removed: 0, 1, 2, 3, 4 and 3 more": NoteKind.STALE_REMOVED(
        names=list("01234567")
    ),
    "probabilities: {labels}": NoteKind.CLIPPED_PROBABILITIES(problem="{labels}"),
}


@pytest.mark.parametrize("sentence", NOTES)
def test_a_note_is_the_same_after_a_record_was_read(sentence):
    note = NOTES[sentence]
    assert str(note) == sentence
    assert Note.from_dict(json.loads(json.dumps(note.to_dict()))) == note


def test_notes_of_other_versions_keep_their_sentences():
    later = {**NOTES["probabilities: {labels}"].to_dict(), "kind": "of_later"}
    others = {**later, "kind": "left_out"}  # as if its sentence had other values then
    kinds = {**others, "kind": "left_out", "values": {"left_out": [1], "cases": {}, "reasons": 1}}
    for entry in (later, others, kinds, {**others, "values": []}, later["text"]):
        assert str(Note.from_dict(entry)) == "probabilities: {labels}"
    for broken in ({"kind": 3}, {**later, "text": 5}, {"kind": "left_out", "values": {}}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            str(Note.from_dict(broken))
