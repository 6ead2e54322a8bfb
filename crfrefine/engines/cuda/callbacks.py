"""A caller's progress function inside the engine: its errors, including lack of memory, belong to the caller."""

from __future__ import annotations

from collections.abc import Callable

from crfrefine.engines.base import Progress

_MARK = "_is_a_callers"  # attribute of an exception


def is_a_callers(error: MemoryError) -> bool:
    """Whether the error came from a caller's function, and so means nothing about the GPU's memory."""
    return getattr(error, _MARK, False)


def staged(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    """Return the function for one stage, to be called with a step and the number of steps."""
    if progress is None:
        return None

    def call(step: int, num_steps: int) -> None:
        try:
            progress(stage, step, num_steps)
        except MemoryError as error:
            setattr(error, _MARK, True)
            raise

    return call
