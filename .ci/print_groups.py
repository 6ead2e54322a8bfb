"""Print dependency groups of pyproject.toml, a requirement per line, for `pip install -r`.

pip's own option --group is too new: the pip of a fresh environment may not have it.
"""

import sys
import tomllib
from pathlib import Path

groups = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
for name in sys.argv[1:]:
    for requirement in groups[name]:
        print(requirement)
