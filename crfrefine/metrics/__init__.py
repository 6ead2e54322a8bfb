"""Metrics of label maps: overlap, distances, calibration, connected components; for labels and regions."""
