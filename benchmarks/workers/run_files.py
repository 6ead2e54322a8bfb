"""Reads a case's files and writes a label map, with crfrefine's own readers and writers: what no refinement of files can do without.

Arguments: the logits, a label map to write, where to, and the modalities.
"""

import sys
from pathlib import Path

from crfrefine import io

logits, labels, output, *images = map(Path, sys.argv[1:])
modalities = [io.read_volume(image) for image in images]
scores = io.read_logits([logits])
io.write_label_map(output, io.read_labels(labels).data, modalities[0])
