"""The command line: one file per command.

It parses, calls the library and prints; it touches no array.
"""

import gc
import os

# Set before numpy is imported: its BLAS would start one thread per core, which slows start-up, and
# no command multiplies matrices.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Imports make tens of thousands of objects, and no garbage: the collector looks at objects for the
# first time when there are more, and from then on as usual.
_USUAL = gc.get_threshold()


def _look_as_usual(*_: object) -> None:
    """Set the usual thresholds, once: an interrupt that comes while a callback runs is lost."""
    gc.callbacks.remove(_look_as_usual)
    gc.set_threshold(*_USUAL)


gc.callbacks.append(_look_as_usual)
gc.set_threshold(100_000)
