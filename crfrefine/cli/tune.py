"""`crfrefine tune`: a local page with sliders for the parameters, which shows what they do."""

from __future__ import annotations

import os
import sys
import webbrowser
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crfrefine.base.label_options import InputOptions
from crfrefine.base.limits import run_beside
from crfrefine.base.option import Option
from crfrefine.cli import options as shared
from crfrefine.cli.command import command, options_of
from crfrefine.cli.failures import tell
from crfrefine.infer.options import InferenceOptions
from crfrefine.tune.options import TuneOptions

if TYPE_CHECKING:
    from crfrefine.infer.inputs import RunInputs

_OF_INFER = "images logits nnunet manifest masks strokes device max_memory threads"

_LARGEST_KEPT = 4 << 20  # bytes: those of a box are used again
_EXAMPLES = """\
crfrefine tune -i images -p logits -o params.toml
crfrefine tune -i images -p logits -l labels
crfrefine tune -i images -p logits --corrections strokes --no-browser"""


@command(
    _EXAMPLES,
    options_of(InputOptions) + options_of(InferenceOptions, _OF_INFER) + options_of(TuneOptions),
)
def tune(
    ctx: typer.Context,
    config: Annotated[str, shared.CONFIG] = "default",
    overrides: Annotated[tuple[str, ...], shared.OVERRIDES] = (),
    regions: Annotated[tuple[str, ...], shared.REGIONS] = (),
    port: Annotated[
        int,
        Option(
            "--port",
            "Port on 127.0.0.1; 0: any free one.",
            "N",
            limits=(0, 65535),
            show_default=True,
        ),
    ] = 0,
    browser: Annotated[
        bool,
        Option(
            "--browser/--no-browser",
            "Whether to open the page in a browser.",
            show_default=True,
        ),
    ] = True,
    **options: Any,
) -> None:
    """Choose parameters by eye, on a page with sliders, and correct a case with strokes.

    The page is served on this machine only, and ends with its own button or with Ctrl-C.
    """
    shared.check_inputs(options)
    shared.take_label_maps(options)
    preset = shared.preset_of(ctx, config)
    from crfrefine.engines import get_backend
    from crfrefine.engines.cpu import load_engine
    from crfrefine.io.writing import check_output
    from crfrefine.metrics.regions import parse_region
    from crfrefine.tune.finding import find_cases_to_show, number_of_first
    from crfrefine.tune.server import serve
    from crfrefine.tune.worklist import Worklist

    # Else arrays of a whole case, which is refined again and again, stay with malloc by and by.
    load_engine().keep_freed_memory(_LARGEST_KEPT)
    parameters, _ = shared.parameters_of(preset, overrides)
    if options["masks"] == "nonzero":  # The saved file has it, too.
        parameters = parameters.replace(**{"intensity.mask": "nonzero"})
    own = {name: options.pop(name) for name in ("labels", "output", "corrections", "first")}
    if own["output"] is not None:
        check_output(own["output"])
    inputs = InferenceOptions(**options, output=Path(), parameters=parameters, preview=True)
    tune_options = TuneOptions(inputs, regions=tuple(map(parse_region, regions)), **own)
    get_backend(inputs.device)  # A device that is not there is an error before anything is read.
    inputs_of_run = find_cases_to_show(tune_options)
    _tell_inputs(inputs_of_run, number_of_first(inputs_of_run, tune_options))
    worklist = Worklist(tune_options, inputs_of_run)
    try:
        serve(worklist, port, partial(_tell_address, opens_browser=browser))
    except KeyboardInterrupt:
        folder = worklist.keep_lost()
        if folder:
            tell(f"strokes are kept in {folder}")
        if worklist.is_busy:
            tell("interrupted")
            _leave_at_once(130)
        raise
    finally:
        worklist.end()
    if worklist.is_busy:
        _leave_at_once(0)


def _tell_inputs(inputs: RunInputs, number: int) -> None:
    """Print the roles of the inputs, by the case of a number, which is read then."""
    from crfrefine.cases.role_table import tell_roles
    from crfrefine.cli.reporting import RunReporter

    reporter: RunReporter[object, object] = RunReporter()
    reporter.cases_found(inputs.cases.found)
    tell_roles(inputs.cases[number:], inputs.reading, reporter)
    tell("reading the case")


def _leave_at_once(status: int) -> None:
    """End without waiting for a step that cannot stop; files are whole or not there."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _tell_address(address: str, ticket: str, *, opens_browser: bool) -> None:
    """Print the address of the page, and open it in a browser if wanted, by a ticket."""
    tell("open this address in a browser of this machine; the page's button or Ctrl-C ends it")
    print(address, flush=True)
    # A server without a screen has no window, and a browser in the terminal would be in the way.
    has_screen = "SSH_CONNECTION" not in os.environ
    has_screen = has_screen and bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if opens_browser and has_screen:
        run_beside(partial(webbrowser.open, ticket))
