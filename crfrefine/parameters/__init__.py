"""Parameters: the tables of a parameter file, their checks, TOML, presets, and their resolution for a case."""
