"""Evaluation of folders of label maps against a reference: from files to measurements, a verdict, and output files."""
