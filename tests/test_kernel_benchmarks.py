"""The kernel benchmarks: their code runs at a tiny shape, interpreted; without a GPU they measure nothing.

Their operands serve another test: ``cost()`` declares whatever an operator reads or writes, as often as it does.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kernel_harness as harness
import pytest
import test_kernels
import torch
from kernel_timing import Machine

ROOT = Path(__file__).parent.parent


def benchmarks(*options: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", *options]
    # pytest-benchmark measures nothing, and writes no file, where it believes itself in a worker of xdist.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.mark.slow
def test_every_benchmark_runs_at_a_tiny_shape(tmp_path: Path) -> None:
    text = benchmarks("--tiny", f"--benchmark-json={tmp_path / 'out.json'}")
    assert "skipped" not in text
    assert text.count("nothing was measured") == len(json.loads((tmp_path / "out.json").read_text())["benchmarks"]) > 50


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_they_are_skipped_with_the_reason() -> None:
    text = benchmarks("-k", "layer_norm")
    assert "3 skipped" in text
    assert "there is no GPU to measure; --tiny runs" in text


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("embedding", []),
        ("layer_norm", []),
        *(("linear", [layer, kind]) for layer in ("qkv", "proj", "fc", "fc2") for kind in ("float", "int4")),
        ("attention", [1]),
        ("attention", [512]),
        ("logits", ["float"]),
        ("logits", ["int8"]),
        ("sampling", []),
        ("head_sample", ["float"]),
    ],
)
def test_cost_declares_every_read_and_write(operator: str, arguments: list[Any], rows: int) -> None:
    """Unique bytes and declared re-reads together are what the programs touch."""
    bench = test_kernels.Bench(Machine("cpu", tiny=True), None, rows)
    bench.rows = rows if operator not in ("attention", "sampling") else min(rows, 3)  # 70 are two row blocks
    found = []

    def count(make: Callable[[], test_kernels.Work]) -> None:
        work = make()
        with harness.recording() as trace:
            work.launch()
        found.append((trace.traffic(), work.cost.total_bytes + sum(work.cost.rereads.values())))

    bench.measure = count  # type: ignore[method-assign]
    getattr(test_kernels, f"test_{operator}")(bench, *arguments)
    ((touched, declared),) = found
    assert touched == pytest.approx(declared, rel=0.05 if operator == "head_sample" else 0.015)
