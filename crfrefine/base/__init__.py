"""The base of every room: texts, notes, failures, threads, memory, the geometry of grids."""
