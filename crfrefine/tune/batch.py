"""Work on all cases beside the page: saving them, and counting the changes by the CRF."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

import numpy as np

from crfrefine.base.limits import thread_pool
from crfrefine.cases.case_files import CaseFiles
from crfrefine.errors import CrfRefineError
from crfrefine.infer.inputs import RunInputs
from crfrefine.infer.options import InferenceOptions
from crfrefine.parameters.model import CrfParameters
from crfrefine.tune.case import CaseRefiner, open_case
from crfrefine.tune.opened import EndedError
from crfrefine.tune.values import Json


class Batch:
    """Work on all cases, in threads that give way to the page.

    `give_way` is called at each step; it may wait, and raises EndedError to stop. Methods may be
    called from any thread.
    """

    def __init__(
        self, inputs: RunInputs, options: InferenceOptions, give_way: Callable[..., None]
    ) -> None:
        self._inputs = inputs
        self._options = options
        self._give_way = give_way
        self._counter = thread_pool(1, "count changes", gives_way=True)
        self._saver = thread_pool(1, "save all", gives_way=True)
        self._counting: Future[None] | None = None
        self._saving: Future[None] | None = None
        self._has_ended = False
        self.refused: dict[int, str] = {}  # why cases could not be saved
        # The voxels that the CRF changes, by the number of the case; None means that it failed.
        self._num_changed: dict[int, int | None] = {}
        self._counted: CrfParameters | None = None  # the parameters of these counts

    @property
    def is_counting(self) -> bool:
        """Whether changes are being counted."""
        return self._counting is not None and not self._counting.done()

    @property
    def is_saving(self) -> bool:
        """Whether cases are being saved."""
        return self._saving is not None and not self._saving.done()

    def describe(self, number: int, parameters: CrfParameters) -> Json:
        """Return whether the changes of a case are counted, and their number.

        It is that with these parameters, not with others.
        """
        is_counted = number in self._num_changed and parameters == self._counted
        changed = self._num_changed[number] if is_counted else None
        return {"is_counted": is_counted, "changed": changed}

    def save_all(self, is_open: Callable[[int], bool], save: Callable[[int], object]) -> None:
        """Begin to save each case that is open to be saved when its turn comes, unless one does."""

        def save_open() -> None:
            for number, files in enumerate(self._inputs.cases):
                if self._has_ended:
                    return
                if not is_open(number):
                    continue
                try:
                    save(number)
                except CrfRefineError as error:
                    self.refused[number] = f"{files.case_id}: {error}\n"

        if not self.is_saving:
            self.refused = {}
            self._saving = self._saver.submit(save_open)

    def count_changes(self, parameters: CrfParameters) -> None:
        """Begin to count the voxels that the CRF changes in each case with these parameters."""

        def count() -> None:
            with suppress(EndedError):
                for number, files in enumerate(self._inputs.cases):
                    self._num_changed[number] = self._count_changed(files, parameters)

        if not self.is_counting:
            self._num_changed = {}
            self._counted = parameters
            self._counting = self._counter.submit(count)

    def _count_changed(self, files: CaseFiles, parameters: CrfParameters) -> int | None:
        self._give_way()
        try:
            case = open_case(files, self._inputs.reading, self._options.threads)
            refiner = CaseRefiner(case, self._options, keeps_kernels=False)
            result = refiner.refine(parameters, self._give_way)
        except CrfRefineError:  # Opening the case shows the reason.
            return None
        return int(np.count_nonzero(result.label_map != case.network_labels))

    @property
    def is_busy(self) -> bool:
        """Whether a step of some work has not stopped yet."""
        return self.is_counting or self.is_saving

    def end(self) -> None:
        """Stop all work at its next step."""
        self._has_ended = True
        for pool in (self._counter, self._saver):
            pool.shutdown(wait=False, cancel_futures=True)
