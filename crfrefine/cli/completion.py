"""`--show-completion` and `--install-completion`: how a shell completes commands and options."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from crfrefine.base.text import shorten

# Of each shell, in the home folder: the file of the script, the file that is read at its start,
# and the line there that reads the script; fish needs none.
_PLACES = {
    "bash": (
        ".bash_completions/crfrefine.sh",
        ".bashrc",
        "source '{home}/.bash_completions/crfrefine.sh'",
    ),
    "zsh": (".zfunc/_crfrefine", ".zshrc", "fpath+=~/.zfunc; autoload -Uz compinit; compinit"),
    "fish": (".config/fish/completions/crfrefine.fish", "", ""),
}


def complete(context: click.Context, parameter: click.Parameter, shell: str | None) -> None:
    """Print, or install, the script for a shell, and exit; an empty name means that of $SHELL."""
    if shell is None or context.resilient_parsing:
        return
    shell = shell or Path(os.environ.get("SHELL", "")).name
    kind = get_completion_class(shell)
    if kind is None or shell not in _PLACES:
        raise click.BadParameter(f"{shorten(shell)}: expected one of {', '.join(_PLACES)}")
    script = kind(context.command, {}, "crfrefine", "_CRFREFINE_COMPLETE").source()
    if parameter.name == "show_completion":
        click.echo(script)
        context.exit()

    home = Path.home()
    place, start, line = _PLACES[shell]
    path = home / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, encoding="utf-8")
    if start:
        line = line.format(home=home)
        text = ""
        if (home / start).exists():
            text = (home / start).read_text(encoding="utf-8")
        if line not in text.splitlines():
            with (home / start).open("a", encoding="utf-8") as file:
                file.write(f"\n{line}\n")
    click.echo(f"completion for {shell} is in {path}; it works in new shells")
    context.exit()
