"""One Dask cluster for all tests of executors."""

import pytest


@pytest.fixture(scope="package")
def address():
    """Of a cluster of two workers, which come back when they are killed."""
    from cluster_helpers import cluster_in_process

    with cluster_in_process() as cluster:
        yield cluster.scheduler_address
