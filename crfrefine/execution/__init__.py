"""How many cases are run: in threads, processes or a pipeline; resume, observers, records. README.md has the map."""
