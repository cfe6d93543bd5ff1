"""Is it right: logits and draws against PyTorch, operators against float64, memory under compute-sanitizer."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from backend_driver import greedy, quantised, random_weights, tokens
from gpu_check import LONG, LONG_SECONDS

from engine.backends.torch_backend import TorchBackend
from engine.backends.triton_weights import STORAGE
from engine.checkpoints.canonical import to_reference
from engine.config import ModelConfig
from gpu.machine import HALF, SMALL, Case, Machine, float32_products


def cases(machine: Machine) -> Iterator[Case]:
    """Models in every dtype; linears with int8 and int4 weights; compute-sanitizer where there is one."""
    models = {"small": SMALL} if machine.tiny else {"small": SMALL, "gpt2 with 2 layers": HALF}
    for name, model in models.items():
        for dtype in machine.dtypes:
            yield f"logits of {name} in {dtype}", lambda m=model, d=dtype: _logits(machine, m, d)
        yield f"draws of {name}", lambda m=model: _draws(machine, m)
    for kind in ("float", "int8", "int4"):
        for rows in (1, 40):
            yield f"linear, {kind} weights, {rows} rows", lambda k=kind, r=rows: _linear(machine, k, r)
    sanitizer = shutil.which(LONG)
    if machine.on_gpu and not machine.tiny and sanitizer is not None:
        for tool in ("memcheck", "racecheck"):
            yield f"{LONG} {tool}", lambda t=tool: _sanitized(str(sanitizer), t)


def _logits(machine: Machine, model: ModelConfig, dtype: str) -> dict[str, Any]:
    """float32 within 1e-4 of float64; others at most twice as far as plain PyTorch's, of weights as they are stored."""
    storage, kind = STORAGE[dtype]
    ids, weights = tokens(100 if machine.tiny else 140, vocab_size=model.vocab_size), random_weights(model)
    stored = quantised(weights, kind)
    with torch.no_grad():
        oracle = to_reference(model, stored).double()(torch.tensor([ids]))[0]
    theirs_in = str(storage).removeprefix("torch.")
    with float32_products():
        errors = [
            (driver.in_chunks(ids, [40, 41]).cpu().double() - oracle).abs().max()
            for driver in (
                machine.with_weights(weights, model, dtype, 60),
                machine.with_weights(stored, model, theirs_in, 60, TorchBackend),
            )
        ]
    ours, theirs = (error.item() for error in errors)
    limit = 1e-4 if dtype == "float32" else 2 * theirs
    return {"error": ours, "torch": theirs, "ok": ours <= limit}  # False for NaN


def _draws(machine: Machine, model: ModelConfig) -> dict[str, Any]:
    """Tokens by every kind of option in float32: the torch backend's."""
    heat = np.array([0, 1, 0.7, 1.3], np.float32)
    filtered = {"top_k": np.array([0, 0, 20, 5], np.int32), "top_p": np.array([1, 1, 0.9, 1], np.float32)}
    found = []
    for adapter in (None, TorchBackend):
        driver = machine.driver(model, "float32", 60, adapter)
        for options in ({}, filtered):  # by the fused head, and from logits in memory
            draw = greedy(4, temperature=heat, positions=np.arange(4, dtype=np.uint32), num_logprobs=3, **options)
            driver.release()
            parts = [(driver.sequence(20), tokens(9 + i, i, model.vocab_size)) for i in range(4)]
            with float32_products():
                out = driver.run(parts, draw)
            found.append((out.token_ids.tolist(), out.ranks.tolist(), out.top_ids.tolist()))
    return {"drawn": found[0][0], "ok": found[:2] == found[2:]}


def _linear(machine: Machine, kind: str, rows: int) -> dict[str, Any]:
    """A linear whose weights are widened in registers, against float64 with the same rounded weights."""
    from kernels import linear
    from kernels.weights import pack, unpack

    n, k, dtype = (130, 200, torch.bfloat16) if machine.tiny else (2304, 768, torch.bfloat16)
    torch.manual_seed(0)
    x, bias = torch.randn(rows, k, device=machine.device).to(dtype), torch.zeros(n, device=machine.device).to(dtype)
    weights = pack(torch.randn(n, k, device=machine.device) / k**0.5, dtype, kind)
    y = torch.full((rows, n), torch.nan, device=machine.device)
    partials, *counters = linear.Workspace.needed(rows, n, k, dtype.itemsize)
    zeros = [torch.zeros(count, dtype=torch.int32, device=machine.device) for count in counters]
    workspace = linear.Workspace(torch.empty(partials, device=machine.device), *zeros)
    linear.linear(x, weights, bias, y, workspace)
    oracle = x.double() @ unpack(weights).double().T
    error = ((y - oracle).norm() / oracle.norm()).item()
    return {"relative error": error, "ok": error < 1e-2}


def _sanitized(sanitizer: str, tool: str) -> dict[str, Any]:
    """The tiny cases of this part again, every access watched; PyTorch's allocator would hide what is out of bounds."""
    script = Path(__file__).parent.parent / "gpu_check.py"
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, str(script)]
        command += ["--part", "conformance", "--tiny", "--output", str(Path(folder) / "report.json")]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=LONG_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return {"ok": False, "error": f"not through after {LONG_SECONDS} s"}
    return {"ok": done.returncode == 0, "exit": done.returncode, "end": (done.stdout + done.stderr)[-1500:]}
