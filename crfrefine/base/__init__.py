"""What every room stands on: texts, notices, failures, threads, memory, the order of axes, the geometry of grids."""
