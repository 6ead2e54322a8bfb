"""Install a wheel as users do and try it: `python packaging/try_wheel.py WHEEL PYTHON [--marginals FILE.npz] [--tests WORD ...]`.

The environment is empty, packages come as wheels, and no compiler is on the path. The engine must run at the best instruction level of
this processor. `--marginals` writes those of `wheel_marginals.py`. With `--emulate ROOT` another processor's wheel runs under qemu-user
with that processor's PYTHON in ROOT, a folder into which its system is unpacked; packages are installed by this Python's pip.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from build_wheels import LEVELS

PACKAGING = Path(__file__).resolve().parent
ROOT = PACKAGING.parent
TESTS = ("tests/engines/test_filters.py", "tests/engines/test_refinement.py", "tests/engines/test_engine_filters.py")
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc")


def without_compilers(folder: Path, first: Path) -> str:
    """A path with the environment's programs and those of the system that are no compilers."""
    folder.mkdir()
    for place in ("/usr/bin", "/bin"):
        for program in Path(place).iterdir():
            if not any(word in program.name for word in COMPILERS) and not (folder / program.name).is_symlink():
                (folder / program.name).symlink_to(program)
    return f"{first}{os.pathsep}{folder}"


# As /proc/cpuinfo names what x86-64-v3 and -v4 add; CMakeLists.txt compiles the engine for those.
AVX2_FLAGS = {"avx", "avx2", "fma", "f16c", "movbe", "bmi1", "bmi2", "abm"}
AVX512_FLAGS = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


class TrialError(Exception):
    """What a wheel does not do, or what is missing to try it."""


def level_of(cpuinfo: str) -> str:
    """Return the engine's best level for an x86-64 processor, from the text of /proc/cpuinfo: not by the engine's own rule."""
    flags = next((set(line.partition(":")[2].split()) for line in cpuinfo.splitlines() if line.startswith("flags")), set())
    if not flags >= AVX2_FLAGS:
        return "baseline"
    return "avx512" if flags >= AVX512_FLAGS else "avx2"


def expected_level(wheel: Path) -> str:
    """Only wheels for x86-64 have more than one engine."""
    return level_of(Path("/proc/cpuinfo").read_text(encoding="utf-8")) if wheel.stem.endswith("_x86_64") else "baseline"


def check_level(report: str, expected: str) -> None:
    """Raise TrialError unless the output of `doctor --json` says that the engine runs at this level."""
    level = json.loads(report)["engine"]["level"]
    if level != expected:
        raise TrialError(f"the engine runs as {level}; expected {expected} on this processor")
    print(f"the engine runs as {level}, as expected on this processor", flush=True)


@dataclass(frozen=True)
class Trial:
    """How programs run where a wheel is installed.

    Attributes:
        folder: where everything is.
        python: words that start Python.
        crfrefine: words that start the command.
        install: words that install packages; requirements follow.
        environment: variables of every program.
    """

    folder: Path
    python: list[object]
    crfrefine: list[object]
    install: list[object]
    environment: dict[str, str]

    def run(self, *words: object, cwd: Path | None = None, captured: bool = False) -> str:
        """Run a program; return what it prints if that is captured."""
        print("$", *[str(word).replace(str(self.folder), "…") for word in words], flush=True)
        wanted = [str(word) for word in words]
        pipe = subprocess.PIPE if captured else None
        done = subprocess.run(wanted, cwd=cwd or self.folder, env=self.environment, check=True, stdout=pipe, text=True)
        return done.stdout or ""


PIP = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--only-binary", ":all:")


def common_environment() -> dict[str, str]:
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "CRFREFINE_TEST_INSTALLED": "1"}
    environment.pop("PYTHONPATH", None)
    return environment


def in_an_environment(python: Path, folder: Path) -> Trial:
    """A new environment of this processor's Python."""
    programs = folder / "env" / "bin"
    environment = {**common_environment(), "PATH": without_compilers(folder / "path", programs)}
    inside = programs / "python"
    trial = Trial(folder, [inside], [programs / "crfrefine"], [inside, *PIP], environment)
    trial.run(python, "-m", "venv", folder / "env")
    return trial


def emulated(wheel: Path, python: Path, folder: Path, root: Path) -> Trial:
    """Another processor's Python, with packages in a folder: its own pip would start programs, which only the kernel could emulate.

    Raises:
        TrialError: there is no emulator, or no such Python.
    """
    arch = next((arch for arch in LEVELS if wheel.stem.endswith(f"_{arch}")), None)
    if arch is None:
        raise TrialError(f"expected a wheel for one of {', '.join(LEVELS)}")
    emulator = shutil.which(f"qemu-{arch}-static") or shutil.which(f"qemu-{arch}")
    if emulator is None:
        raise TrialError(f"qemu-{arch} is missing: install qemu-user")
    inside = root / python.relative_to("/")
    if not inside.is_file():
        raise TrialError(f"{root} has no {python}")
    start: list[object] = [emulator, "-L", root, inside]
    site = folder / "site"
    environment = {**common_environment(), "PATH": without_compilers(folder / "path", site / "bin"), "PYTHONPATH": str(site)}
    trial = Trial(folder, start, [*start, "-m", "crfrefine"], [], environment)
    code = "import platform, sys; print(*sys.version_info[:2], platform.libc_ver()[1].split('.')[1])"
    major, minor, glibc = trial.run(*start, "-c", code, captured=True).split()
    systems = [f"manylinux2014_{arch}", *(f"manylinux_2_{version}_{arch}" for version in range(17, int(glibc) + 1))]
    platforms = [word for system in systems for word in ("--platform", system)]
    target = ["--target", site, "--implementation", "cp", "--python-version", f"{major}.{minor}"]
    return replace(trial, install=[sys.executable, *PIP, *target, *platforms])


def try_wheel(trial: Trial, wheel: Path, marginals: Path | None, tests: list[str]) -> None:
    """Raises CalledProcessError where a step fails, whose output is on the terminal, and TrialError."""
    trial.run(*trial.install, wheel, *(["pytest", "hypothesis"] if tests else []))
    trial.run(*trial.crfrefine, "doctor")
    check_level(trial.run(*trial.crfrefine, "doctor", "--json", captured=True), expected_level(wheel))
    trial.run(*trial.crfrefine, "demo", "-o", trial.folder / "demo")
    if marginals is not None:
        trial.run(*trial.python, PACKAGING / "wheel_marginals.py", "write", marginals)
    if tests:
        trial.run(*trial.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(description="Install a wheel in an empty environment and try it.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("python", type=Path, help="with --emulate the path inside ROOT, such as /usr/bin/python3.13")
    parser.add_argument(
        "--emulate", type=Path, metavar="ROOT", help="folder of the system of the wheel's processor, which qemu-user emulates"
    )
    parser.add_argument("--marginals", type=Path, help="where to write the marginals of wheel_marginals.py")
    parser.add_argument(
        "--tests", nargs="*", default=list(TESTS), help="files of tests to run, or names of tests in them; none: leave them out"
    )
    options = parser.parse_args()
    marginals = options.marginals and options.marginals.absolute()
    root = options.emulate and options.emulate.absolute()
    wheel, python = options.wheel.absolute(), options.python.absolute()
    with tempfile.TemporaryDirectory() as folder:
        try:
            trial = in_an_environment(python, Path(folder)) if root is None else emulated(wheel, python, Path(folder), root)
            try_wheel(trial, wheel, marginals, options.tests)
        except subprocess.CalledProcessError as error:
            sys.exit(f"{options.wheel.name}: exit status {error.returncode}")
        except TrialError as problem:
            sys.exit(f"{options.wheel.name}: {problem}")
    print(f"ok: {options.wheel.name} with {options.python}")


if __name__ == "__main__":
    main()
