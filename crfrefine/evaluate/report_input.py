"""The input of the report: the results under its names, and a reader for the volumes of the cases to show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

import crfrefine
from crfrefine.cases.naming import Names, read_names
from crfrefine.errors import CrfRefineError
from crfrefine.evaluate.reading import read_image, read_masks, read_reference
from crfrefine.evaluate.results import Evaluation
from crfrefine.pages.report.model import CaseImages, ReportInput

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.evaluate.pairing import CasePair


def make_report_input(evaluation: Evaluation, note: Callable[[str], None]) -> ReportInput:
    """Return the contents of the report; `note` is called with what cannot be shown."""
    options = evaluation.options
    pairs = {pair.case_id: pair for pair in evaluation.pairs}
    names = read_names([options.images, options.labels]) if options.images is not None else Names()
    for text in names.notes:
        if text not in evaluation.notes:
            note(text)
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
        load_case=lambda case_id: _load(pairs[case_id], evaluation, baseline, names.modalities, note),
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


def _load(pair: CasePair, evaluation: Evaluation, baseline: str | None, names: Sequence[str], note: Callable[[str], None]) -> CaseImages:
    reference = read_reference(pair, evaluation.settings, [])
    method, regions = evaluation.options.name, evaluation.settings.channels
    channels: list[NDArray[np.float32]] = []
    titles: list[str] = []
    for number, path in enumerate(pair.images):
        try:
            found = read_image(path, reference)
        except (CrfRefineError, OSError) as error:
            note(f"case {pair.case_id!r}: shown without {'its image' if len(pair.images) == 1 else path.name}: {error}")
            continue
        first = len(channels) if len(pair.images) == 1 else number
        titles += [names[place] if place < len(names) else f"modality {place + 1}" for place in range(first, first + len(found))]
        channels += [_solid(channel) for channel in found]
    return CaseImages(
        case=pair.case_id,
        image=np.stack(channels) if channels else None,
        reference=_solid(reference.volume.data),
        before=None if baseline is None else _solid(read_masks(pair.methods[baseline], reference, regions[baseline], [])[0]),
        after=_solid(read_masks(pair.methods[method], reference, regions[method], [])[0]),
        affine=reference.volume.affine,
        modality_names=tuple(titles),
    )


def _solid(values: NDArray[Any]) -> NDArray[Any]:
    """Return a slice as a volume with one slice: (x, y, 1)."""
    return values if values.ndim >= 3 else values.reshape(values.shape + (1,) * (3 - values.ndim))
