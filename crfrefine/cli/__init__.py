"""The command line: one file a command. It parses, calls the library and prints; nothing here touches an array."""

import os

# Before numpy is imported: its BLAS would start a thread for each core, which costs start-up time, and no command multiplies matrices.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
