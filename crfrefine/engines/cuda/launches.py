"""Launches of kernels: run at once, or recorded and run again and again."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Arguments = dict[str, Any]  # of a kernel, by the names of its parameters
Launch = Callable[[], None]  # runs a kernel with the arguments that it was given

_MAX_CASES = 64  # sizes of lattices whose vertices are remembered


class Launcher(ABC):
    """What launches kernels, in the order of the calls.

    Attributes:
        num_vertices: those of the newest lattice for a number of points and the widths of its keys'
            fields, or an estimate, which tell how large the hash table of the next one should be.
    """

    def __init__(self) -> None:
        self.num_vertices: dict[tuple[int, tuple[int, ...]], float] = {}
        self._thread = threading.local()  # `recorded`: the list of a thread that records

    def remember_vertices(self, case: tuple[int, tuple[int, ...]], num_vertices: float) -> None:
        """Keep a number in `num_vertices`, and no more of them than _MAX_CASES."""
        if len(self.num_vertices) >= _MAX_CASES:
            self.num_vertices.clear()
        self.num_vertices[case] = num_vertices

    def launch(
        self,
        source: str,
        kernel: str,
        constants: Mapping[str, int],
        num_items: int,
        /,
        **arguments: Any,
    ) -> None:
        """Run a kernel of kernels/cuda/<source>.cu with its arguments by their names.

        The items are threads; at least so many run. For a kernel whose threads share
        memory they are blocks, of constants["CRF_THREADS"] threads each. An argument that is None
        becomes a null pointer. Raises TypeError if one is missing, or if the kernel has no argument
        of that name, or another type.
        """
        if num_items == 0:
            return
        launch = self.pack(source, kernel, constants, num_items, arguments)
        recorded = getattr(self._thread, "recorded", None)
        if recorded is None:
            launch()
        else:
            recorded.append(launch)

    @contextmanager
    def recording(self) -> Iterator[list[Launch]]:
        """Record this thread's launches instead of running them.

        The launches, in order, may be run any number of times. Each packs its arguments only now,
        and keeps its arrays, which are read and written when it runs.
        """
        launches: list[Launch] = []
        self._thread.recorded = launches
        try:
            yield launches
        finally:
            self._thread.recorded = None

    @abstractmethod
    def pack(
        self,
        source: str,
        kernel: str,
        constants: Mapping[str, int],
        num_items: int,
        arguments: Mapping[str, Any],
    ) -> Launch:
        """Check and pack the arguments of a launch; see `launch`."""
