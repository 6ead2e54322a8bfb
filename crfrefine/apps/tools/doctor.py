"""What this machine offers to crfrefine, and what is missing for what.

Each fact comes from the module that uses it: a run sees the same. Nothing here raises: what does not work is a part of the answer.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import crfrefine
from crfrefine.apps.tools.extras import Installation, read_installation
from crfrefine.base.control_groups import read_text
from crfrefine.base.failures import describe_failure
from crfrefine.base.memory import memory_limit
from crfrefine.base.threads import thread_limit
from crfrefine.engines.compiled import ASKED_LEVEL, INSTALL_ALL_LEVELS, best_level, built_levels, processor_level
from crfrefine.errors import BackendUnavailableError

PROGRAMS = {
    "dcm2niix": "converts DICOM series that are not read",
    "gdcmconv": "decodes compressed DICOM files that pydicom does not",
    "mnc2nii": "converts MINC volumes",
}
"""Programs that messages advise to use; crfrefine runs none of them."""

_VARIABLES = "CRFREFINE_"
_LITTLE_SPACE = 1 << 30


@dataclass(frozen=True)
class Engine:
    """The CPU engine."""

    level: str | None = None  # The instruction set in use; None: it cannot be loaded.
    best_level: str | None = None  # The best one that is compiled and that this processor supports.
    processor_level: str | None = None  # The best one that this processor supports, compiled or not.
    levels: tuple[str, ...] = ()  # Those that are compiled.
    error: str | None = None  # Why it does not run; None: it does.
    traceback: str | None = None  # Of an unexpected error.


@dataclass(frozen=True)
class Gpu:
    """The GPUs."""

    is_there: bool  # Whether the system shows one.
    number: int = 0  # How many the driver shows, if they can be used.
    error: str | None = None  # Why `--device cuda` does not work; None: it does.
    properties: dict[str, Any] | None = None  # Of the first one; None if it cannot be used.


@dataclass(frozen=True)
class Space:
    """A folder for files."""

    folder: str | None  # Its path; None: there is none that can be written to.
    free: int | None  # Bytes; None: not known.


@dataclass(frozen=True)
class Report:
    """What was found. Sizes are in bytes."""

    version: str  # Of crfrefine.
    package: str  # Its folder.
    python: dict[str, str]  # Version, and the path of the interpreter.
    system: str  # Name and version.
    processor: str  # Its model, as far as the system tells.
    engine: Engine  # The CPU engine, after a run on a few voxels.
    cores: dict[str, Any]  # Those a run takes, where the limit comes from, and those of the machine.
    memory: dict[str, Any]  # What a run may take (None: no limit is known), and where the limit comes from.
    open_files: dict[str, int | None]  # The soft and the hard limit; None: none, or not known.
    temporary: Space  # The folder for temporary files, which train-crf uses for crops beyond 1 GiB.
    gpu: Gpu  # The GPUs, and whether the GPU engine can use the first one.
    installation: Installation  # Packages and extras.
    programs: dict[str, str | None]  # The path of each program that messages name; None: it is not there.
    environment: dict[str, str]  # The variables that change what crfrefine does.

    def to_do(self) -> list[str]:
        """Return what to correct; a feature whose extra is not installed is no fault."""
        found = []
        if self.engine.error is not None:
            found.append(self.engine.error)
        elif self.engine.level != self.engine.best_level:
            found.append(f"unset {ASKED_LEVEL}: the engine runs as {self.engine.level}, and {self.engine.best_level} is faster")
        if self.engine.best_level != self.engine.processor_level:
            found.append(
                f"the engine was compiled for {' and '.join(self.engine.levels)}, and this processor supports "
                f"{self.engine.processor_level}, which is faster: install crfrefine on this machine, or all levels: {INSTALL_ALL_LEVELS}"
            )
        if self.gpu.is_there and self.gpu.error is not None:
            found.append(self.gpu.error)
        for package in self.installation.required:
            if package.problem:
                found.append(f"{package.problem}: pip install '{package.name}{package.needs}'")
        for extra in self.installation.extras:
            found += [f"{old.problem}: {extra.install}" for old in extra.packages if old.version is not None and old.problem]
        if self.installation.problem:
            found.append(self.installation.problem)
        if self.temporary.folder is None:
            found.append("there is no folder for temporary files that can be written to: set TMPDIR to one")
        elif self.temporary.free is not None and self.temporary.free < _LITTLE_SPACE:
            found.append(f"{self.temporary.folder} has less than 1 GiB left, which train-crf may need: make room, or set TMPDIR to another")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        installation = asdict(self.installation)
        for extra, plain in zip(self.installation.extras, installation["extras"], strict=True):
            plain["is_complete"] = extra.is_complete
        return {"schema": 1, **asdict(self), "installation": installation, "to_do": self.to_do()}


def examine() -> Report:
    """Look at this machine, this process and this installation."""
    cores, memory = thread_limit(), memory_limit()
    return Report(
        version=crfrefine.__version__,
        package=str(Path(crfrefine.__file__).resolve().parent),
        python={"version": platform.python_version(), "path": sys.executable},
        system=platform.platform(),
        processor=_processor(),
        engine=_engine(),
        cores={"number": cores.number, "source": cores.source, "of_machine": os.cpu_count()},
        memory={"bytes": memory.bytes if memory.is_known else None, "source": memory.source},
        open_files=_open_files(),
        temporary=_temporary(),
        gpu=_gpu(),
        installation=read_installation(),
        programs={name: shutil.which(name) for name in PROGRAMS},
        environment={name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
    )


def _engine() -> Engine:
    found = Engine()
    try:
        from crfrefine.engines.cpu import CpuBackend

        found = Engine(None, best_level(), processor_level(), built_levels())
        found = replace(found, level=CpuBackend().level)
        _refine_few_voxels()
    except Exception as error:
        failure = describe_failure(error)
        message = f"a package cannot be imported ({error}); install it again" if isinstance(error, ImportError) else failure.message
        return replace(found, error=message, traceback=failure.traceback)
    return found


def _refine_few_voxels() -> None:
    """Refine an edge that the network has found: its label map stays."""
    import numpy as np

    from crfrefine.refinement.case import refine

    image = np.zeros((6, 5, 4), dtype=np.float32)
    image[3:] = 1.0
    logits = np.stack([1.0 - 2.0 * image, 2.0 * image - 1.0])
    result = refine(logits, image, spacing=(1.0, 1.25, 2.0), threads=1)
    if not np.array_equal(result.label_map, image):
        raise BackendUnavailableError("the compiled CPU engine computes wrong results here; reinstall crfrefine, or report it")


def _gpu() -> Gpu:
    is_there = False
    try:
        from crfrefine.engines.cuda.cupy_device import CupyDevice, may_have_gpu, num_driver_devices

        is_there = may_have_gpu()
        properties = CupyDevice().properties()
        return Gpu(is_there, num_driver_devices(), properties=properties)
    except Exception as error:
        return Gpu(is_there, error=describe_failure(error).message)


def _processor() -> str:
    lines = (line.partition(":") for line in read_text(Path("/proc/cpuinfo")).splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == "model name"), platform.processor() or platform.machine())


def _open_files() -> dict[str, int | None]:
    try:
        import resource
    except ImportError:  # Windows
        return {"soft": None, "hard": None}
    limits = zip(("soft", "hard"), resource.getrlimit(resource.RLIMIT_NOFILE), strict=True)
    return {name: None if limit == resource.RLIM_INFINITY else limit for name, limit in limits}


def _temporary() -> Space:
    try:
        folder = tempfile.gettempdir()
        return Space(folder, shutil.disk_usage(folder).free)
    except OSError:
        return Space(None, None)
