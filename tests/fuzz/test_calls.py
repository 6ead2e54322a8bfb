"""Wrong calls of the compiled module, and models with odd bandwidths: results or errors of ours, soon and in little memory."""

import pytest
from fuzz_engine import engine_targets
from fuzz_worker import fuzz

from crfrefine.engines.compiled import load_engine
from crfrefine.errors import BackendUnavailableError


@pytest.mark.parametrize(("name", "num_inputs"), [("module", 100), ("models", 10)])
def test_some_inputs(name, num_inputs, tmp_path):
    try:
        load_engine()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    (target,) = (target for target in engine_targets() if target.name == name)
    (tmp_path / name).mkdir()
    found = fuzz(target, tmp_path / name, inputs=num_inputs)
    assert not found.findings, found.findings[0]
    assert found.inputs == num_inputs
    assert found.taken >= num_inputs // 5, "too few inputs come as far as the work itself"
    assert found.refused >= num_inputs // 5, "too little is damaged"
