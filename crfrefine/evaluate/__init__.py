"""Evaluation of folders of label maps against a reference: from files to measurements, a verdict, and output files.

`crfrefine evaluate` is its command. The numbers come from `crfrefine.metrics` and `crfrefine.statistics`; nothing is printed here.
"""
