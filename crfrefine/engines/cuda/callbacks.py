"""A caller's progress function inside the engine: its errors are the caller's, lack of memory among them."""

from __future__ import annotations

from collections.abc import Callable

from crfrefine.engines.base import Progress


class CallbackMemoryError(Exception):
    """Carries the MemoryError of a caller's function past `device.capacity`: it says nothing about the GPU's memory."""

    def __init__(self, error: MemoryError) -> None:
        """Take the error."""
        super().__init__(str(error))
        self.error = error


def staged(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    """The function for one stage, called with a step and the number of steps."""
    if progress is None:
        return None

    def call(step: int, num_steps: int) -> None:
        try:
            progress(stage, step, num_steps)
        except MemoryError as error:
            raise CallbackMemoryError(error) from error

    return call
