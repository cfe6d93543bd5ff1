"""Rules that every file of ``kernels/`` keeps, read from its source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "kernels"
FILES = sorted(KERNELS.glob("*.py"))
OPERATORS = [path for path in FILES if "\ndef cost(" in path.read_text()]
INTEGER_SUMS = {  # every tl.sum there may be: over integers, where no order changes the result
    "tl.sum(above.to(tl.int32), axis=0)",  # head_ranks
    *(f"tl.sum({name})" for name in ("n1", "n2", "n3", "whole")),  # sampling: counts, or masses in fixed point, int64
    "tl.sum(above)",  # sampling: int32
}


def problems(source: str) -> list[str]:
    """What a source has against the rules."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [f"imports {name}" for name in names if name.partition(".")[0] == "engine" or "libdevice" in name]
        if isinstance(node, ast.Attribute) and node.attr in ("autotune", "libdevice"):
            found.append(f"uses {node.attr}")
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
        text = f"line {node.lineno}: {ast.unparse(node)}"
        if name == "tl.load" and "mask" in keywords and "other" not in keywords:
            found.append(f"{text}: a mask without other=")
        if name == "tl.load" and len(node.args) > 1:
            found.append(f"{text}: name mask= and other=")
        if name == "tl.dot" and "input_precision" not in keywords:
            found.append(f"{text}: no input_precision=")
        if name == "tl.sum" and ast.unparse(node) not in INTEGER_SUMS:
            found.append(f"{text}: tl.sum of floats has no fixed order; use tree_sum")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_rules(path: Path) -> None:
    assert problems(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("tl.load(p, mask=m)", "without other="),
        ("tl.load(p, m, 0.0)", "name mask="),
        ("tl.dot(a, b)", "input_precision"),
        ("tl.sum(x, axis=0)", "tree_sum"),
        ("@triton.autotune(c)\ndef f(): pass", "autotune"),
        ("tl.extra.cuda.libdevice.tanh(x)", "libdevice"),
        ("from triton.language.extra import libdevice", "libdevice"),
        ("from engine.config import ModelConfig", "imports engine.config"),
    ],
)
def test_the_lint_sees(source: str, problem: str) -> None:
    assert any(problem in found for found in problems(source))


@pytest.mark.parametrize("path", OPERATORS, ids=lambda path: path.name)
def test_an_operator_is_a_tile_a_kernel_a_launcher_a_test_and_a_benchmark(path: Path) -> None:
    name, source = path.stem, path.read_text()
    names = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    order = [names.index(n) for n in (f"_{name}_tile", f"_{name}_kernel", name, "cost")]
    assert order == sorted(order), "the order is tile, kernel, launcher, cost"
    assert (ROOT / f"tests/test_kernel_{name}.py").exists()
    assert f"\ndef test_{name}(bench: Bench" in (ROOT / "benchmarks/test_kernels.py").read_text()


def test_the_operators() -> None:
    assert {path.stem for path in OPERATORS} == {
        "attention", "embedding", "head_ranks", "head_sample", "layer_norm", "linear", "logits", "sampling",
    }  # fmt: skip


def test_importing_the_package_imports_nothing() -> None:
    """Another package named ``kernels`` exists; finding ours in its place must do no harm."""
    tree = ast.parse((KERNELS / "__init__.py").read_text())
    assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree))
