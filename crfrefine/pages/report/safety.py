"""Keep names on the page harmless: only its own scripts run, it requests nothing, and direction marks are shown as escapes."""

from __future__ import annotations

import base64
import hashlib
import re

_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
_MARKUP = re.compile(r"(<script\b.*?</script>|<style\b.*?</style>|<[^>]*>)", re.DOTALL)
_START = '<meta charset="utf-8">\n'

# They reverse what follows them in a line: "gpj.exe" looks like "exe.jpg".
_DIRECTIONS = {letter: f"\\u{letter:04x}" for letter in (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def secure(page: str) -> str:
    """Return a page with a Content-Security-Policy of its own scripts, and with direction marks in its text as escapes.

    Args:
        page: the whole page. Names in its attributes and data stay as they are, since its scripts compare them.
    """
    pieces = _MARKUP.split(page)
    pieces[::2] = [text.translate(_DIRECTIONS) for text in pieces[::2]]
    page = "".join(pieces)
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in dict.fromkeys(_SCRIPT.findall(page)))
    rules = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    start, found, rest = page.partition(_START)
    assert found, "the policy must precede everything that it governs"
    return f'{start}{found}<meta http-equiv="Content-Security-Policy" content="{rules}">\n{rest}'


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8", "backslashreplace")).digest()).decode("ascii")
