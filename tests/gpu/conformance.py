"""Is it right: logits and draws against PyTorch, operators against float64, memory under compute-sanitizer."""

import os
import shutil
import signal
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

from engine.backends.base import Sparse
from engine.backends.torch_backend import TorchBackend
from engine.backends.triton_weights import STORAGE
from engine.checkpoints.canonical import to_reference
from engine.config import ModelConfig
from gpu.machine import HALF, SMALL, Case, Machine, float32_products

SANITIZER_FOLDERS = [os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
HEAD_DTYPES = ("bfloat16", "float32")
HEADS = {  # width of a head -> a model with such, of another activation and odd sizes
    80: ModelConfig(131, 150, 160, 2, 1, 330, activation="gelu"),
    96: ModelConfig(97, 150, 96, 1, 1, 130, activation="relu"),
    128: ModelConfig(97, 150, 256, 2, 1, 514),
    256: ModelConfig(97, 150, 256, 1, 1, 130, activation="gelu"),
}


def cases(machine: Machine) -> Iterator[Case]:
    """Models in every dtype; linears with int8 and int4 weights; compute-sanitizer where there is one."""
    models = {"small": SMALL} if machine.tiny else {"small": SMALL, "gpt2 with 2 layers": HALF}
    for name, model in models.items():
        for dtype in machine.dtypes:
            yield f"logits of {name} in {dtype}", lambda m=model, d=dtype: _logits(machine, m, d)
        yield f"draws of {name}", lambda m=model: _draws(machine, m)
    for width, model in HEADS.items() if not (machine.tiny and machine.on_gpu) else ():
        for dtype in HEAD_DTYPES[-1:] if machine.tiny else HEAD_DTYPES:
            yield f"logits with heads of {width} in {dtype}", lambda m=model, d=dtype: _logits(machine, m, d)
    for kind in ("float", "int8", "int4"):
        for rows in (1, 40):
            yield f"linear, {kind} weights, {rows} rows", lambda k=kind, r=rows: _linear(machine, k, r)
    if machine.on_gpu and not machine.tiny:
        sanitizer = shutil.which(LONG, path=os.pathsep.join([os.environ["PATH"], *SANITIZER_FOLDERS]))
        for tool in ("memcheck", "racecheck"):
            if sanitizer is None:
                yield f"no {LONG} {tool}", lambda: {"skipped": f"looked on PATH and in {', '.join(SANITIZER_FOLDERS)}"}
            else:
                yield f"{LONG} {tool}", lambda t=tool: _sanitized(sanitizer, t)


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
    floats = lambda *values: np.array(values, np.float32)  # noqa: E731
    heat, ids = floats(0, 1, 0.7, 1.3), np.array([3, 9, 1, 2, 9], np.int32)
    lists = Sparse(np.array([0, 2, 2, 4, 5], np.int32), ids, floats(2, 1, 0, 3, 1))
    penalties = {
        "presence_penalty": floats(0.5, 0, 1, 0), "frequency_penalty": floats(0.2, 0, 0.3, 0),
        "repetition_penalty": floats(1.3, 1, 1.1, 0.8), "output_counts": lists, "logit_bias": lists,
    }  # fmt: skip
    filtered = {
        "top_k": np.array([0, 0, 20, 5], np.int32),
        "top_p": floats(1, 1, 0.9, 1),
        "min_p": floats(0, 0.1, 0, 0),
    }
    found = []
    for adapter in (None, TorchBackend):
        driver = machine.driver(model, "float32", 60, adapter)
        for options in ({}, penalties, filtered, filtered | penalties):  # by the fused head, and from logits in memory
            draw = greedy(4, temperature=heat, positions=np.arange(4, dtype=np.uint32), num_logprobs=3, **options)
            driver.release()
            parts = [(driver.sequence(20), tokens(9 + i, i, model.vocab_size)) for i in range(4)]
            with float32_products():
                out = driver.run(parts, draw)
            found.append((out.token_ids.tolist(), out.ranks.tolist(), out.top_ids.tolist()))
    half = len(found) // 2
    return {"drawn": found[0][0], "ok": found[:half] == found[half:]}


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
        command += ["--part", "conformance", "--tiny", "--workers", "0"]
        command += ["--output", str(Path(folder) / "report.json")]
        running = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = running.communicate(timeout=LONG_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)  # what it watches has a process of its own, on the GPU
            running.wait()
            return {"ok": False, "error": f"not through after {LONG_SECONDS} s"}
    return {"ok": running.returncode == 0, "exit": running.returncode, "end": said[-1500:]}
