"""Fit the CRF to labeled cases and decide whether it helps: `crfrefine train-crf`.

README.md maps the files.
"""
