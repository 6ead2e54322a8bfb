"""Letters that a terminal or a file behind `>` cannot hold, as with Windows' code pages: our own signs are spelled, others are escaped."""

from __future__ import annotations

import codecs
import io
import sys

_SPELLED = {"→": "->", "×": "x", "…": "...", "–": "-", "’": "'", "²": "^2", "≤": "<=", "·": "-"}
_HANDLER = "crfrefine.spelled"


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace a sign by its spelling; escape everything else, such as parts of file names that are no text."""
    if isinstance(error, UnicodeEncodeError):
        error.end = error.start + 1  # Letters one by one: a sign may follow another letter.
        if error.object[error.start] in _SPELLED:
            return _SPELLED[error.object[error.start]], error.end
    return codecs.backslashreplace_errors(error)


def spell_what_terminals_lack() -> None:
    """Let standard output and standard error take any text: neither a file name nor a sign may cause a traceback."""
    codecs.register_error(_HANDLER, _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)
