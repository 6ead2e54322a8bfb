"""Is the difference real: paired tests, intervals, corrections, comparison, verdict."""
