"""Parameters for cases that `train-crf` has seen: those of the fold that held each case out.

Its report, beside the file of parameters, has the folds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crfrefine.base.text import printable
from crfrefine.cases.plans import is_trained
from crfrefine.errors import ConfigError, InputError
from crfrefine.io.json import read_json
from crfrefine.parameters.model import CrfParameters


def read_held_out(
    nnunet: Path, config: str, parameters: CrfParameters, entries: Mapping[str, Any]
) -> dict[str, tuple[str, CrfParameters]]:
    """Return the name and the parameters of the fold that held a case out, by the case.

    There are no cases if `nnunet` is no trained network, whose cases are those that it was trained
    on, if the file `config` has no report beside it, or if its parameters were learned on no case.
    They get the entries of `--set`. Raise InputError for a report of other cases.
    """
    path = Path(config).with_suffix(".report.json")
    if not parameters.trained_on or not path.is_file() or not is_trained(nnunet):
        return {}
    held_out = {}
    try:
        for fold in read_json(path)["folds"]:
            own = CrfParameters.from_dict(fold["fit"]["parameters"])
            if parameters.postprocess.keep_largest != "none":
                own = own.replace(**{"postprocess.keep_largest": fold["keep_largest"]})
            elif parameters.postprocess.removing and "min_component_ml" in fold:
                own = own.replace(**{"postprocess.min_component_ml": fold["min_component_ml"]})
            if entries:
                own = own.replace(**entries)
            for case_id in fold["held_out"]:
                held_out[str(case_id)] = (str(fold["name"]), own)
    except (KeyError, TypeError, ConfigError):
        held_out = {}
    if not {printable(case_id) for case_id in held_out} <= set(parameters.trained_on):
        held_out = {}
    if not held_out:
        raise InputError(
            f"{path}: is not the report of {config}, whose folds held out the cases that it was "
            "learned on\n  Train again, or remove the report: cases that the parameters were "
            "learned on are then refined with them."
        )
    return held_out
