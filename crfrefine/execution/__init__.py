"""How many cases are run: in threads, in processes, and what a case may fail with."""
