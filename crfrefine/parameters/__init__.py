"""What can be set: the tables of a parameter file, their checks, TOML, presets, and their resolution to a case."""
