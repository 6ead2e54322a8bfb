"""Statistics of differences: paired tests, intervals, corrections, comparison, verdict."""
