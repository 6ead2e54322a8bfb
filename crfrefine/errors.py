"""The errors that users can cause and mend; anything else that is raised is a bug, whose traceback is kept (`crfrefine.failures`)."""

from __future__ import annotations


class CrfRefineError(Exception):
    """A problem with the input or the machine: says what was expected, what came, which file, and what to do."""


class ConfigError(CrfRefineError):
    """A parameter is unknown, of the wrong length, or outside its range; the message names its key."""


class InputError(CrfRefineError):
    """The values of an array or file cannot be used: not finite, empty, of the wrong shape or kind."""


class GridMismatchError(CrfRefineError):
    """Two files or arrays of one case are on different voxel grids; the message names both."""


class UnsupportedFormatError(CrfRefineError):
    """A file cannot be read or written as asked: unknown kind, damaged, or a layout that would have to be guessed."""


class BackendUnavailableError(CrfRefineError):
    """The asked-for device or engine is not there; the message says what to install."""


class CapacityError(CrfRefineError):
    """The problem is larger than the algorithm or the memory can hold; the message has the numbers."""


class UnexpectedError(CrfRefineError):
    """A file made its reader raise what nobody had foreseen: a bug to be reported, which costs no more than the file's case."""
