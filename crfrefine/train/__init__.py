"""Fitting the CRF to labeled cases, and saying whether it helps: what `crfrefine train-crf` does.

`run.py` is the whole run; `README.md` maps the other files. Nothing is printed here: an observer is told what happens.
"""
