"""The command line: one file per command.

It parses, calls the library and prints; it touches no array.
"""

import os

# Set before numpy is imported: its BLAS would start one thread per core, which slows start-up, and
# no command multiplies matrices.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
