"""The floors: imports go downward only, and the planning floor knows no tensors."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOORS = (
    "llm",
    "optimize",
    "generate",
    "bench",
    "doctor",
    "assembly",
    "cli",
    "options",
    "prompts",
    "requests",
    "turns",
    "__init__",
)
SHARED = {"config", "messages"}

# Part of engine/ -> what it may import of engine/. A door may import everything but another floor's insides.
ALLOWED = {
    "config": set(),
    "messages": set(),
    "logs": set(),
    "machine": set(),
    "reference": set(),
    "planning": SHARED | {"planning"},
    "execution": SHARED | {"execution", "backends.base"},
    "backends": SHARED | {"backends", "reference", "checkpoints.canonical", "machine"},
    "checkpoints": SHARED | {"checkpoints", "reference", "files"},
    "text": {"text", "files"},
    "live": SHARED | {"live", "reference", "checkpoints"},
    "files": set(),
}


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "engine").with_suffix("").parts[0]


ENGINE_FILES = sorted((ROOT / "engine").rglob("*.py"))


@pytest.mark.parametrize("path", ENGINE_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward(path: Path) -> None:
    part = part_of(path)
    if part in DOORS:
        return
    allowed = ALLOWED[part]
    for name in imports_of(path):
        if name == "engine" or name.startswith("engine."):
            target = name.removeprefix("engine").lstrip(".")
            fits = any(target == entry or target.startswith(entry + ".") for entry in allowed)
            assert fits, f"{path.relative_to(ROOT)} imports {name}; {part} may import {sorted(allowed)}"


@pytest.mark.parametrize("part", ["planning", "config", "messages"])
def test_planning_knows_no_tensors(part: str) -> None:
    for path in ENGINE_FILES:
        if part_of(path) == part:
            assert not {name.split(".")[0] for name in imports_of(path)} & {"torch", "numpy", "triton"}, path


def test_machine_floor_does_not_know_the_engine() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not any(name.split(".")[0] == "engine" for name in imports_of(path)), path


def test_kernels_package_imports_nothing() -> None:
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_engine_does_not_import_benchmarks_or_tests() -> None:
    for path in ENGINE_FILES:
        assert not {name.split(".")[0] for name in imports_of(path)} & {"benchmarks", "tests"}, path


def test_no_test_package() -> None:
    assert not (ROOT / "tests" / "__init__.py").exists()
