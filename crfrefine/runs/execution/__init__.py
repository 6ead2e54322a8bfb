"""Execution of many cases: in threads, processes or a pipeline; resume, observers, records. README.md has the map."""
