"""What is left of runs, as their summaries tell, and the commands that do the rest: `crfrefine status`. `finding.py` begins."""
