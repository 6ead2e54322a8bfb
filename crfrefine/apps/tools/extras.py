"""Which packages crfrefine needs, which its extras bring, and which of them are installed: all from the metadata of its installation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

import crfrefine

PURPOSES = {
    "train": "train-crf, CrfRnn and crf_loss; letters beyond Latin in pictures",
    "cuda12": "--device cuda, for drivers of CUDA 12",
    "cuda13": "--device cuda, for drivers of CUDA 13",
    "report": "the slice viewer in the report of evaluate",
    "parquet": "tables of cases in Parquet (infer --manifest)",
    "monai": "the transforms CrfRefine and CrfRefined of crfrefine.monai",
    "distributed": "Dask clusters (--dask)",
    "dicom": "DICOM series and segmentations",
    "itk": "files of GIPL, VTK and MRC",
    "tune": "the page with sliders (crfrefine tune)",
}
"""What each extra is for. Which extras there are is in the metadata alone."""

_OWN_NAME = "crfrefine"


@dataclass(frozen=True)
class Package:
    """A package that crfrefine or an extra of it needs."""

    name: str  # As the package index has it.
    needs: str  # The versions that fit, such as ">=1.26".
    version: str | None  # The installed one; None: it is not installed.
    fits: bool  # Whether a version that fits is installed.

    @property
    def problem(self) -> str | None:
        """What is wrong, such as "numpy 1.24 is not >=1.26"; None: nothing."""
        if self.fits:
            return None
        return f"{self.name} is not installed" if self.version is None else f"{self.name} {self.version} is not {self.needs}"


@dataclass(frozen=True)
class Extra:
    """A group of optional packages."""

    name: str  # As in `pip install 'crfrefine[NAME]'`.
    purpose: str  # Its use; "" if this version does not know it.
    install: str  # The command that installs it.
    packages: tuple[Package, ...]  # What it brings.

    @property
    def is_complete(self) -> bool:
        """Whether all its packages are installed, in versions that fit."""
        return all(package.fits for package in self.packages)


@dataclass(frozen=True)
class Installation:
    """What the metadata says."""

    required: tuple[Package, ...] = ()  # Packages that crfrefine does not work without.
    extras: tuple[Extra, ...] = ()  # All but those that only gather others.
    problem: str | None = None  # Why the metadata cannot be relied on; None: it can.


def read_installation() -> Installation:
    """Return what the metadata of crfrefine's installation says, and what is installed."""
    package = Path(crfrefine.__file__).resolve().parent
    try:
        found = metadata.distribution(_OWN_NAME)
    except metadata.PackageNotFoundError:
        return Installation(problem=f"{package} is not installed, so that its packages and extras are not known: pip install it")
    required, extras = parse_requirements(found.requires or (), found.metadata.get_all("Provides-Extra") or (), installed_version)
    installed = Path(str(found.locate_file(_OWN_NAME))).resolve()
    problem = None
    if installed != package and installed.is_dir():  # An editable installation has no folder there.
        problem = f"Python runs {package}, but the packages and extras are those of {installed}, which is installed: run or install one"
    return Installation(required, extras, problem)


def installed_version(name: str) -> str | None:
    """Return the version of an installed package; None if there is none. The package is not imported."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def parse_requirements(
    lines: Iterable[str], extras: Iterable[str], version_of: Callable[[str], str | None]
) -> tuple[tuple[Package, ...], tuple[Extra, ...]]:
    """Return what is required, and the extras, of this Python on this system.

    Lines are as in the metadata, such as `torch>=2.4; extra == "train"`; those that are none are left out.
    """
    found = []
    for line in lines:
        try:
            found.append(Requirement(line))
        except InvalidRequirement:
            continue
    required = tuple(_package(item, version_of) for item in found if _applies(item, ""))
    groups = []
    for name in extras:
        items = [item for item in found if _applies(item, name) and not _applies(item, "")]
        packages = tuple(_package(item, version_of) for item in items if canonicalize_name(item.name) != _OWN_NAME)
        if packages:
            groups.append(Extra(name, PURPOSES.get(name, ""), f"pip install 'crfrefine[{name}]'", packages))
    return required, tuple(groups)


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _package(requirement: Requirement, version_of: Callable[[str], str | None]) -> Package:
    version = version_of(requirement.name)
    try:
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        fits = False
    return Package(requirement.name, str(requirement.specifier), version, fits)
