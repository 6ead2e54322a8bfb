"""How good is a label map: overlap, distances, calibration, connected components; over labels and regions."""
