"""The model written for reading: float64, numpy only, one idea per file. Slow on purpose; everything else is checked against it.

`dense` sums over all pairs, `lattice` transcribes the permutohedral lattice with a dictionary, `mean_field` runs the iteration.
"""
