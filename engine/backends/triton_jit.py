"""What the triton backend compiles while it runs: warm-up, and a watch over every compilation after it.

Triton compiles a kernel when a launch first asks for a specialisation: seconds, in the middle of a step. ``warm_up``
runs the steps that ask for everything decoding and prefilling will ask for. ``JitWatch`` counts and logs what is
compiled all the same, or refuses it.
"""

import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar, Token
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from engine.backends.base import Batch, SamplingBatch, Sparse
from engine.config import ModelConfig

_log = logging.getLogger("engine.triton")
_watching: ContextVar["JitWatch | None"] = ContextVar("watching", default=None)

ROWS = (257, 256, 64, 32, 16, 4)  # of a step: the most of each choice of tiles, and more than any
HEAD_ROWS = (64, 32, 16, 4)  # those of them at which the head's tiles change, or kernels start early
PREFILL = 17  # tokens of one sequence from which attention takes its tiles for many queries


class JitWatch:
    """Sees what is compiled inside ``with watch:``. Nothing is said before ``warm`` is set.

    Args:
        strict: refuse to compile after warm-up.
    """

    def __init__(self, strict: bool) -> None:
        self.warm = False
        self.late: dict[str, str] = {}  # specialisation compiled after warm-up -> its constexprs
        self._strict = strict
        self._tokens: list[Token[JitWatch | None]] = []
        _install()

    def __enter__(self) -> None:
        self._tokens.append(_watching.set(self))

    def __exit__(self, *_: object) -> None:
        _watching.reset(self._tokens.pop())

    def saw(self, name: str, arguments: str) -> None:
        """A launch asks for a specialisation that is not compiled.

        Raises:
            RuntimeError: it is after warm-up, and the watch is strict.
        """
        if not self.warm:
            return
        if self._strict:
            raise RuntimeError(f"strict_jit: a step asks for what warm-up did not compile: {name} ({arguments})")
        if name not in self.late:
            _log.warning("compiling a kernel after warm-up, number %d: %s (%s)", len(self.late) + 1, name, arguments)
        self.late[name] = arguments


def _install() -> None:
    """Have Triton call us before a compilation; a hook that is there already is called first, and decides."""
    from triton import knobs

    from kernels.manifest import specialisation_name

    before: Any = knobs.runtime.jit_cache_hook
    if getattr(before, "watches", False):
        return

    def hook(*, key: str, fn: Any, compile: Any, **rest: Any) -> bool | None:
        left_out: bool | None = None if before is None else before(key=key, fn=fn, compile=compile, **rest)
        watch = _watching.get()
        if watch is not None:
            names = fn.jit_function.arg_names
            values = {names[place[0]]: value for place, value in compile["constants"].items()}
            shown = ", ".join(f"{name}={value}" for name, value in values.items() if name.isupper())
            watch.saw(specialisation_name(fn.name, key), f"{shown}; {compile['num_warps']} warps")
        return left_out

    hook.watches = True  # type: ignore[attr-defined]
    knobs.runtime.jit_cache_hook = hook


def warm_up(run: Callable[[Batch], object], model: ModelConfig) -> None:
    """Run the steps that ask for every specialisation which decoding and prefilling will ask for.

    They write no K or V. The last draws one token.
    """
    for batch in _steps(model):
        run(batch)


def _steps(model: ModelConfig) -> Iterator[Batch]:
    prompt = min(PREFILL, model.context_length)
    yield _batch([prompt], _sampling(1, 0.0))
    for rows in ROWS:
        yield _batch([1] * rows, _sampling(rows, 0.0))
    for rows in HEAD_ROWS:
        sparse = Sparse(np.arange(rows + 1, dtype=np.int32), np.zeros(rows, np.int32), np.ones(rows, np.float32))
        mask = np.full((rows, -(-model.vocab_size // 32)), 2**32 - 1, np.uint32)
        for top_k, bias, allowed in product((0, 1), (None, sparse), (None, mask)):
            drawn = replace(_sampling(rows, 1.0), top_k=np.full(rows, top_k, np.int32))
            yield _batch([1] * rows, replace(drawn, logit_bias=bias, allowed=allowed))


def _sampling(rows: int, temperature: float) -> SamplingBatch:
    def full(value: float, dtype: Any = np.float32) -> Any:
        return np.full(rows, value, dtype)

    zeros = full(0, np.uint32)
    return SamplingBatch(
        full(temperature), full(0, np.int32), full(1), full(0), full(0, np.uint64), zeros, zeros, 0, full(0), full(0),
        full(1),
    )  # fmt: skip


def _batch(counts: list[int], sampling: SamplingBatch) -> Batch:
    """Sequences from position 0 that have this many tokens each, all id 0, and write nothing."""
    starts = np.cumsum([0, *counts]).astype(np.int32)
    return Batch(
        token_ids=np.zeros(starts[-1], np.int32),
        positions=np.concatenate([np.arange(count) for count in counts]).astype(np.int32),
        slots=np.full(starts[-1], -1, np.int64),
        query_starts=starts,
        context_lens=np.array(counts, np.int32),
        block_tables=np.zeros((len(counts), max(counts)), np.int32),
        draw_rows=starts[1:] - 1,
        logits_rows=np.empty(0, np.int32),
        sampling=sampling,
    )
