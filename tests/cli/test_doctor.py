"""`doctor` tells what runs see: limits, engine, GPU, packages and extras; its exit status says whether the engine runs."""

import json
import os
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from cli_helpers import run_here, run_process

import crfrefine
from crfrefine.apps.tools import extras
from crfrefine.apps.tools.doctor import Engine, Gpu, Space, examine
from crfrefine.apps.tools.extras import PURPOSES, Installation, Package, parse_requirements
from crfrefine.base.memory import memory_limit
from crfrefine.base.threads import available_threads
from crfrefine.engines import get_backend
from crfrefine.engines.compiled import best_level, built_levels, processor_level
from crfrefine.engines.cuda.cupy_device import is_available
from crfrefine.errors import BackendUnavailableError

ROOT = Path(__file__).resolve().parents[2]
ENGINE = Engine("avx2", "avx2", "avx2", ("baseline", "avx2"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def metadata_lines():
    optional = PROJECT["optional-dependencies"].items()
    return PROJECT["dependencies"] + [f'{line}; extra == "{extra}"' for extra, lines in optional for line in lines]


@pytest.fixture(scope="module")
def report():
    return examine()


def test_the_facts_are_those_that_runs_see(report):
    assert report.version == crfrefine.__version__
    assert Path(report.package) == Path(crfrefine.__file__).resolve().parent
    assert report.engine == Engine(get_backend("cpu").level, best_level(), processor_level(), built_levels())
    assert report.cores["number"] == available_threads()
    assert report.memory["source"] == memory_limit().source
    assert report.memory["bytes"] == pytest.approx(memory_limit().bytes, rel=0.5)  # Others use memory meanwhile.
    if not is_available():
        with pytest.raises(BackendUnavailableError) as caught:
            get_backend("cuda")
        assert (report.gpu.error, report.gpu.properties) == (str(caught.value), None)


def test_it_prints_a_line_per_fact_and_per_extra_or_all_as_json(report):
    done = run_here("doctor", status=0)
    names = [line[2:13].strip() for line in done.stdout.splitlines() if line.startswith("  ")]
    assert {"package", "Python", "engine", "cores", "memory", "open files", "GPU", "numpy", "train"} <= set(names)
    assert done.stdout.startswith(f"crfrefine {crfrefine.__version__}\n")
    assert "\nto do" in done.stdout
    done = run_here("doctor", "--json", status=0)
    found = json.loads(done.stdout)
    assert found["schema"] == 1
    assert found.keys() == report.to_dict().keys()
    assert {extra["name"] for extra in found["installation"]["extras"]} <= PURPOSES.keys()


def test_an_engine_that_cannot_run_is_a_failure_with_the_whole_report():
    done = run_process("doctor", "--json", env={**os.environ, "CRFREFINE_CPU_LEVEL": "sse\x1b[2"}, status=1)
    assert "Traceback" not in done.stderr
    assert "expected one of baseline, avx2, avx512" in done.stdout
    assert "\x1b" not in done.stdout
    assert "numpy" in done.stdout


def test_a_broken_numpy_is_a_finding_and_no_crash(tmp_path):
    (tmp_path / "numpy.py").write_text("raise ImportError('libgfortran.so.5: cannot open shared object file')\n", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(Path(crfrefine.__file__).parents[1])])
    done = run_process("doctor", "-v", env={**os.environ, "PYTHONPATH": path}, status=1)
    assert "a package cannot be imported" in done.stdout.partition("to do")[2]
    assert "libgfortran.so.5" in done.stdout.partition("to do")[2]
    assert "Traceback" in done.stderr


def test_what_is_in_order_needs_nothing(report):
    sound = replace(report, installation=Installation(), engine=ENGINE, gpu=Gpu(False, error="no GPU"))
    sound = replace(sound, temporary=Space("/tmp", 5 << 30))
    assert sound.to_do() == []
    assert len(replace(sound, gpu=Gpu(True, error="CuPy is missing")).to_do()) == 1
    (slower,) = replace(sound, engine=replace(ENGINE, level="baseline")).to_do()
    assert "unset CRFREFINE_CPU_LEVEL" in slower
    (missing,) = replace(sound, engine=replace(ENGINE, processor_level="avx512")).to_do()
    assert missing.startswith("the engine was compiled for baseline and avx2, and this processor supports avx512")
    assert "CRFREFINE_LEVELS=all" in missing
    assert "TMPDIR" in replace(sound, temporary=Space(None, None)).to_do()[0]
    assert "TMPDIR" in replace(sound, temporary=Space("/tmp", 5 << 20)).to_do()[0]
    old = Installation((Package("numpy", ">=1.26", "1.24.1", False), Package("isal", ">=1.6", None, False)))
    assert replace(sound, installation=old).to_do() == [
        "numpy 1.24.1 is not >=1.26: pip install 'numpy>=1.26'",
        "isal is not installed: pip install 'isal>=1.6'",
    ]


# ---- Extras


def test_every_extra_has_a_purpose_and_a_command_and_versions_are_compared():
    versions = {"numpy": "1.26.0rc1", "torch": "2.13.0+cpu", "matplotlib": "3.11.2", "pydicom": "2.4.4"}
    required, groups = parse_requirements(metadata_lines(), PROJECT["optional-dependencies"], versions.get)
    assert {group.name: group.purpose for group in groups} == PURPOSES, "`all` gathers others and is left out"
    assert all(group.install == f"pip install 'crfrefine[{group.name}]'" for group in groups)
    assert len(required) == len(PROJECT["dependencies"])
    numpy = next(package for package in required if package.name == "numpy")
    assert numpy.problem == "numpy 1.26.0rc1 is not >=1.26"
    found = {group.name: group for group in groups}
    assert found["train"].is_complete
    assert [package.problem for package in found["dicom"].packages] == ["pydicom 2.4.4 is not >=3.0.1", "highdicom is not installed"]


def test_an_old_package_of_an_extra_is_to_be_updated_and_a_missing_one_is_not_missed(report):
    versions = {"pydicom": "2.4.4"}
    _, groups = parse_requirements(metadata_lines(), PROJECT["optional-dependencies"], versions.get)
    todo = replace(report, installation=Installation(extras=groups), engine=ENGINE, gpu=Gpu(False)).to_do()
    assert todo == ["pydicom 2.4.4 is not >=3.0.1: pip install 'crfrefine[dicom]'"]


def test_metadata_of_another_package_is_a_problem(tmp_path, monkeypatch):
    """Python started in a clone runs the clone; the installed package may be an older one."""
    (tmp_path / "crfrefine").mkdir()
    folder = tmp_path / "crfrefine-0.0.9.dist-info"
    folder.mkdir()
    text = "Metadata-Version: 2.1\nName: crfrefine\nVersion: 0.0.9\nRequires-Dist: numpy>=1.26\nProvides-Extra: train\n"
    (folder / "METADATA").write_text(text + 'Requires-Dist: torch>=2.4; extra == "train"\n', encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    found = extras.read_installation()
    assert [extra.name for extra in found.extras] == ["train"]
    assert str(tmp_path / "crfrefine") in found.problem
    (tmp_path / "crfrefine").rmdir()  # as of an editable installation
    assert extras.read_installation().problem is None
