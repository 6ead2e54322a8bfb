"""The base of every room: texts, notices, failures, threads, memory, the geometry of grids."""
