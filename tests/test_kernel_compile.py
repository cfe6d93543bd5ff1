"""Real machine code, made without a GPU: the manifest covers what a step asks for, and the code keeps the rules."""

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import compile as kernel_compile
from kernels.launches import MODELS, ModelShape, step_bytes, step_launches

ROOT = Path(__file__).parent.parent
SHARED_LIMIT = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}  # KiB


def compiled_mode(*command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def broken_rules(target: str, rows: list[dict[str, Any]]) -> list[str]:
    """What the machine code of one target has against the rules."""
    found = []
    families = defaultdict(set)
    for row in rows:
        name = f"{row['model']} {row['launch']} {row['arguments']}"
        if row["spills"]:
            found.append(f"{name} spills {row['spills']} bytes")
        if row["shared"] > SHARED_LIMIT[target] * 1024:
            found.append(f"{name} takes {row['shared']} bytes of shared memory")
        if row["launch"] in ("qkv", "proj", "fc", "fc2", "attention", "logits", "head_sample", "head_ranks"):
            families[row["model"], re.sub("head_.*", "logits", row["launch"])].add(row["family"])
            if row["wide_share"] < 0.75:
                found.append(f"{name} loads {row['wide_share']:.0%} of its bytes 128 bits at a time")
    found += [f"{key} uses {sorted(used)}" for key, used in families.items() if len(used) > 1 or "none" in used]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", pytest.param("sm_90", marks=pytest.mark.versions)])
def test_gpt2_compiles_and_keeps_the_rules(target: str) -> None:
    text = compiled_mode("-m", "kernels.compile", "--targets", target, "--models", "gpt2")
    rows = json.loads(text)["targets"][target]
    assert {row["launch"] for row in rows} >= {"embedding", "qkv", "attention", "logits", "sampling", "head_sample"}
    assert broken_rules(target, rows) == []


def test_the_rules_see() -> None:
    row = {
        "model": "m",
        "launch": "qkv",
        "arguments": {},
        "spills": 0,
        "shared": 0,
        "wide_share": 1.0,
        "family": "wgmma",
    }
    assert broken_rules("sm_90", [row]) == []
    for change in ({"spills": 8}, {"shared": 10**6}, {"wide_share": 0.5}, {"family": "none"}):
        assert broken_rules("sm_90", [row | change])
    assert broken_rules("sm_90", [row, row | {"family": "mma.sync"}])


def test_command_line_refuses() -> None:
    for arguments in (["--targets", "sm_70"], ["--models", "gpt5"], ["--dtypes", "fp8"]):
        with pytest.raises(SystemExit):
            kernel_compile.main(arguments)


STEP = """
import sys, json
import numpy as np, torch
from engine.backends.base import Batch, SamplingBatch, Sparse
from engine.backends.triton_step import TritonStep
from engine.backends.triton_weights import pack_model
from engine.checkpoints.canonical import canonical_shapes
from engine.config import ModelConfig
from kernels.launches import MODELS, all_launches
from kernels.offline import specialisations

shape = MODELS["gpt2"]
model = ModelConfig(shape.vocab_size, shape.context_length, shape.width, shape.heads, 1, shape.hidden)
weights = {n: torch.empty(s, device="meta") for n, s in canonical_shapes(model).items()}
step = TritonStep(model, pack_model(model, weights, torch.bfloat16, torch.device("meta")), torch.bfloat16, 16)
step.allocate(4096)

def batch(counts, temperature, logits, top_k=0, **options):
    f, u = lambda v: np.full(len(counts), v, np.float32), np.zeros(len(counts), np.uint32)
    sampling = SamplingBatch(f(temperature), np.full(len(counts), top_k, np.int32), f(1), f(0), u.astype(np.uint64), u,
                             u, options.pop("n", 0), f(0), f(0), f(1), **options)
    total = sum(counts)
    starts = np.cumsum([0, *counts]).astype(np.int32)
    tables = np.zeros((len(counts), max(counts) // 16 + 1 + len(counts) % 3), np.int32)
    return Batch(np.zeros(total, np.int32), np.concatenate([np.arange(c) for c in counts]).astype(np.int32),
                 np.zeros(total, np.int64), starts, np.array(counts, np.int32), tables,
                 starts[1:] - 1, np.arange(logits, dtype=np.int32), sampling)

def run(counts, temperature=1.0, logits=0, **options):
    return lambda: step.run(batch(counts, temperature, logits, **options))

def edits(rows, entries, masked=False):
    starts, ids = np.arange(rows + 1, dtype=np.int32) * entries, np.arange(rows * entries, dtype=np.int32)
    found = {"logit_bias": Sparse(starts, ids, np.ones(len(ids), np.float32))}
    return found | ({"allowed": np.zeros((rows, 1571), np.uint32)} if masked else {})

asked = specialisations("sm_90", [run([1] * n, t) for n in (1, 3, 17, 33, 64, 65, 100, 256) for t in (0.0, 1.0)]
                        + [run([n], logits=k) for n in (5, 16, 17, 100, 1000) for k in (0, 3)] + [run([1, 1, 300])]
                        + [run([1] * n, 1.0, 0, top_k=k, n=top, **edits(n, 3, n % 2 > 0))
                           for n in (1, 2, 33, 256) for k in (0, 5) for top in (0, 3)])
listed = specialisations("sm_90", [launch.run for launch in all_launches(shape, torch.bfloat16)])
print(json.dumps({"asked": sorted(asked), "missing": sorted(asked - listed), "listed": sorted(listed)}))
"""


@pytest.mark.slow
def test_a_step_asks_for_nothing_that_is_not_listed() -> None:
    """What ``TritonStep`` really launches, on tensors without memory, against the list that is compiled ahead."""
    result = json.loads(compiled_mode("-c", STEP))
    assert len(result["asked"]) >= 15
    assert result["missing"] == []
    if kernel_compile.MANIFEST.exists():
        manifest = json.loads(kernel_compile.MANIFEST.read_text())
        if manifest["triton"] == json.loads(
            compiled_mode("-c", "import json, triton; print(json.dumps(triton.__version__))")
        ):
            assert set(result["listed"]) <= {row["name"] for row in manifest["targets"]["sm_90"]}


def test_gpt2_small_moves_little_more_than_its_weights_and_keys() -> None:
    """Unique bytes of a decode step, from the cost() of its launches, one sequence of 512 tokens, bfloat16."""
    shape, context = MODELS["gpt2"], 512
    launches = step_launches(shape, [(context - 1, 1)], torch.bfloat16)
    blocks = shape.layers * (4 * shape.width**2 + 2 * shape.width * shape.hidden + 13 * shape.width)
    weights = 2 * (blocks + 2 * shape.width + shape.vocab_size * shape.width)
    cache = 2 * shape.layers * 2 * context * shape.width
    assert weights + cache < step_bytes(launches) <= 1.05 * (weights + cache)


def test_a_layer_is_five_launches() -> None:
    tiny = ModelShape(97, 64, 64, 2, 3, 128)
    launches = step_launches(tiny, [(5, 1)] * 4, torch.float32)
    assert [launch.name for launch in launches if launch.times == 3] == ["qkv", "attention", "proj", "fc", "fc2"]
    assert sum(launch.times == 1 for launch in launches) == 3
