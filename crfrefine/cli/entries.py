"""The executables that platforms call by a name of their own: `crfrefine-slicer` and `crfrefine-bids`. Each is a command in other words."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from crfrefine.cli.main import main

_SEVERAL = ("--participant-label", "--session-label")
"""Options of BIDS Apps that take several values."""


def slicer() -> None:
    """Answer `--xml`, as 3D Slicer and MITK ask every executable of a module, and `--version`; refine one case for anything else."""
    if sys.argv[1:] == ["--xml"]:
        sys.argv = ["crfrefine", "describe", "slicer"]
    elif sys.argv[1:] == ["--version"]:
        sys.argv = ["crfrefine", "--version"]
    else:
        from crfrefine.apps.tools.descriptors.slicer import infer_arguments

        sys.argv = ["crfrefine", "infer", *infer_arguments(sys.argv[1:])]
    main()


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
