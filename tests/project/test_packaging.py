"""The installed wheel has what it needs and nothing else; a source tree without an engine takes the
installed one.
"""

import importlib.metadata
import importlib.resources
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import crfrefine

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(crfrefine.__file__).parent
GPU_SUFFIXES = {".h", ".cu"}  # of what the GPU's engine compiles at run time

installed_only = pytest.mark.skipif(
    not os.environ.get("CRFREFINE_TEST_INSTALLED"),
    reason="runs against the installed wheel: `make test` sets CRFREFINE_TEST_INSTALLED",
)


@installed_only
def test_the_tests_and_the_processes_that_they_start_meet_the_installed_package():
    """`python -m` and `python -c` would put the working folder, here the source tree, first;
    PYTHONSAFEPATH keeps it out.
    """
    assert "site-packages" in Path(crfrefine.__file__).parts
    code = "import crfrefine; print(crfrefine.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert Path(found) == Path(crfrefine.__file__)
    assert importlib.metadata.version("crfrefine") == crfrefine.__version__


@installed_only
def test_the_wheel_carries_its_data_and_the_pages_assets_and_nothing_else():
    package = Path(str(importlib.resources.files("crfrefine")))
    for folder, suffixes in (("configs", {".toml"}), ("kernels", GPU_SUFFIXES)):
        wanted = {
            p.relative_to(ROOT).as_posix()
            for p in (ROOT / folder).rglob("*")
            if p.suffix in suffixes and "cpu" not in p.parts
        }
        carried = {
            p.relative_to(package).as_posix() for p in (package / folder).rglob("*") if p.is_file()
        }
        assert carried == wanted
        assert wanted
        assert all((package / name).read_bytes() == (ROOT / name).read_bytes() for name in wanted)
    for room, some in {
        "evaluate/report": {"page.html", "report.css"},
        "tune": {"index.html", "tune.css", "tune.js"},
    }.items():
        wanted = {path.name for path in (ROOT / "crfrefine" / room / "assets").iterdir()}
        assert some <= wanted == {path.name for path in (package / room / "assets").iterdir()}
    files = importlib.metadata.files("crfrefine")
    assert files is not None
    outside = {
        f.parts[0]
        for f in files
        if f.parts[0] != "crfrefine"
        and not f.parts[0].endswith(".dist-info")
        and f.parts[0] != ".."
    }
    assert outside == set()
    suffixes = {
        f.suffix for f in files if f.parts[0] == "crfrefine" and "__pycache__" not in f.parts
    }
    assert suffixes <= GPU_SUFFIXES | {
        ".py",
        ".pyi",
        ".typed",
        ".so",
        ".toml",
        ".md",
        ".html",
        ".css",
        ".js",
        ".txt",
    }


def test_a_source_tree_takes_the_engine_of_the_same_package_installed(tmp_path):
    """Python started in a clone meets the source tree first. An engine with other arguments must
    not be called.
    """
    installed, clone, libraries = (tmp_path / name for name in ("site", "clone", "libraries"))
    shutil.copytree(PACKAGE, installed / "crfrefine")
    shutil.copytree(
        PACKAGE, clone / "crfrefine", ignore=shutil.ignore_patterns("_engine_*", "__pycache__")
    )
    libraries.mkdir()  # those of this environment, without the package that is installed in it
    for path in Path(np.__file__).parents[1].iterdir():
        if not path.name.lower().startswith("crfrefine"):
            (libraries / path.name).symlink_to(path)
    code = "import numpy as np, crfrefine as crf; x = np.arange(120.0).reshape(2, 5, 3, 4) % 7; "
    code += "print(crf.refine(x, x[0], spacing=1), crf.__file__)"
    environment = {**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{libraries}"}
    environment.pop("PYTHONSAFEPATH", None)
    options = {
        "cwd": clone,
        "env": environment,
        "capture_output": True,
        "text": True,
        "check": False,
    }
    done = subprocess.run([sys.executable, "-S", "-c", code], **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("<RefinementResult")
    assert str(clone) in done.stdout
    with (installed / "crfrefine" / "engines" / "cpu.py").open("a", encoding="utf-8") as adapter:
        adapter.write("# changed\n")
    done = subprocess.run([sys.executable, "-S", "-c", code], **options)
    assert (
        f"missing from {clone / 'crfrefine'}, and no installed package of this version has it; "
        "install crfrefine" in done.stderr
    )


def test_the_citation_has_the_packages_version():
    assert f"\nversion: {crfrefine.__version__}\n" in (ROOT / "CITATION.cff").read_text(
        encoding="utf-8"
    )
