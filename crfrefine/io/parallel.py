"""Run a case's jobs at the same time, such as reading its files: inflating, decoding and arithmetic release Python's lock."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def run_all(jobs: Sequence[Callable[[], None]], threads: int) -> None:
    """Run the jobs, started in the order given, on at most `threads` threads; raise the error of the first one that failed."""
    if threads <= 1 or len(jobs) <= 1:
        for job in jobs:
            job()
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(threads, len(jobs))) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
