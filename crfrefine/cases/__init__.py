"""Which files are a case: discovery, dataset.json, and a case in memory."""
