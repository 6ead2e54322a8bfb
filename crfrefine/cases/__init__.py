"""Cases: discovery of their files, dataset.json, and a case in memory."""
