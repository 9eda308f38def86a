"""The shape of evals: imports go one way, the tools stand apart, lines fit on a screen."""
import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parent.parent/"evals"
FILES = {".".join(("evals", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path for path in ROOT.rglob("*.py")}


def imported(name: str) -> set[str]:
    """What a module imports of evals, inside functions, too."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[:len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found |= {module} | {f"{module}.{one.name}" for one in node.names}
        elif isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
    return {one for one in found if one in FILES and one != name}


def test_no_import_goes_round():
    """A package's own modules are imported by its __init__ alone, so `from . import x` in one of them is not that package."""
    graph = {name: {one for one in imported(name) if not (name.startswith(f"{one}.") and FILES[one].name == "__init__.py")} for name in FILES}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(FILES)


def test_only_studies_and_the_command_line_use_a_tool():
    users = {name for name in FILES if not name.startswith("evals.tools") and any(one.startswith("evals.tools") for one in imported(name))}
    assert users == {"evals.cli", "evals.study"}


def test_lines_fit_on_a_screen():
    assert not [f"{path.name}:{i}" for path in FILES.values() for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120]
