"""The house's walls: which room may import from which, and no circles."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sqllava"
# From these any room may import: the command line's parser, errors, and what texts and pictures
# become.
EVERYWHERE = {"cli", "errors", "pixels", "encoding", "conversation"}
# Each room with those beneath it.
BENEATH = {
    "data": set(),
    "model": set(),
    "checkpoint": {"model", "data"},
    "generation": {"checkpoint", "model", "data"},
    "ask": {"generation", "checkpoint", "model", "data"},
    "train": {"checkpoint", "model", "data"},
    "eval": {"ask", "generation", "checkpoint", "model", "data"},
    "serve": {"ask", "generation", "checkpoint", "model", "data"},
}
# Within the ground floor, too, imports run one way.
GROUND = {"encoding": {"conversation"}}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports, anywhere in its code."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            modules = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= modules or {node.module}
    return found - {name}


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"sqllava"}))
def test_a_room_imports_from_the_rooms_beneath_it_alone(name):
    room = name.split(".")[1]
    rooms = {other.split(".")[1] for other in imports(name) - {"sqllava"}} - {room}
    if room in EVERYWHERE:
        assert rooms <= GROUND.get(room, set())
    else:
        assert rooms - EVERYWHERE <= BENEATH[room]


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: imports(name) - {"sqllava"} for name in MODULES}
    while leaves := [name for name, uses in graph.items() if not uses & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"these import each other: {sorted(graph)}"
