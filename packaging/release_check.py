"""What a release needs, a line per check: `make release-check`, which gives it an environment with build, twine and cffconvert.

`release_check.py TOOLS [--only NAME ...]`, where TOOLS is the Python of that environment. It writes to `build/release` alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "build" / "release"
NEXT = "make test STRICT=ON, then make test-sanitizers test-faults"

DATA_SUFFIXES = {
    ".nii",
    ".gz",
    ".npz",
    ".npy",
    ".mha",
    ".mhd",
    ".raw",
    ".zraw",
    ".nrrd",
    ".nhdr",
    ".mgz",
    ".mgh",
    ".dcm",
    ".img",
    ".hdr",
    ".pt",
    ".pth",
}
WHEEL_SUFFIXES = {".py", ".typed", ".so", ".toml", ".md", ".html", ".css", ".js", ".txt", ".cpp", ".h", ".cu"}


class ReleaseError(Exception):
    """What is missing for a release, with what to do."""


def package_version() -> str:
    return re.findall(r'^__version__ = "(.+)"$', (ROOT / "crfrefine" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)[0]


def run(*words: object) -> str:
    """Run a program in the repository; raise ReleaseError with the end of what it says if it fails."""
    done = subprocess.run([str(word) for word in words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise ReleaseError(" / ".join(said[-4:]) or f"{words[0]} failed")
    return done.stdout


# ---- Checks: each returns what it found, or raises ReleaseError


def check_tree(tools: Path) -> str:
    changed = run("git", "status", "--porcelain").splitlines()
    if changed:
        raise ReleaseError(f"{len(changed)} files are not committed: {', '.join(line[3:] for line in changed[:3])}")
    return f"clean, at {run('git', 'rev-parse', '--short', 'HEAD').strip()}"


def check_version(tools: Path) -> str:
    version = package_version()
    cited = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    if cited != [version]:
        raise ReleaseError(f"the package is {version}, CITATION.cff says {', '.join(cited) or 'nothing'}")
    if run("git", "tag", "--list", version, f"v{version}").strip():
        raise ReleaseError(f"there is a tag of {version} already; raise the version in crfrefine/__init__.py and CITATION.cff")
    return version


def check_changelog(tools: Path) -> str:
    return dated_section((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), package_version())


def dated_section(changelog: str, version: str) -> str:
    """Return the heading of a version's section, which is the first one; raise ReleaseError unless it has a date and says something."""
    found = re.search(r"^## (\[(.+?)\](.*))\n((?:(?!^## ).*\n?)*)", changelog, re.MULTILINE)
    if found is None or found[2] != version:
        raise ReleaseError(f"the first section of CHANGELOG.md is {found[1] if found else 'missing'}; expected one of {version}")
    if not re.fullmatch(r" - \d{4}-\d{2}-\d{2}", found[3]):
        raise ReleaseError(f"CHANGELOG.md has {found[1]!r}; expected '[{version}] - YYYY-MM-DD', the day of the release")
    if not re.search(r"^- ", found[4], re.MULTILINE):
        raise ReleaseError(f"CHANGELOG.md says nothing about {version}")
    return found[1]


def check_tables(tools: Path) -> str:
    """Other tables come from studies, whose records are too large to be committed."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import layer_tables
    import report

    page = (ROOT / "docs" / "reference" / "benchmarks.md").read_text(encoding="utf-8")
    for name, tables, file in (("benchmarks", report.tables, "benchmarks.json"), ("layer", layer_tables.tables, "layer_benchmarks.json")):
        records = json.loads((ROOT / "docs" / "reference" / file).read_text(encoding="utf-8"))
        shown = page.partition(f"<!-- {name}:begin -->")[2].partition(f"<!-- {name}:end -->")[0]
        if shown.strip() != tables(records).strip():
            raise ReleaseError(
                f"docs/reference/benchmarks.md, part {name}: not what {file} says; write it again with make bench or make bench-layer"
            )
    return "docs/reference/benchmarks.md is what its two records say"


def check_citation(tools: Path) -> str:
    return run(tools.with_name("cffconvert"), "--validate", "-i", "CITATION.cff").strip().splitlines()[-1]


def check_build(tools: Path) -> str:
    shutil.rmtree(TARGET, ignore_errors=True)
    run(tools, "-m", "build", "--outdir", TARGET, ROOT)  # the wheel from the source distribution, as users build it
    return ", ".join(f"{path.name} ({path.stat().st_size / 1e6:.1f} MB)" for path in sorted(TARGET.iterdir()))


def check_twine(tools: Path) -> str:
    """Metadata, and whether the README renders."""
    run(tools, "-m", "twine", "check", "--strict", *sorted(TARGET.iterdir()))
    return "the metadata are valid, and README.md renders"


def check_wheel(tools: Path) -> str:
    wheel = only_file("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    if problem := wheel_problem(names):
        raise ReleaseError(f"{wheel.name}: {problem}")
    return f"{len(names)} files, with license, no data; of this system alone: for others `make wheels`"


def check_wheels(tools: Path) -> str:
    """Those of `make wheels`, which checks what is in each of them."""
    names = [path.name for path in (ROOT / "build" / "manylinux" / "dist").glob("*.whl")]
    if missing := missing_wheels(names, package_version()):
        raise ReleaseError(f"build/manylinux/dist lacks {', '.join(missing)}; run make wheels")
    return f"{len(names)} manylinux wheels in build/manylinux/dist"


def missing_wheels(names: list[str], version: str) -> list[str]:
    """Return the kinds of wheels of a version, Pythons and processors, that are not among these files."""
    kinds = [(python, arch) for python in ("cp311-cp311", "cp312-abi3") for arch in ("x86_64", "aarch64")]
    return [
        f"{python} for {arch}"
        for python, arch in kinds
        if not any(name.startswith(f"crfrefine-{version}-{python}-manylinux") and name.endswith(f"_{arch}.whl") for name in names)
    ]


def check_sdist(tools: Path) -> str:
    archive = only_file("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = [str(PurePosixPath(*PurePosixPath(item.name).parts[1:])) for item in opened.getmembers() if item.isfile()]
    if problem := sdist_problem(names):
        raise ReleaseError(f"{archive.name}: {problem}")
    return f"{len(names)} files, with license, no data"


def only_file(pattern: str) -> Path:
    found = list(TARGET.glob(pattern))
    if len(found) != 1:
        raise ReleaseError(f"expected one file {pattern} in build/release, found {len(found)}")
    return found[0]


def data_among(names: Iterable[str]) -> list[str]:
    return [name for name in names if DATA_SUFFIXES & set(PurePosixPath(name).suffixes)]


def wheel_problem(names: list[str], levels: Iterable[str] = ("baseline",)) -> str | None:
    """Return what is wrong with the names of a wheel's files, or None. levels: instruction sets whose engines it must have."""
    paths = [PurePosixPath(name) for name in names]
    info = next((path.parts[0] for path in paths if path.parts[0].endswith(".dist-info")), "")
    strange = [str(path) for path in paths if path.parts[0] not in ("crfrefine", info)]
    strange += [str(path) for path in paths if path.parts[0] == "crfrefine" and path.suffix not in WHEEL_SUFFIXES]
    strange += data_among(names) + [str(path) for path in paths if "tests" in path.parts]
    if strange:
        return f"{len(strange)} files that do not belong there: {', '.join(strange[:3])}"
    wanted = (
        f"{info}/licenses/LICENSE",
        "crfrefine/pages/report/assets/page.html",
        "crfrefine/py.typed",
        "crfrefine/configs/default.toml",
    )
    if missing := [name for name in wanted if name not in names]:
        return f"lacks {', '.join(missing)}"
    if without := [level for level in levels if not any(re.match(rf"crfrefine/_engine_{level}\..*so$", name) for name in names)]:
        return f"has no compiled engine for {', '.join(without)}"
    return None


def sdist_problem(names: list[str]) -> str | None:
    """Return what is wrong with the names of a source distribution's files, or None."""
    if strange := data_among(names) + [name for name in names if name.endswith(".so") or name.startswith((".ci/", ".github/"))]:
        return f"{len(strange)} files that do not belong there: {', '.join(strange[:3])}"
    wanted = ("LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CMakeLists.txt", "pyproject.toml", "kernels/cpu/module.cpp")
    missing = [name for name in wanted if name not in names]
    return f"lacks {', '.join(missing)}" if missing else None


CHECKS: dict[str, Callable[[Path], str]] = {
    "tree": check_tree,
    "version": check_version,
    "changelog": check_changelog,
    "tables": check_tables,
    "citation": check_citation,
    "build": check_build,
    "twine": check_twine,
    "wheel": check_wheel,
    "sdist": check_sdist,
    "wheels": check_wheels,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Check what a release needs.")
    parser.add_argument("tools", type=Path, help="Python of an environment with build, twine and cffconvert")
    parser.add_argument(
        "--only", nargs="+", choices=list(CHECKS), default=list(CHECKS), metavar="CHECK", help=f"some of: {', '.join(CHECKS)}"
    )
    options = parser.parse_args()
    # Python's own bytecode in the source tree is no part of a release.
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    failed = 0
    for name in options.only:
        try:
            print(f"ok    {name:<9}  {CHECKS[name](options.tools.absolute())}", flush=True)
        except ReleaseError as problem:
            failed += 1
            print(f"FAIL  {name:<9}  {problem}", flush=True)
    print(f"{failed} of {len(options.only)} checks failed" if failed else f"next: {NEXT}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
