"""Errors that users can cause and fix.

Any other exception is a bug and keeps its traceback (`crfrefine.base.failures`).
"""

from __future__ import annotations


class CrfRefineError(Exception):
    """A problem with the input or the machine.

    The message says: expected, found, in which file, and what to do.

    Attributes:
        message: the text without the name of the case.
        case_id: the case that could not be read or refined, if it is about one.
        cause: what it has in common with the same error in other cases; empty if the place where
            it was raised says so.
    """

    case_id = ""

    def __init__(self, message: str = "", *, cause: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.cause = cause

    def __str__(self) -> str:
        if self.case_id:
            return f"case {self.case_id!r}: {self.message}"
        return self.message


class ConfigError(CrfRefineError):
    """A parameter is unknown, of the wrong length, outside its range, or does not fit the case.

    The message names its key.
    """


class InputError(CrfRefineError):
    """An array or file has unusable values: not finite, empty, or of the wrong shape or kind."""


class GridMismatchError(CrfRefineError):
    """Two files or arrays of one case are on different voxel grids; the message names both."""


class UnsupportedFormatError(CrfRefineError):
    """A file cannot be read or written as asked.

    Its kind is unknown, it is damaged, or its layout would have to be guessed.
    """


class StorageError(CrfRefineError):
    """Nothing more can be written: the disk is full, over quota, or read-only."""


class BackendUnavailableError(CrfRefineError):
    """The requested device or engine is not available; the message says what to install."""


class DeviceLostError(BackendUnavailableError):
    """A GPU stopped working in the middle of a run; nothing in this process can use it any more."""


class CapacityError(CrfRefineError):
    """The problem is larger than the algorithm or the memory can hold; the message names sizes."""


class DeviceMemoryError(CapacityError):
    """The problem does not fit into the memory of a GPU; it may fit into that of the CPU."""


class ExportError(CrfRefineError):
    """The trainable layer cannot become part of an exported graph.

    The message says what to export instead.
    """


class UnexpectedError(CrfRefineError):
    """A file made its reader raise an unexpected exception: a bug, which fails only its case."""
