"""`crfrefine tune`: a local page with sliders for the parameters, which shows at once what they do to a case."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from crfrefine.cli.options import (
    AllowMismatchedDicomOption,
    ConfigOption,
    DeviceOption,
    ImagesOption,
    InputType,
    InputTypeOption,
    LogitsOption,
    ManifestOption,
    MasksOption,
    MaxMemoryOption,
    NnunetOption,
    OverridesOption,
    ResampleOption,
    ThreadsOption,
    check_sources,
    parse_path,
)
from crfrefine.cli.region_options import ClassOrderOption, CountedRegionsOption, parse_class_order


def tune(
    images: ImagesOption = None,
    logits: LogitsOption = None,
    nnunet: NnunetOption = None,
    manifest: ManifestOption = None,
    labels: Annotated[
        Path | None,
        typer.Option("-l", "--labels", metavar="PATH", parser=parse_path, help="References: folder or file; for Dice.", show_default=False),
    ] = None,
    masks: MasksOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE.toml",
            parser=parse_path,
            help="Where the page's button saves the parameters.",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = "default",
    overrides: OverridesOption = None,
    input_type: InputTypeOption = InputType.AUTO,
    regions: CountedRegionsOption = None,
    regions_class_order: ClassOrderOption = None,
    resample: ResampleOption = False,
    allow_mismatched_dicom: AllowMismatchedDicomOption = False,
    device: DeviceOption = "auto",
    max_memory: MaxMemoryOption = None,
    case: Annotated[
        str | None,
        typer.Option("--case", metavar="NAME", help="The case of a folder to open first; the page has the others.", show_default=False),
    ] = None,
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="Port on 127.0.0.1; 0: any free one.")] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Whether to open the page in a browser.")] = True,
    threads: ThreadsOption = None,
) -> None:
    """Choose parameters by eye, on a page with sliders.

    The page is served on this machine alone, and ends with its own button or with Ctrl-C.
    """
    check_sources(images, logits, nnunet, manifest, masks, input_type)
    from crfrefine.apps.tune.options import TuneOptions
    from crfrefine.apps.tune.server import check_libraries, serve
    from crfrefine.apps.tune.session import Session
    from crfrefine.engines import get_backend
    from crfrefine.io.atomic import check_small_output
    from crfrefine.metrics.regions import parse_region
    from crfrefine.parameters.model import CrfParameters
    from crfrefine.parameters.overrides import parse_override
    from crfrefine.runs.infer.options import InferenceOptions

    check_libraries()
    parameters = CrfParameters.load(config).replace(**dict(parse_override(text) for text in overrides or ()))
    if masks == "nonzero":  # The saved file says so, too.
        parameters = parameters.replace(**{"intensity.mask": "nonzero"})
    if output is not None:
        check_small_output(output)
    inputs = InferenceOptions(
        images=tuple(images or ()),
        logits=tuple(logits or ()),
        output=Path(),
        masks=masks if masks in (None, "nonzero") else Path(masks),
        parameters=parameters,
        input_type=input_type.value,
        resample=resample,
        allow_mismatched_dicom=allow_mismatched_dicom,
        device=device,
        threads=threads,
        max_memory=max_memory,
        preview=True,
        nnunet=nnunet,
        manifest=manifest,
    )
    options = TuneOptions(
        inputs,
        labels,
        output,
        case,
        regions=tuple(parse_region(text) for text in regions or ()),
        class_order=None if regions_class_order is None else parse_class_order(regions_class_order),
    )
    get_backend(device)  # A device that is not there is an error before anything is read.
    print("crfrefine: reading the case", file=sys.stderr)
    session = Session(options)

    def tell(address: str) -> None:
        print("crfrefine: open this address in a browser of this machine; the page's button or Ctrl-C ends it", file=sys.stderr)
        print(address, flush=True)
        if browser:
            _open_browser(address)

    try:
        serve(session, port, tell)
    finally:
        session.end()


def _open_browser(address: str) -> None:
    """Open a browser that has a window; a server without a screen has none, and one in the terminal would be in the way."""
    import os
    import threading
    import webbrowser

    has_screen = sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    if has_screen and "SSH_CONNECTION" not in os.environ:
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
