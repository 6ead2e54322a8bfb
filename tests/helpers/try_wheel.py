"""Install a wheel as users do and try it: `python tests/helpers/try_wheel.py WHEEL PYTHON [--marginals FILE.npz] [--tests FILE ...]`.

The environment is empty, packages come as wheels, and no compiler is on the path. `--marginals` writes those of `wheel_marginals.py`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HELPERS = Path(__file__).resolve().parent
ROOT = HELPERS.parents[1]
TESTS = ("tests/engines/test_filters.py", "tests/engines/test_refinement.py", "tests/engines/test_lattice_passes.py")
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc")


def without_compilers(folder: Path, first: Path) -> str:
    """A path with the environment's programs and those of the system that are no compilers."""
    folder.mkdir()
    for place in ("/usr/bin", "/bin"):
        for program in Path(place).iterdir():
            if not any(word in program.name for word in COMPILERS) and not (folder / program.name).is_symlink():
                (folder / program.name).symlink_to(program)
    return f"{first}{os.pathsep}{folder}"


def try_wheel(wheel: Path, python: Path, folder: Path, marginals: Path | None, tests: list[str]) -> None:
    """Raises CalledProcessError where a step fails; its output is on the terminal."""
    programs = folder / "env" / "bin"
    environment = {
        **os.environ,
        "PATH": without_compilers(folder / "path", programs),
        "PYTHONSAFEPATH": "1",
        "CRFREFINE_TEST_INSTALLED": "1",
    }
    environment.pop("PYTHONPATH", None)

    def run(*words: object, cwd: Path = folder) -> None:
        print("$", *[str(word).replace(str(folder), "…") for word in words], flush=True)
        subprocess.run([str(word) for word in words], cwd=cwd, env=environment, check=True)

    run(python, "-m", "venv", folder / "env")
    install = (programs / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--only-binary", ":all:")
    run(*install, wheel)
    run(programs / "crfrefine", "doctor")
    run(programs / "crfrefine", "demo", "-o", folder / "demo")
    if marginals is not None:
        run(programs / "python", HELPERS / "wheel_marginals.py", "write", marginals)
    if tests:
        run(*install, "pytest", "hypothesis")
        run(programs / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(description="Install a wheel in an empty environment and try it.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("python", type=Path)
    parser.add_argument("--marginals", type=Path, help="where to write the marginals of wheel_marginals.py")
    parser.add_argument("--tests", nargs="*", default=list(TESTS), help="files of tests to run; none: leave them out")
    options = parser.parse_args()
    marginals = options.marginals and options.marginals.absolute()
    with tempfile.TemporaryDirectory() as folder:
        try:
            try_wheel(options.wheel.absolute(), options.python.absolute(), Path(folder), marginals, options.tests)
        except subprocess.CalledProcessError as error:
            sys.exit(f"{options.wheel.name}: exit status {error.returncode}")
    print(f"ok: {options.wheel.name} with {options.python}")


if __name__ == "__main__":
    main()
