"""Fit the CRF to labeled cases and decide whether it helps: the work of `crfrefine train-crf`.

`run.py` is the whole run; `README.md` maps the other files. Nothing is printed here: events are reported to an observer.
"""
