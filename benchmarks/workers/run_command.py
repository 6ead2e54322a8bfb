"""Runs the command of its arguments and prints what it needed: wall and processor seconds, peak resident memory of it and its children.

Imports little, so that its own memory is far below any command's.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

with tempfile.TemporaryFile() as errors:
    start = time.perf_counter()
    process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=errors)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
code = os.waitstatus_to_exitcode(status)
record = {"seconds": seconds, "processor_seconds": usage.ru_utime + usage.ru_stime, "peak_mib": usage.ru_maxrss / 1024}
if code != 0:
    record["error"] = f"killed by signal {-code}" if code < 0 else (lines or [f"exit status {code}"])[0]
sys.stdout.write(json.dumps(record) + "\n")
