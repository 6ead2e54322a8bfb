"""Write the presets anew below their heads, as the program writes parameters: keys and comments."""

from crfrefine.parameters.files import CONFIGS
from crfrefine.parameters.model import CrfParameters

for path in sorted(CONFIGS.glob("*.toml")):
    head, _, _ = path.read_text(encoding="utf-8").partition("schema = ")
    path.write_text(head + CrfParameters.load(path.stem).to_toml(), encoding="utf-8")
