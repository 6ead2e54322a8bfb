"""Which tests run on a GPU where there is one: those that have the marker `gpu`, as the engines' fixtures have for the parameter `cuda`."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
_USES = re.compile(r"\bmark\.gpu\b|^def test_\w+\([^)]*\b(backend|compiled_backend)\b", re.MULTILINE)


def files():
    """The files that have one; none is imported. `conftest.py` refuses a marked test in any other."""
    return [path for path in sorted(TESTS.glob("*/test_*.py")) if _USES.search(path.read_text(encoding="utf-8"))]
