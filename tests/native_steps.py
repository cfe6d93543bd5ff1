"""Steps of the native backend for its tests: batches made by hand, without a scheduler."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import random_weights
from sampling_batches import neutral_sampling

from engine.backends.base import Batch, SamplingBatch
from engine.backends.native_backend import NativeBackend
from engine.config import ModelConfig

_native = pytest.importorskip("engine.backends._native", reason="the C++ extension is not built")

ISAS = [name for name, available in _native.isas() if available]
BLOCK = 5  # divides nothing here
TOLERANCE = {
    "float32": 1e-4,
    "bfloat16": 0.08,
    "int8": 0.4,
    "int4": 2.5,
    "int4-g64": 2.5,
    "int4-g128": 2.5,
}  # of the logits of these models, whose spread is about 2


def make(config: ModelConfig, dtype: str = "float32", threads: int = 2, seed: int = 0) -> NativeBackend:
    weights = random_weights(config, seed=seed, scale=0.15)
    backend = NativeBackend(config, weights, dtype=dtype, device="cpu", block_size=BLOCK, threads=threads)
    backend.allocate(96)
    return backend


def table(row: int) -> list[int]:
    """Blocks of sequence ``row`` of six: 16 of them, scattered."""
    return [6 * ((i * 5) % 16) + row for i in range(16)]


def batch(
    parts: list[tuple[int, int, list[int]]],
    logits: str | list[int] = "all",
    sampling: SamplingBatch | None = None,
    draw_rows: list[int] | None = None,
    block: int = BLOCK,
) -> Batch:
    """A step of ``parts``, (sequence row, first position, ids) each.

    With logits of "all" rows, the "last" ones, "none" or those of a list."""
    ids, positions, slots, starts, lengths = [], [], [], [0], []
    for row, first, tokens in parts:
        where = np.arange(first, first + len(tokens))
        ids.extend(tokens)
        positions.extend(where)
        slots.extend(np.array(table(row))[where // block] * block + where % block)
        starts.append(starts[-1] + len(tokens))
        lengths.append(first + len(tokens))
    named = {"all": list(range(starts[-1])), "last": [end - 1 for end in starts[1:]], "none": []}
    rows = named[logits] if isinstance(logits, str) else logits
    return Batch(
        token_ids=np.array(ids, np.int32),
        positions=np.array(positions, np.int32),
        slots=np.array(slots, np.int64),
        query_starts=np.array(starts, np.int32),
        context_lens=np.array(lengths, np.int32),
        block_tables=np.array([table(row) for row, _, _ in parts], np.int32),
        draw_rows=np.array(draw_rows or [], np.int32),
        logits_rows=np.array(rows, np.int32),
        sampling=sampling,
    )


def logits_of(
    backend: NativeBackend, parts: list[tuple[int, int, list[int]]], logits: str | list[int] = "all", block: int = BLOCK
) -> torch.Tensor:
    found = backend.collect(backend.submit(batch(parts, logits, block=block))).logits
    assert found is not None
    return found


def ids_of(seed: int, length: int, config: ModelConfig) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(config.vocab_size, size=length).tolist()
    return ids


def neutral(rows: int, **changes: object) -> SamplingBatch:
    """Options of ``rows`` draws at temperature 1, each with its own seed and position, with changes."""
    steps = np.arange(rows)
    own = {"seeds": steps.astype(np.uint64) * 977 + 5, "positions": steps.astype(np.uint32) + 11}
    return neutral_sampling(rows, **(own | changes))


def run_in_process(code: str, **variables: str) -> str:
    """Standard output of ``code`` in a fresh interpreter that sees the tests and the engine."""
    root = Path(__file__).parent
    path = os.pathsep.join([*sys.path, str(root.parent), str(root)])  # this process's build of the extension first,
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=root,  # and none that lies where the process was started
        env={**os.environ, "PYTHONPATH": path, **variables},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
