"""Work on all cases beside the page: saving them, and counting the changes by the CRF."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

import numpy as np

from crfrefine.base.limits import thread_pool
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
        self._pool = thread_pool(2, "all cases", gives_way=True)  # one to count, and one to save
        self._counting: Future[None] | None = None
        self._saving: Future[None] | None = None
        self._has_ended = False
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

    def save_all(self, save: Callable[[int], None]) -> None:
        """Begin to save all cases, each by its number."""

        def save_each() -> None:
            for number in range(len(self._inputs.cases)):
                if not self._has_ended:
                    save(number)

        self._saving = self._pool.submit(save_each)

    def count_changes(self, parameters: CrfParameters) -> None:
        """Begin to count the voxels that the CRF changes in each case with these parameters."""

        def count() -> None:
            with suppress(EndedError):
                for number, files in enumerate(self._inputs.cases):
                    self._give_way()
                    changed = None
                    with suppress(CrfRefineError):  # Opening the case shows the reason.
                        case = open_case(files, self._inputs.reading, self._options.threads)
                        refiner = CaseRefiner(case, self._options, keeps_kernels=False)
                        refined = refiner.refine(parameters, self._give_way).label_map
                        changed = int(np.count_nonzero(refined != case.network_labels))
                    self._num_changed[number] = changed

        if not self.is_counting:
            self._num_changed = {}
            self._counted = parameters
            self._counting = self._pool.submit(count)

    @property
    def is_busy(self) -> bool:
        """Whether a step of some work has not stopped yet."""
        return self.is_counting or self.is_saving

    def end(self) -> None:
        """Stop all work at its next step."""
        self._has_ended = True
        self._pool.shutdown(wait=False, cancel_futures=True)
