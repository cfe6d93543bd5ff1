"""From a ``StepPlan`` to the arrays of a ``Batch``, in buffers that are made once.

A decode step has one token of every sequence, and a small model takes a fraction of a millisecond for it. So arrays are
filled once a step from lists, not once a sequence, and what the step before had too is kept.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.backends.base import Batch, SamplingBatch, Sparse
from engine.messages import Draw, SamplingParams, StepPlan


class BatchBuilder:
    """Fills the same buffers at every call: a batch is valid until the next one is built.

    Args:
        max_tokens: tokens that a step may run.
        max_seqs: sequences that a step may run.
        max_blocks: blocks that a sequence may have.
        block_size: tokens in a block.
        vocab_size: width of the allowed-token mask.
    """

    def __init__(self, max_tokens: int, max_seqs: int, max_blocks: int, block_size: int, vocab_size: int) -> None:
        self._block_size = block_size
        self._token_ids = np.zeros(max_tokens, np.int32)
        self._positions = np.zeros(max_tokens, np.int32)
        self._slots = np.zeros(max_tokens, np.int64)
        self._previous = np.full(max_tokens, -1, np.int32)
        self._query_starts = np.zeros(max_seqs + 1, np.int32)
        self._context_lens = np.zeros(max_seqs, np.int32)
        self._block_tables = np.zeros((max_seqs, max_blocks), np.int32)
        self._tables: list[Sequence[int]] = [()] * max_seqs  # what the rows of _block_tables hold
        self._sampling = _SamplingBuilder(max_seqs, vocab_size)

    def build(self, plan: StepPlan) -> Batch:
        """The batch of ``plan``; draws and logits rows are in the order of its sequences."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        ends: list[int] = []
        context_lens: list[int] = []
        draw_rows: list[int] = []
        logits_rows: list[int] = []
        previous: list[tuple[int, int]] = []
        draws: list[Draw] = []
        for part in plan.sequences:
            stop = part.start + len(part.token_ids)
            token_ids += part.token_ids
            positions += range(part.start, stop)
            self._append_slots(slots, part.block_table, part.start, stop)
            end = len(token_ids)
            ends.append(end)
            context_lens.append(stop)
            if part.draw is not None:
                draw_rows.append(end - 1)
                draws.append(part.draw)
            if part.num_logits:
                logits_rows += range(end - part.num_logits, end)
            if part.take_previous:
                previous.append((end - 1, part.previous_row))
        seqs, end = len(ends), len(token_ids)
        self._token_ids[:end] = token_ids
        self._positions[:end] = positions
        self._slots[:end] = slots
        self._query_starts[1 : seqs + 1] = ends
        self._context_lens[:seqs] = context_lens
        if previous:
            self._previous[:end] = -1
            for row, previous_row in previous:
                self._previous[row] = previous_row
        return Batch(
            token_ids=self._token_ids[:end],
            positions=self._positions[:end],
            slots=self._slots[:end],
            query_starts=self._query_starts[: seqs + 1],
            context_lens=self._context_lens[:seqs],
            block_tables=self._tables_of(plan),
            draw_rows=np.asarray(draw_rows, np.int32),
            logits_rows=np.asarray(logits_rows, np.int32),
            sampling=self._sampling.build(draws) if draws else None,
            previous_rows=self._previous[:end] if previous else None,
            block_copies=np.asarray(plan.block_copies, np.int32) if plan.block_copies else None,
            num_steps=plan.num_steps,
            ending_ids=np.asarray(plan.ending_ids, np.int32) if plan.ending_ids else None,
        )

    def _append_slots(self, slots: list[int], table: Sequence[int], start: int, stop: int) -> None:
        """Append where positions [start, stop) lie, block by block."""
        size = self._block_size
        while start < stop:
            block = start // size
            shift = (table[block] - block) * size
            end = min(stop, (block + 1) * size)
            slots += range(start + shift, end + shift)
            start = end

    def _tables_of(self, plan: StepPlan) -> npt.NDArray[np.int32]:
        """[S, B], of which only the rows that changed are written."""
        width = 1
        for row, part in enumerate(plan.sequences):
            table, held = part.block_table, self._tables[row]
            width = max(width, len(table))
            if table is held:
                continue
            if table != held:
                self._block_tables[row, : len(table)] = table
            self._tables[row] = table if isinstance(table, tuple | range) else ()  # those are the same for ever
        return self._block_tables[: len(plan.sequences), :width]


class _SamplingBuilder:
    """Makes the options of a step's draws. In most steps the same samples draw as before and only positions change."""

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._positions = np.zeros(max_rows, np.uint32)
        self._params: list[SamplingParams] = []
        self._options: dict[str, Any] = {}  # for these
        self._streams: list[tuple[int, int]] = []
        self._kept: SamplingBatch | None = None  # for both, but for histories and masks

    def build(self, draws: Sequence[Draw]) -> SamplingBatch:
        params = [draw.params for draw in draws]
        streams = [(draw.seed, draw.sample_index) for draw in draws]
        self._positions[: len(draws)] = [draw.position for draw in draws]
        if params != self._params:
            self._options, self._kept = _of_params(params), None
        if self._kept is None or streams != self._streams:
            self._kept = SamplingBatch(
                seeds=np.asarray([seed for seed, _ in streams], np.uint64),
                positions=self._positions[: len(draws)],
                sample_index=np.asarray([index for _, index in streams], np.uint32),
                **self._options,
            )
        self._params, self._streams = params, streams  # so that the next comparison finds the same objects
        changes: dict[str, Any] = {}
        if any(p.has_penalties for p in params):
            changes["output_counts"] = _sparse([_history_counts(draw) for draw in draws])
        banned = [bool(draw.banned_token_ids) for draw in draws]
        if any(banned) or any(p.allowed_token_ids is not None for p in params):
            changes["allowed"] = np.stack([_allowed_bits(draw, self._vocab_size) for draw in draws])
            changes["token_only"] = self._kept.token_only & ~np.asarray(banned)
        return replace(self._kept, **changes) if changes else self._kept


def _of_params(params: Sequence[SamplingParams]) -> dict[str, Any]:
    """The fields of a ``SamplingBatch`` that are functions of the options."""
    floats = {
        name: _as_float32([getattr(p, name) for p in params])
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    }
    biased = any(p.logit_bias for p in params)
    return floats | {
        "top_k": np.asarray([min(max(0, p.top_k), 2**31 - 1) for p in params], np.int32),
        "num_logprobs": max(p.logprobs or 0 for p in params),
        "logit_bias": _sparse([p.logit_bias or {} for p in params]) if biased else None,
        "ranks": any(p.logprobs is not None for p in params),
        "token_only": np.asarray([_is_token_only(p) for p in params], np.bool_),
    }


def _as_float32(values: Sequence[float]) -> npt.NDArray[np.float32]:
    """The nearest float32; of a positive one that is positive, too, and finite."""
    wide, limits = np.asarray(values, np.float64), np.finfo(np.float32)
    return np.where(wide > 0, np.clip(wide, limits.tiny, limits.max), wide).astype(np.float32)


def _is_token_only(p: SamplingParams) -> bool:
    """Whether the token is drawn with no option but a temperature, and its logprob is not asked for."""
    filtered = p.temperature > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0)
    edited = p.has_penalties or p.logit_bias or p.allowed_token_ids is not None
    return p.logprobs is None and not filtered and not edited


def _history_counts(draw: Draw) -> Mapping[int, float]:
    """Id -> times generated, for every id of the sequence; ids of the prompt alone have 0."""
    counts = Counter(dict.fromkeys(draw.history[: draw.num_prompt_tokens], 0))
    counts.update(draw.history[draw.num_prompt_tokens :])
    return counts


def _sparse(rows: Sequence[Mapping[int, float]]) -> Sparse:
    return Sparse(
        starts=np.cumsum([0, *map(len, rows)], dtype=np.int32),
        ids=np.fromiter(chain.from_iterable(rows), np.int32),
        values=np.fromiter(chain.from_iterable(row.values() for row in rows), np.float32),
    )


def _allowed_bits(draw: Draw, vocab_size: int) -> npt.NDArray[np.uint32]:
    """[ceil(vocab_size / 32)] words; bit (id & 31) of word (id >> 5) is set where the id may be drawn."""
    allowed = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    if draw.params.allowed_token_ids is None:
        allowed[:vocab_size] = 1
    else:
        allowed[list(draw.params.allowed_token_ids)] = 1
    allowed[list(draw.banned_token_ids)] = 0
    return np.packbits(allowed, bitorder="little").view("<u4").astype(np.uint32)
