"""`crfrefine demo`: a phantom with simulated network logits, refined as `infer` does, and drawn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from crfrefine.base.option import OUTPUT, Option
from crfrefine.cli import options as shared
from crfrefine.cli.command import command, options_of
from crfrefine.infer.options import InferenceOptions

# Chosen on phantoms with other seeds than the demo's; they say nothing about real images.
_PARAMETERS = {"bilateral.weight": 5.0, "bilateral.theta_alpha": 2.5, "bilateral.theta_beta": 0.1}
_COLUMNS = (
    "label",
    "Dice before",
    "Dice after",
    "components in truth",
    "components before",
    "components after",
)
_EXAMPLES = """\
crfrefine demo
crfrefine demo -o elsewhere --seed 7
crfrefine infer -i demo/images -p demo/logits -o again --preview"""


@command(_EXAMPLES, options_of(InferenceOptions, "threads"))
def demo(
    output: Annotated[
        Path,
        Option("-o --output", "Folder to write to.", "FOLDER", panel=OUTPUT, show_default=True),
    ] = Path("demo"),
    seed: Annotated[
        int,
        Option(
            "--seed",
            "Another seed makes another phantom.",
            "N",
            limits=(0, None),
            show_default=True,
        ),
    ] = 0,
    verbose: Annotated[bool, shared.VERBOSE] = False,
    **options: Any,
) -> None:
    """Refine a phantom and draw a picture of it; needs no data."""
    from crfrefine.cli.reporting import Reporter
    from crfrefine.cli.tables import print_table
    from crfrefine.demo.phantom import (
        NUM_LABELS,
        compare_with_truth,
        make_phantom,
        write_phantom,
    )
    from crfrefine.errors import CrfRefineError
    from crfrefine.infer.run import run_inference
    from crfrefine.io.writing import check_writable
    from crfrefine.metrics.registry import DICE
    from crfrefine.parameters.model import CrfParameters

    check_writable(output)
    write_phantom(make_phantom(seed), output)
    parameters = CrfParameters().replace(**_PARAMETERS)
    images = output / "images"
    logits = output / "logits"
    run_options = InferenceOptions(
        (images,),
        (logits,),
        output / "refined",
        None,
        parameters,
        device="cpu",
        preview=True,
        **options,
    )
    phantom = f"a phantom with {NUM_LABELS - 1} labels"
    print(f"{phantom}, and logits with typical mistakes, are in {output}", file=sys.stderr)
    with Reporter(verbosity=1 + verbose) as reporter:
        record = run_inference(run_options, reporter).cases[0]
    if record.output is None or record.preview is None:
        raise CrfRefineError(f"the demo's case could not be refined: {record.failures[0].message}")
    rows = []
    for label, dices, components in compare_with_truth(output, record.output):
        rows.append((str(label), *map(DICE.value_text, dices), *map(str, components)))
    print_table(_COLUMNS, rows, numbers=_COLUMNS)
    print(f"mask:    {record.output}")
    print(f"picture: {record.preview}")
    print(
        "This is a synthetic phantom: it shows what the tool does, "
        "and is not evidence about your data."
    )
