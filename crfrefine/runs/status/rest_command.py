"""The command line that does the rest of a run, to be copied into a shell."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePath

_FLAG = "--continue"
_ALIASES = (_FLAG, "--resume")
_OPTIONS = ("--num-parts", "--part-id", "--summary")


def rest_command(arguments: Sequence[str], num_parts: int, part_id: int, *, of_part: int, folder: str) -> str:
    """Return the command that does what is left of a part.

    Args:
        arguments: of the command that was run, `infer` first.
        num_parts: number of parts.
        part_id: the part that the command is to do, from 0.
        of_part: the part that `arguments` did; the summary of another part gets its name from this one's.
        folder: where relative paths among the arguments begin; the command goes there first, unless it is the current folder.
    """
    kept, summary = _without_options(arguments)
    parts = ("--num-parts", str(num_parts), "--part-id", str(part_id)) if num_parts > 1 else ()
    named = ("--summary", summary if part_id == of_part else summary_of_part(summary, of_part, part_id)) if summary else ()
    command = " ".join(map(quote, ("crfrefine", *kept, _FLAG, *parts, *named)))
    return go_there(folder, command)


def go_there(folder: str, command: str) -> str:
    """Return the command with one before it that goes to a folder, unless that is the current one."""
    return command if _is_here(folder) else f"cd {quote(folder)} && {command}"


def summary_of_part(summary: str, of_part: int, part_id: int) -> str:
    """Return a name for the summary of a part like that of another part: `summary_3.json` like `summary_0.json`."""
    path = PurePath(summary)
    numbers = [*re.finditer(rf"(?<![0-9])0*{of_part}(?![0-9])", path.name)]
    if not numbers:
        return str(path.with_name(f"{path.stem}_{part_id}{path.suffix}"))
    start, end = numbers[-1].span()
    digits = end - start if path.name[start] == "0" else 0  # as many as before, if there are zeros in front
    return str(path.with_name(f"{path.name[:start]}{part_id:0{digits}d}{path.name[end:]}"))


def quote(word: str) -> str:
    """Return a word as a shell reads it; characters that do not print become escapes as in Bash: $'…'."""
    if word.isprintable():
        return shlex.quote(word)
    letters = (chr(byte) if 0x20 <= byte < 0x7F and chr(byte) not in "\\'" else f"\\x{byte:02x}" for byte in os.fsencode(word))
    return f"$'{''.join(letters)}'"


def _without_options(arguments: Sequence[str]) -> tuple[list[str], str]:
    """Return the arguments without parts, `--continue` and the summary; and the summary's name, or ""."""
    kept: list[str] = []
    summary = ""
    words = iter(arguments)
    for word in words:
        name, is_joined, value = word.partition("=")
        if word in _ALIASES:
            continue
        if name not in _OPTIONS:
            kept.append(word)
            continue
        value = value if is_joined else next(words, "")
        if name == "--summary":
            summary = value
    return kept, summary


def _is_here(folder: str) -> bool:
    try:
        return not folder or Path(folder).samefile(os.curdir)
    except OSError:
        return False
