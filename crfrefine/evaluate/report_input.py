"""The input of the report: the results under its names, and a reader for the volumes of the cases to show."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import crfrefine
from crfrefine.errors import CrfRefineError
from crfrefine.evaluate.reading import read_image, read_masks, read_reference
from crfrefine.evaluate.results import Evaluation
from crfrefine.report.model import CaseImages, ReportInput

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.evaluate.pairing import CasePair


def make_report_input(evaluation: Evaluation, note: Callable[[str], None]) -> ReportInput:
    """Return the contents of the report.

    Args:
        evaluation: the results.
        note: called with a note about images that cannot be shown.
    """
    options = evaluation.options
    pairs = {pair.case_id: pair for pair in evaluation.pairs}
    baseline = options.baseline if evaluation.verdict is not None else None
    return ReportInput(
        title=options.name if baseline is None else f"{options.name} against {baseline}",
        table=evaluation.table,
        method=options.name,
        baseline=baseline,
        summary=evaluation.summary,
        verdict=evaluation.verdict,
        region_labels=evaluation.regions,
        region_titles=evaluation.titles,
        failures=evaluation.failures,
        left_out=evaluation.left_out_text,
        settings=_settings(evaluation),
        load_case=lambda case_id: _load(pairs[case_id], options.name, baseline, note),
        mean_regions=evaluation.judged_regions,
    )


def _settings(evaluation: Evaluation) -> dict[str, str]:
    options, plan = evaluation.options, evaluation.settings.plan
    shown = {
        "reference": str(options.labels),
        **{f"method {name}": str(path) for name, path in options.methods.items()},
        **{f"probabilities of {name}": str(path) for name, path in options.probabilities},
        "images": "none" if options.images is None else str(options.images),
        "mean over regions": ", ".join(evaluation.titles.get(name, name) for name in evaluation.judged_regions),
        "tolerance of the surface Dice": f"{options.tolerance_mm:g} mm",
        "ignored label": "none" if plan.ignore_label is None else str(plan.ignore_label),
        "could have been seen": evaluation.power_note or "",
        "notes": " ".join(evaluation.notes),
        "command": options.command_line,
        "version": f"crfrefine {crfrefine.__version__}",
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    return {name: text for name, text in shown.items() if text}


def _load(pair: CasePair, method: str, baseline: str | None, note: Callable[[str], None]) -> CaseImages:
    reference = read_reference(pair.reference)
    image = None
    if pair.image is not None:
        try:
            image = _solid(read_image(pair.image, reference))
        except (CrfRefineError, OSError) as error:
            note(f"case {pair.case_id!r}: shown without its image: {error}")
    return CaseImages(
        case=pair.case_id,
        image=image,
        reference=_solid(reference.data),
        before=None if baseline is None else _solid(read_masks(pair.methods[baseline], reference)[0]),
        after=_solid(read_masks(pair.methods[method], reference)[0]),
        affine=reference.affine,
    )


def _solid(values: NDArray[Any]) -> NDArray[Any]:
    """Return a slice as a volume with one slice: (x, y, 1)."""
    return values if values.ndim >= 3 else values.reshape(values.shape + (1,) * (3 - values.ndim))
