"""Calls of the compiled module with wrong arguments, and models with odd bandwidths: results or errors of ours, soon and in little memory.

`make fuzz` gives 10,000 of each.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_engine import engine_targets
from fuzz_worker import Target, fuzz

from crfrefine.engines.compiled import load_engine
from crfrefine.errors import BackendUnavailableError

NUM_INPUTS = {"module": 500, "models": 60}


@pytest.mark.parametrize("target", engine_targets(), ids=lambda target: target.name)
def test_some_inputs(target: Target, tmp_path: Path) -> None:
    try:
        load_engine()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    folder, num_inputs = tmp_path / target.name, NUM_INPUTS[target.name]
    folder.mkdir()
    found = fuzz(target, folder, inputs=num_inputs)
    assert not found.findings, found.findings[0]
    assert found.inputs == num_inputs
    assert found.taken >= num_inputs // 5, "too few inputs come as far as the work itself"
    assert found.refused >= num_inputs // 5, "too little is damaged"
