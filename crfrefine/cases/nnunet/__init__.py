"""nnU-Net version 2: the cases of a trained network or of its predictions. Only names and JSON are read; nothing is unpickled."""
