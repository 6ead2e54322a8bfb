"""Dask workers as Slurm jobs, started by dask-jobqueue, and one run of crfrefine on them.

    pip install 'crfrefine[distributed]' dask-jobqueue
    python slurm_jobqueue.py infer -i IMAGES -p LOGITS -o OUTPUT --continue

Run it where jobs may be submitted and the folders are those of the nodes. Scheduler and command run here; jobs come and go.
"""

from __future__ import annotations

import os
import subprocess
import sys

CORES, MEMORY, WALLTIME, JOBS = 4, "8GB", "01:00:00", 20
SECURITY = os.environ.get("DASK_CONFIG")
"""The file of `certificates.sh`: without it, whoever reaches the scheduler's port can run programs in your name."""


def main() -> None:
    """Start the cluster, and run crfrefine with the arguments of this script on it."""
    import dask
    from dask_jobqueue import SLURMCluster

    dask.config.set({"distributed.scheduler.allowed-failures": 1})
    with SLURMCluster(
        cores=1,  # one case at a time per job, with all of its CPUs inside the engine
        job_cpu=CORES,
        processes=1,
        memory=MEMORY,
        walltime=WALLTIME,
        protocol="tls://" if SECURITY else "tcp://",
        # A worker leaves five minutes before its job ends: its case begins again elsewhere, and the scheduler counts no failure.
        worker_extra_args=["--lifetime", "55m", "--lifetime-stagger", "3m"],
        job_script_prologue=[f"export DASK_CONFIG={SECURITY}"] if SECURITY else [],
    ) as cluster:
        cluster.adapt(minimum_jobs=JOBS, maximum_jobs=JOBS)  # a job that has ended is replaced
        command = ["crfrefine", *sys.argv[1:], "--dask", cluster.scheduler_address, "--threads", str(CORES)]
        sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
