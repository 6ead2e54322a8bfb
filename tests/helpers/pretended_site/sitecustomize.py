"""For processes that the tests start, with this folder on PYTHONPATH: they find pretended GPUs. Python imports it at its start."""

import os
import sys
from pathlib import Path

if "PRETENDED_GPUS" in os.environ:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import pretended_gpus

    pretended_gpus.install()

if "PRETENDED_CUPY" in os.environ:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import recorded_cupy

    recorded_cupy.install(int(os.environ["PRETENDED_CUPY"]))
