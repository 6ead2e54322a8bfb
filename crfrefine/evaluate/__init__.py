"""Evaluation of label maps against a reference: from files to measurements and a verdict."""
