"""Warm-up and ``strict_jit``: the triton backend on a driver without a GPU, where "compiling" takes no time."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from backend_driver import BLOCK, random_weights

from engine.backends.native_backend import NativeBackend
from engine.backends.torch_backend import TorchBackend
from engine.backends.triton_backend import TritonInterpretBackend
from engine.config import ModelConfig
from engine.llm import LLM

ROOT = Path(__file__).parent.parent
MODEL = ModelConfig(vocab_size=97, context_length=150, embed_dim=64, n_heads=2, n_layers=1, hidden_dim=64)

SETUP = """
import json, logging, sys
from dataclasses import replace
sys.path.insert(0, "tests")
import numpy as np, torch
from backend_driver import greedy
from engine.backends.base import Batch
from engine.backends import triton_buffers
from engine.backends.triton_backend import TritonBackend
from engine.backends.triton_jit import _batch, _sampling
from engine.checkpoints.canonical import canonical_shapes
from engine.config import ModelConfig
from kernels import tiles
from kernels.offline import compiling_only

import triton.compiler
triton.compiler.compile = lambda *_, **__: object()
triton_buffers.Slot.download = lambda slot, packed: None  # there is nothing to bring

class OffLine(TritonBackend):
    devices = ("meta",)
    def _prepare(self, strict_jit):
        pass
    @staticmethod
    def _has_dependent_launch(device):
        return True

said = []
class Said(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.getLogger("engine").addHandler(Said())

model = ModelConfig(vocab_size=97, context_length=150, embed_dim=64, n_heads=2, n_layers=1, hidden_dim=64)
weights = {n: torch.empty(s, device="meta") for n, s in canonical_shapes(model).items()}

def make(**options):
    made = OffLine(model, weights, dtype="bfloat16", device="meta", block_size=16, **options)
    made.allocate(40)
    return made

def another_kernel():
    tiles.BLOCK_KV = tiles.attention_tiles(64, 2, 1).block_q  # what no launcher asks for as long as nobody edits it
    from kernels import attention
    attention.BLOCK_KV = tiles.BLOCK_KV
"""

WARM = """
with compiling_only("sm_90"):
    before, random = {}, np.random.default_rng(0)
    for dependent in (True, False):
        made = make(dependent_launch=dependent)
        for i in range(40):
            most, lengths = ((4, [1, 1, 1, 2, 3]), (70, [1, 1, 1, 2, 16, 17, 40, 150]))[i % 2]
            counts = [int(n) for n in random.choice(lengths, random.integers(1, most + 1))]
            rows = len(counts)
            drawn = _sampling(rows, float(random.integers(0, 2)))
            drawn = replace(drawn, top_k=np.full(rows, random.integers(0, 2), np.int32))
            made.submit(_batch(counts, drawn))
        before |= made.jit.late
    another_kernel()
    for _ in range(3):
        made.submit(_batch([1, 2], _sampling(2, 0.0)))  # no graph was captured of
print(json.dumps({"before": before, "late": made.jit.late, "said": said}))
"""

STRICT = """
with compiling_only("sm_90"):
    made = make(strict_jit=True)
    made.submit(_batch([1, 40], _sampling(2, 0.0)))
    another_kernel()
    try:
        made.submit(_batch([1, 1], _sampling(2, 0.0)))
        error = ""
    except RuntimeError as raised:
        error = str(raised)
print(json.dumps({"error": error, "said": said}))
"""


def off_line(code: str) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SETUP + code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.slow
def test_a_compilation_after_warm_up_is_counted_and_logged_once() -> None:
    result = off_line(WARM)
    assert result["before"] == {}, "warm-up left something out that a step asks for"
    (name,) = result["late"]
    assert name.startswith("_attention_kernel:")
    assert "BLOCK_KV=16" in result["late"][name]
    assert len(result["said"]) == 1
    assert f"number 1: {name} (" in result["said"][0]


@pytest.mark.slow
def test_strict_jit_refuses_it_by_name() -> None:
    result = off_line(STRICT)
    assert result["error"].startswith("strict_jit: a step asks for what warm-up did not compile: _attention_kernel:")
    assert "BLOCK_KV=16" in result["error"]
    assert result["said"] == []


@pytest.mark.parametrize("adapter", [TorchBackend, NativeBackend, TritonInterpretBackend])
def test_backends_that_compile_nothing_refuse_strict_jit(adapter: Any) -> None:
    with pytest.raises(ValueError, match=rf"the {adapter.name} backend .* no strict_jit=True"):
        adapter(MODEL, random_weights(MODEL), dtype="float32", device="cpu", block_size=BLOCK, strict_jit=True)


def test_strict_jit_is_an_option_of_llm() -> None:
    with pytest.raises(ValueError, match=r"the torch backend .* no strict_jit=True"):
        LLM(backend="torch", strict_jit=True)
