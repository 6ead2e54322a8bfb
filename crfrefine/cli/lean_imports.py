"""Keep nibabel from importing pydicom, which takes 0.2 s of every command where it is installed.

nibabel needs it for a kind of extension of NIfTI headers that no command looks at. Only the commands do this: in a user's own program,
nibabel is as it always is.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

_ASKS = "nibabel.nifti1"
_OPTIONAL = "pydicom"


class _Hiding(MetaPathFinder):
    """Says once that there is no pydicom: to the module of nibabel that has just been looked for, in the same thread."""

    def __init__(self) -> None:
        self._thread: int | None = None

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Find nothing, so that the next finder is asked.

        Raises:
            ModuleNotFoundError: nibabel asks for pydicom.
        """
        if fullname == _ASKS:
            self._thread = threading.get_ident()
        elif fullname == _OPTIONAL and self._thread == threading.get_ident():
            self._thread = None
            raise ModuleNotFoundError(f"{_OPTIONAL} is left out at the start of a command", name=_OPTIONAL)


def leave_out_pydicom() -> None:
    """Hide pydicom from nibabel, from now on; it is there for whoever imports it afterwards."""
    sys.meta_path.insert(0, _Hiding())
