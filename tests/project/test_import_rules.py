"""Which module may import which: downward only, and each heavy or optional library in one place."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import crfrefine

PACKAGE = Path(crfrefine.__file__).parent

# Rooms from the bottom up: each imports from itself and from lines above its own, nothing else.
LAYERS = (
    ("errors",),
    ("base",),
    ("io",),
    ("parameters",),
    ("arrays",),
    ("cases", "engines", "metrics"),
    ("refinement", "statistics"),
    ("layer", "monai", "pages"),
    ("runs",),
    ("evaluate", "train"),
    ("apps",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Library -> the only places that may import it; places are modules or folders of the package.
HOMES = {
    "SimpleITK": set(),  # in a process of its own (io.itk): its readers crash on hostile headers
    "psutil": {"base.memory"},
    "nibabel": {"io"},
    "pydicom": {"io.dicom"},
    "highdicom": {"io.dicom"},
    "rich": {"cli"},
    "typer": {"cli"},
    "cupy": {"engines.cuda"},
    "jinja2": {"pages.report"},
    "matplotlib": {"pages.report", "train"},
    "distributed": {"runs.execution.cluster"},
    "PIL": {"pages"},
    "monai": {"monai"},
    "starlette": {"apps.tune.server"},
    "uvicorn": {"apps.tune.server"},
    # engines.cuda.torch_memory: only for tensors, whose stream and memory it takes; they bring PyTorch with them.
    "torch": {"engines.cuda.torch_memory", "engines.torch", "layer", "monai", "train"},
}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree):
    """Every import of a file, also those inside functions and under TYPE_CHECKING: they are dependencies all the same."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide the layer"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def unit_of(module):
    """The line of the table that a module of the package belongs to; None for the package itself and its public names."""
    _, _, inner = module.partition(".")
    first = inner.partition(".")[0]
    return first if first and ((PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").is_file()) else None


def upward_imports(source, module):
    own = unit_of(f"crfrefine.{module}")
    found = []
    for line, imported in imported_modules(ast.parse(source)):
        if imported.partition(".")[0] != "crfrefine":
            continue
        other = unit_of(imported)
        if other is not None and other != own and LEVEL[other] >= LEVEL[own]:
            found.append(f"line {line}: {own} imports {imported}")
    return found


def misplaced_imports(source, module):
    found = []
    for line, imported in imported_modules(ast.parse(source)):
        homes = HOMES.get(imported.partition(".")[0])
        if homes is not None and not any(module == home or module.startswith(home + ".") for home in homes):
            found.append(f"line {line}: {module} imports {imported}")
    return found


def prints(source, module):
    if module == "cli" or module.startswith("cli."):
        return []
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [f"line {call.lineno}: {module} prints" for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


FILES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def broken_rules(path):
    module = module_name(path)
    source = path.read_text(encoding="utf-8")
    found = misplaced_imports(source, module) + prints(source, module)
    if module:  # the package's __init__ gathers public names from any layer
        if unit_of(f"crfrefine.{module}") not in LEVEL:
            return [*found, f"{module} has no line in LAYERS"]
        found += upward_imports(source, module)
    return found


def test_imports_go_downward_and_libraries_stay_at_home():
    found = {path.relative_to(PACKAGE).as_posix(): broken_rules(path) for path in FILES}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_no_module_imports_itself_through_others():
    """Neither inside a room nor across; what only type checkers see counts too."""
    modules = {f"crfrefine.{module_name(path)}".rstrip("."): path.read_text(encoding="utf-8") for path in FILES}
    imports = {}
    for module, source in modules.items():
        names = {name for _, name in imported_modules(ast.parse(source))}
        imports[module] = {name if name in modules else name.rpartition(".")[0] for name in names} & set(modules) - {module, "crfrefine"}
    del imports["crfrefine"]  # It names what is public, anywhere.
    assert len(list(graphlib.TopologicalSorter(imports).static_order())) == len(modules) - 1


def run_python(code, *arguments, path_first=None):
    """Run code in a fresh interpreter, outside of the repository."""
    lines = [f"import sys; sys.path.insert(0, {str(path_first)!r})"] if path_first else []
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*lines, code]), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=path_first,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def tripwires(tmp_path):
    """A folder whose `torch`, `monai` and `cupy` raise what no import guard catches, so that even a tried import is seen."""
    for library in ("torch", "monai", "cupy"):
        (tmp_path / f"{library}.py").write_text(f"raise AssertionError('{library} was imported')\n", encoding="utf-8")
    return tmp_path


def test_neither_importing_the_package_nor_a_whole_run_imports_torch_or_cupy(tripwires):
    """The demo refines through the same code as `infer`."""
    code = (
        "import sys, crfrefine; [getattr(crfrefine, name) for name in {*dir(crfrefine)} - {*crfrefine._NEED_TORCH}]\n"
        "from crfrefine import *\n"
        "from crfrefine.cli.main import main; sys.argv = ['crfrefine', *sys.argv[1:]]; main()"
    )
    run_python(code, "demo", "-o", str(tripwires / "out"), path_first=tripwires)
    assert any((tripwires / "out").rglob("*.nii.gz"))


def test_modules_are_attributes_and_cost_nothing_until_they_are_used():
    """Completion offers them, and so do the pages of the interface; none is imported, nor what stands behind it."""
    code = (
        "import sys, crfrefine\n"
        "named = dir(crfrefine)\n"
        "modules = ('errors', 'layer', 'metrics', 'parameters', 'statistics')\n"
        "print({*modules} <= {*named}, [name for name in sys.modules if name.startswith('crfrefine.') or name == 'numpy'])\n"
        "print(crfrefine.metrics.overlap.measure_case.__name__, crfrefine.statistics.verdict.verdict.__name__)\n"
        "print(crfrefine.parameters.sections.SpatialParameters.__name__)\n"
        "print('overlap' in dir(crfrefine.metrics), hasattr(crfrefine.metrics, 'nothing'), hasattr(crfrefine, 'nothing'))\n"
    )
    assert run_python(code).splitlines() == ["True []", "measure_case verdict", "SpatialParameters", "True False False"]
