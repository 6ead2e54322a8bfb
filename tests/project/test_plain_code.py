"""How much a statement and a function do: a package that reads plainly stays so.

The limits lie below what made this package hard to read. A figure that rises asks for a name, a
table or a step, not for a trick. They hold for the package and the tests as a whole: a limit for
each room moved code into helpers that nobody would miss.
"""

import ast
from dataclasses import dataclass, field
from pathlib import Path

import crfrefine

PACKAGE = Path(crfrefine.__file__).parent
TESTS = Path(__file__).parents[1]

MAX_COLUMNS = 100
MAX_BRANCHES = 15
MAX_CODE_LINES = 40
MAX_PARAMETERS = 6

# Per 1,000 lines, or as named.
PACKAGE_LIMITS = {
    "conditional expressions": 10,
    "nested conditional expressions": 0.1,
    "comprehensions": 25,
    "values assigned in pairs": 3,
    "assignments within expressions": 1.5,
    "functions with more than 15 branches, %": 2.5,
    "functions of more than 40 lines of code, %": 2,
    "private functions with more than 6 parameters, %": 2,
    "lines of more than 100 columns": 0,
}
TEST_LIMITS = {
    "conditional expressions": 8,
    "comprehensions": 30,
    "values assigned in pairs": 5,
    "lines of more than 100 columns": 0,
}

Function = ast.FunctionDef | ast.AsyncFunctionDef
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
BRANCHES = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.With, ast.Assert, ast.IfExp)


@dataclass
class Counts:
    """What the files of a folder contain."""

    num_lines: int = 0
    num_long_lines: int = 0
    num_conditional: int = 0
    num_nested: int = 0
    num_comprehensions: int = 0
    num_pairs: int = 0
    num_inner_assignments: int = 0
    functions: list[Function] = field(default_factory=list)

    def add(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        self.num_lines += len(lines)
        for line in lines:
            if len(line) > MAX_COLUMNS and "://" not in line:
                self.num_long_lines += 1
        for node in ast.walk(ast.parse(text)):
            self.add_node(node)

    def add_node(self, node: ast.AST) -> None:
        if isinstance(node, Function):
            self.functions.append(node)
        elif isinstance(node, ast.IfExp):
            self.num_conditional += 1
            self.num_nested += contains_conditional(node)
        elif isinstance(node, COMPREHENSIONS):
            self.num_comprehensions += 1
        elif isinstance(node, ast.NamedExpr):
            self.num_inner_assignments += 1
        elif is_pair(node):
            self.num_pairs += 1

    def per_thousand(self, count: int) -> float:
        return 1000 * count / self.num_lines

    def share_of_functions(self, count: int) -> float:
        return 100 * count / max(1, len(self.functions))

    def figures(self) -> dict[str, float]:
        branches = [count_branches(function) for function in self.functions]
        num_branching = sum(count > MAX_BRANCHES for count in branches)
        num_long = sum(count_code_lines(each) > MAX_CODE_LINES for each in self.functions)
        num_wide = sum(is_private_with_many_parameters(each) for each in self.functions)
        return {
            "conditional expressions": self.per_thousand(self.num_conditional),
            "nested conditional expressions": self.per_thousand(self.num_nested),
            "comprehensions": self.per_thousand(self.num_comprehensions),
            "values assigned in pairs": self.per_thousand(self.num_pairs),
            "assignments within expressions": self.per_thousand(self.num_inner_assignments),
            "functions with more than 15 branches, %": self.share_of_functions(num_branching),
            "functions of more than 40 lines of code, %": self.share_of_functions(num_long),
            "private functions with more than 6 parameters, %": self.share_of_functions(num_wide),
            "lines of more than 100 columns": self.num_long_lines,
        }


def contains_conditional(node: ast.AST) -> bool:
    return any(isinstance(part, ast.IfExp) for part in ast.walk(node) if part is not node)


def is_pair(node: ast.AST) -> bool:
    """True for `a, b = x, y`; unpacking one result is no pair."""
    if not isinstance(node, ast.Assign):
        return False
    return isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple)


def is_text(node: ast.AST) -> bool:
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
        return False
    return isinstance(node.value.value, str)


def count_branches(function: Function) -> int:
    """The cyclomatic complexity, nested functions included."""
    count = 1
    for node in ast.walk(function):
        if isinstance(node, BRANCHES):
            count += 1
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += 1 + len(node.ifs)
    return count


def count_code_lines(function: Function) -> int:
    """Lines of the body that hold code: no docstring, comment or blank line, no signature."""
    lines: set[int] = set()
    for statement in function.body:
        if is_text(statement):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.stmt | ast.expr):
                lines.add(node.lineno)
                lines.add(node.end_lineno or node.lineno)
    return len(lines)


def is_private_with_many_parameters(function: Function) -> bool:
    if not function.name.startswith("_") or function.name == "__init__":
        return False
    arguments = function.args
    names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    parameters = [name for name in names if name.arg not in ("self", "cls")]
    return len(parameters) > MAX_PARAMETERS


def exceeded(folder: Path, limits: dict[str, float]) -> dict[str, float]:
    counts = Counts()
    for path in sorted(folder.rglob("*.py")):
        counts.add(path)
    figures = counts.figures()
    return {name: figures[name] for name, limit in limits.items() if figures[name] > limit}


def test_the_package_reads_plainly() -> None:
    assert exceeded(PACKAGE, PACKAGE_LIMITS) == {}


def test_the_tests_read_plainly() -> None:
    assert exceeded(TESTS, TEST_LIMITS) == {}


def test_the_figures_count_what_their_names_say(tmp_path: Path) -> None:
    """A file with two of the things that are counted, or one, as the table says."""
    lines = [
        "a, b = 1, 2",
        "c = a if b else (1 if a else 2)",
        "d = [x for x in (a, b) if x]",
        "if (e := a) > 1:",
        "    pass",
        "def f(x):",
        "    '''Text.'''",
        "    return x and a or b",
        "#" * (MAX_COLUMNS + 1),
        "f(a)",
    ]
    (tmp_path / "room.py").write_text("\n".join(lines), encoding="utf-8")
    counts = Counts()
    counts.add(tmp_path / "room.py")
    figures = counts.figures()
    assert figures["conditional expressions"] == 200
    assert figures["nested conditional expressions"] == 100
    assert figures["comprehensions"] == 100
    assert figures["values assigned in pairs"] == 100
    assert figures["assignments within expressions"] == 100
    assert figures["lines of more than 100 columns"] == 1
    assert exceeded(tmp_path, {"comprehensions": 99}) == {"comprehensions": 100}
