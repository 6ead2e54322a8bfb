"""The parameters that were chosen on the page, for the page as a whole and for single cases."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from crfrefine.base.text import printable
from crfrefine.errors import ConfigError, CrfRefineError
from crfrefine.io.writing import check_replaceable, write_small_file
from crfrefine.parameters.files import list_presets
from crfrefine.parameters.model import CrfParameters
from crfrefine.tune.corrections import Corrections
from crfrefine.tune.values import Json

# They stand among the presets: the parameters that the page was opened with, those of a case, and
# those that were chosen last.
AS_GIVEN = ""
OF_CASE = "case"
OF_PAGE = "page"

# What reading JSON raises that somebody has edited.
_DAMAGES = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def to_text(parameters: CrfParameters, case_id: str) -> str:
    """Return the text of a parameter file that says on which case it was chosen."""
    case = printable(case_id)
    return parameters.to_toml(f"Chosen by eye with crfrefine tune on case {case}; not validated.")


class ChosenParameters:
    """The choices on the page, in a file of the folder of corrections, and in its output.

    A case has the parameters that it was saved with, until others are chosen while it is open; one
    that was never saved has those of the page. Methods may be called from any thread.
    """

    def __init__(self, given: CrfParameters, output: Path | None) -> None:
        if output is not None:
            check_replaceable(output)
        self._given = given
        self.of_page = given  # those that were chosen last, for whichever case
        self._of_cases: dict[str, CrfParameters] = {}  # chosen since a case was saved
        self._case_id = ""  # on which the last ones were chosen; "" means that none were
        self._output = output
        self._folder: Path | None = None
        self._lock = threading.Lock()
        self.problem = ""  # why they cannot be written
        self._is_damaged = False  # whether the file cannot be read

    def keep_in(self, folder: Path) -> None:
        """Read earlier choices, unless the page is opened with others; write from now on.

        Choices in memory are written at once.
        """
        with self._lock:
            if self._folder is None or self._is_damaged:
                self._folder = folder
                self._read(folder / "page.json")
            if self._case_id:
                self._write()

    def _read(self, path: Path) -> None:
        """Read earlier choices, if any; a damaged file is reported, and stays as it is."""
        self.problem = ""
        self._is_damaged = False
        if not path.exists():
            return
        try:
            content = json.loads(path.read_bytes())
            given = CrfParameters.from_toml(content["given"])
            of_page = CrfParameters.from_toml(content["page"])
            of_cases = {}
            for case_id, text in content["cases"].items():
                of_cases[case_id] = CrfParameters.from_toml(text)
        except (*_DAMAGES, CrfRefineError) as error:
            self._is_damaged = True
            self.problem = f"{path}: cannot be read: {error}; move it away to begin anew"
            return
        if self._case_id:  # The present choice counts.
            return
        self._of_cases = of_cases
        if given == self._given:
            self.of_page = of_page

    def corrections_of(self, case_id: str) -> Corrections | None:
        """Return the files of a case; None without a folder."""
        return None if self._folder is None else Corrections.of_case(case_id, self._folder)

    def _saved(self, case_id: str) -> CrfParameters | None:
        """Return the parameters that a case was saved with; None means that it was not."""
        corrections = self.corrections_of(case_id)
        return None if corrections is None else corrections.read_parameters()

    def last(self, case_id: str) -> CrfParameters:
        """Return the parameters that were chosen last for a case, or else for the page."""
        return self._of_cases.get(case_id) or self.of_page

    def of_case(self, case_id: str) -> CrfParameters:
        """Return the parameters of a case."""
        return self._of_cases.get(case_id) or self._saved(case_id) or self.of_page

    def resolve(self, case_id: str, preset: str, changes: Json) -> CrfParameters:
        """Return the parameters of a preset with changed entries; raise ConfigError for others."""
        if preset == OF_CASE:
            parameters = self.of_case(case_id)
        elif preset == OF_PAGE:
            parameters = self.of_page
        elif preset == AS_GIVEN:
            parameters = self._given
        elif preset in list_presets():
            parameters = CrfParameters.load(preset)
        else:
            raise ConfigError(f"{preset}: no such preset")
        return parameters.replace(**changes)

    def choose(self, case_id: str, preset: str, changes: Json) -> CrfParameters:
        """Take parameters, as of `resolve`, for a case, and for the page; return them.

        If the case has them already, nothing is taken.
        """
        parameters = self.resolve(case_id, preset, changes)
        if parameters == self.of_case(case_id):
            return parameters
        with self._lock:
            self.of_page = parameters
            if self._saved(case_id) is not None:
                self._of_cases[case_id] = parameters
            self._case_id = case_id
            self._write()
        return parameters

    def note_saved(self, case_id: str) -> None:
        """Forget the choice for a case, which is saved with it."""
        with self._lock:
            if self._of_cases.pop(case_id, None) is not None:
                self._write()

    def write_again(self) -> None:
        """Write what could not be written."""
        with self._lock:
            if self.problem:
                self._write()

    def _write(self) -> None:
        """Write the files; on a full disk, the parameters stay in memory until it can be done."""
        if not self._is_damaged:
            self.problem = ""
        try:
            if self._folder is not None and not self._is_damaged:
                content = {
                    "given": self._given.to_toml(),
                    "page": self.of_page.to_toml(),
                    "cases": {name: one.to_toml() for name, one in self._of_cases.items()},
                }
                write_small_file(self._folder / "page.json", json.dumps(content).encode())
            if self._output is not None and self._case_id:
                text = to_text(self.of_page, self._case_id)
                write_small_file(self._output, text.encode())
        except CrfRefineError as error:
            self.problem = str(error)
