"""From a ``StepPlan`` to the arrays of a ``Batch``, in buffers that are made once."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from engine.backends.base import Batch, SamplingBatch, Sparse
from engine.messages import Draw, StepPlan


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
        self._vocab_size = vocab_size
        self._token_ids = np.zeros(max_tokens, np.int32)
        self._positions = np.zeros(max_tokens, np.int32)
        self._slots = np.zeros(max_tokens, np.int64)
        self._previous = np.full(max_tokens, -1, np.int32)
        self._query_starts = np.zeros(max_seqs + 1, np.int32)
        self._context_lens = np.zeros(max_seqs, np.int32)
        self._block_tables = np.zeros((max_seqs, max_blocks), np.int32)

    def build(self, plan: StepPlan) -> Batch:
        """The batch of ``plan``; draws and logits rows are in the order of its sequences."""
        end, width, uses_previous = 0, 1, False
        draws: list[Draw] = []
        draw_rows: list[int] = []
        logits_rows: list[int] = []
        for s, part in enumerate(plan.sequences):
            start, count = end, len(part.token_ids)
            end = start + count
            self._token_ids[start:end] = part.token_ids
            self._positions[start:end] = np.arange(part.start, part.start + count)
            table = np.asarray(part.block_table, np.int32)
            self._block_tables[s, : len(table)] = table
            width = max(width, len(table))
            positions = self._positions[start:end]
            blocks = table[positions // self._block_size].astype(np.int64)
            self._slots[start:end] = blocks * self._block_size + positions % self._block_size
            self._previous[start:end] = -1
            if part.take_previous:
                self._previous[end - 1] = part.previous_row
                uses_previous = True
            self._query_starts[s + 1] = end
            self._context_lens[s] = part.start + count
            if part.draw is not None:
                draw_rows.append(end - 1)
                draws.append(part.draw)
            logits_rows.extend(range(end - part.num_logits, end))
        num_seqs = len(plan.sequences)
        return Batch(
            token_ids=self._token_ids[:end],
            positions=self._positions[:end],
            slots=self._slots[:end],
            query_starts=self._query_starts[: num_seqs + 1],
            context_lens=self._context_lens[:num_seqs],
            block_tables=self._block_tables[:num_seqs, :width],
            draw_rows=np.asarray(draw_rows, np.int32),
            logits_rows=np.asarray(logits_rows, np.int32),
            sampling=_sampling(draws, self._vocab_size) if draws else None,
            previous_rows=self._previous[:end] if uses_previous else None,
            block_copies=np.asarray(plan.block_copies, np.int32) if plan.block_copies else None,
        )


def _sampling(draws: Sequence[Draw], vocab_size: int) -> SamplingBatch:
    params = [draw.params for draw in draws]
    floats = {
        name: np.asarray([getattr(p, name) for p in params], np.float32)
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    }
    masked = any(p.allowed_token_ids is not None for p in params) or any(draw.banned_token_ids for draw in draws)
    return SamplingBatch(
        **floats,
        top_k=np.asarray([max(0, p.top_k) for p in params], np.int32),
        seeds=np.asarray([draw.seed for draw in draws], np.uint64),
        positions=np.asarray([draw.position for draw in draws], np.uint32),
        sample_index=np.asarray([draw.sample_index for draw in draws], np.uint32),
        num_logprobs=max(p.logprobs or 0 for p in params),
        output_counts=_sparse(map(_history_counts, draws)) if any(p.has_penalties for p in params) else None,
        logit_bias=_sparse((p.logit_bias or {}).items() for p in params) if any(p.logit_bias for p in params) else None,
        allowed=np.stack([_allowed_bits(draw, vocab_size) for draw in draws]) if masked else None,
        ranks=any(p.logprobs is not None for p in params),
        token_only=np.asarray([_is_token_only(draw) for draw in draws], np.bool_),
    )


def _is_token_only(draw: Draw) -> bool:
    """Whether the token is drawn with no option but a temperature, and its logprob is not asked for."""
    p = draw.params
    filtered = p.temperature > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0)
    edited = p.has_penalties or p.logit_bias or p.allowed_token_ids is not None or draw.banned_token_ids
    return p.logprobs is None and not filtered and not edited


def _history_counts(draw: Draw) -> Iterable[tuple[int, float]]:
    """(id, times generated) of every id of the sequence; ids of the prompt alone have 0."""
    counts = Counter(dict.fromkeys(draw.history[: draw.num_prompt_tokens], 0))
    counts.update(draw.history[draw.num_prompt_tokens :])
    return counts.items()


def _sparse(rows: Iterable[Iterable[tuple[int, float]]]) -> Sparse:
    starts, ids, values = [0], [], []
    for row in rows:
        for token_id, value in row:
            ids.append(token_id)
            values.append(value)
        starts.append(len(ids))
    return Sparse(np.asarray(starts, np.int32), np.asarray(ids, np.int32), np.asarray(values, np.float32))


def _allowed_bits(draw: Draw, vocab_size: int) -> npt.NDArray[np.uint32]:
    """[ceil(vocab_size / 32)] words; bit (id & 31) of word (id >> 5) is set where the id may be drawn."""
    allowed = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    if draw.params.allowed_token_ids is None:
        allowed[:vocab_size] = 1
    else:
        allowed[list(draw.params.allowed_token_ids)] = 1
    allowed[list(draw.banned_token_ids)] = 0
    return np.packbits(allowed, bitorder="little").view("<u4").astype(np.uint32)
