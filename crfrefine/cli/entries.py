"""The executable that BIDS platforms call by a name of its own, `crfrefine-bids`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from crfrefine.cli.main import main

_SEVERAL = ("--participant-label", "--session-label")
"""Options of BIDS Apps that take several values."""


def bids() -> None:
    """Run `crfrefine bids`."""
    sys.argv = ["crfrefine", *bids_arguments(sys.argv[1:])]
    main()


def bids_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of `crfrefine` for those of a BIDS App: `--participant_label 01 02` is `--participant-label` twice."""
    if list(arguments) in (["--version"], ["-v"]):
        return ["--version"]
    found, option = ["bids"], ""
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag.replace("_", "-") in _SEVERAL:
            option = flag.replace("_", "-")
            found += [option, value] if equals else []
        elif argument.startswith("-"):
            option = ""
            found.append(argument)
        else:
            found += [option, argument] if option else [argument]
    return found
