"""Which module may import which: downward only, and each heavy or optional library in one place."""

import ast
import graphlib
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from oracles import random_case

import crfrefine
from crfrefine.demo.phantom import make_phantom, write_phantom

PACKAGE = Path(crfrefine.__file__).parent

# Rooms from the bottom up: each imports from itself and from lines above its own, nothing else.
LAYERS = """
errors version
base
io
parameters
arrays
engines metrics
refinement statistics
layer monai cases
filters pictures records demo info
infer
convert tune evaluate nnunet train
cli
__main__
"""
LEVEL = {name: level for level, names in enumerate(LAYERS.split("\n")) for name in names.split()}

# Library -> the only places that may import it; places are modules or folders of the package.
HOMES = {
    "SimpleITK": set(),  # in a process of its own (io.itk): its readers crash on hostile headers
    "psutil": {"base.limits"},
    "nibabel": {"io"},
    "pydicom": {"io.dicom"},
    "highdicom": {"io.dicom"},
    "rich": {"cli"},
    "typer": {"cli"},
    "cupy": {"engines.cuda"},
    "jinja2": {"evaluate.report"},
    "matplotlib": {"evaluate.report"},
    "distributed": {"infer.cluster"},
    "PIL": {"pictures"},
    "monai": {"monai"},
    "starlette": {"tune.server"},
    "uvicorn": {"tune.server"},
    "torch": {"engines.torch", "layer", "monai", "train"},
}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree):
    """Every import of a file, also those inside functions and under TYPE_CHECKING: they are
    dependencies all the same.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide the layer"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def broken_rules(path):
    module = module_name(path)
    source = path.read_text(encoding="utf-8")
    own = module.partition(".")[0]
    found = []
    for line, imported in imported_modules(ast.parse(source)):
        library, _, inner = imported.partition(".")
        if library in HOMES and not any(
            module == home or module.startswith(home + ".") for home in HOMES[library]
        ):
            found.append(f"line {line}: {module} imports {imported}")
        other = inner.partition(".")[0]
        # The package's __init__ gathers names from any layer. No room takes them from there.
        if library != "crfrefine" or not own or other == own:
            continue
        if other not in LEVEL or LEVEL[other] >= LEVEL[own]:
            found.append(f"line {line}: {own} imports {imported}")
    if own != "cli" and re.search(r"^\s*print\(", source, re.MULTILINE):
        found.append(f"{module} prints")
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def test_imports_go_downward_and_libraries_stay_at_home():
    found = {path.relative_to(PACKAGE).as_posix(): broken_rules(path) for path in FILES}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_the_map_shows_the_rooms():
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    map_of_package = text.split("```\ncrfrefine/\n")[1].split("\nconfigs/")[0]
    shown = re.findall(r"^  (\w+)/? ", map_of_package, re.MULTILINE)
    assert sorted(shown) == sorted(LEVEL.keys() - {"__main__"})


def test_no_module_imports_itself_through_others():
    """Neither inside a room nor across; what only type checkers see counts too."""
    modules = {
        f"crfrefine.{module_name(path)}".rstrip("."): path.read_text(encoding="utf-8")
        for path in FILES
    }
    imports = {}
    for module, source in modules.items():
        names = {name for _, name in imported_modules(ast.parse(source))}
        imports[module] = {
            name if name in modules else name.rpartition(".")[0] for name in names
        } & set(modules) - {module, "crfrefine"}
    del imports["crfrefine"]  # It names what is public, anywhere.
    assert len(list(graphlib.TopologicalSorter(imports).static_order())) == len(modules) - 1


def test_neither_importing_the_package_nor_a_whole_run_imports_torch_or_cupy(tmp_path):
    """Those raise here what no import guard catches, so that even a tried import is seen. The demo
    refines as `infer` does.
    """
    for library in ("torch", "monai", "cupy"):
        (tmp_path / f"{library}.py").write_text(
            f"raise AssertionError('{library} was imported')\n", encoding="utf-8"
        )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import crfrefine; [getattr(crfrefine, name) for name in {*dir(crfrefine)} - "
        "{*crfrefine._NEED_TORCH}]\n"
        "from crfrefine import *\n"
        "from crfrefine.cli.main import main; sys.argv = ['crfrefine', *sys.argv[1:]]; main()"
    )
    command = [sys.executable, "-c", code, "demo", "-o", tmp_path / "out"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / "out").rglob("*.nii.gz"))

    # Nor does a choice of parameters without labels.
    write_phantom(make_phantom(0, (12, 11, 8), (5.4, 5.5, 7.6)), tmp_path / "cases", "a")
    images, logits = tmp_path / "cases/images", tmp_path / "cases/logits"
    inputs = ["-i", images, "-p", logits, "-o", tmp_path / "refined", "-c", "auto"]
    command = [sys.executable, "-c", code, "infer", *inputs]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "refined/a.nii.gz").exists()


# ---- Public names


@pytest.mark.parametrize("kind", ["logits", "regions"])
def test_a_result_is_equal_to_what_was_pickled_and_to_nothing_else(kind):
    case = random_case(3, num_labels=3, grid_shape=(6, 5, 7))
    options = {"regions": {"a": [1, 2, 3], "b": [2, 3], "c": 3}} if kind == "regions" else {}
    result = crfrefine.refine(case.logits, case.image, spacing=case.spacing, **options)
    again = pickle.loads(pickle.dumps(result))
    assert result == again
    assert result == crfrefine.refine(
        case.logits, case.image, spacing=case.spacing, threads=2, **options
    )
    weak = crfrefine.CrfParameters().replace(**{"bilateral.weight": 0.25})
    assert result != crfrefine.refine(
        case.logits, case.image, spacing=case.spacing, parameters=weak, **options
    )
    assert result != "a result"


def test_dir_shows_the_public_names_only():
    errors = {
        "BackendUnavailableError",
        "CapacityError",
        "ConfigError",
        "CrfRefineError",
        "ExportError",
        "GridMismatchError",
    }
    always = {
        "CrfParameters",
        "Lattice",
        "Plan",
        "RefinementResult",
        "RegionScheme",
        "bilateral_filter",
        "gaussian_filter",
        "refine",
    }
    others = {"CrfRnn", "InputError", "UnsupportedFormatError", "__version__", "crf_loss"}
    modules = {"errors", "layer", "metrics", "nnunet", "parameters", "statistics"}
    assert dir(crfrefine) == sorted(errors | always | others | modules)
    assert set(crfrefine.__all__) == always, "no errors, and nothing that needs PyTorch or MONAI"
    assert all(hasattr(crfrefine, name) for name in dir(crfrefine))
    assert crfrefine.layer.functional.mean_field.__name__ == "mean_field"
