"""The kernel benchmarks: their code runs at a tiny shape, interpreted; without a GPU they measure nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def benchmarks(*options: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
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
