"""What every room stands on: texts, notices, failures, threads, memory, the geometry of grids."""
