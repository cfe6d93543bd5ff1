"""Which tokens of which sequences run next.

First come, first served, under a budget of tokens a step: running sequences take their next token, then what is left
of the budget goes to prompts, in chunks where they do not fit. A sequence is admitted when the KV cache has room for
the longest it can become, so that nothing that runs is ever stopped for lack of blocks.
"""

from collections import OrderedDict

from engine.config import EngineConfig
from engine.messages import Event, SequencePlan, StepPlan, StepResult, UndrawableRow
from engine.planning.block_manager import BlockManager
from engine.planning.sequence import Sequence


class Scheduler:
    """Owns the sequences. ``plan`` and ``commit`` alternate.

    Args:
        config: ``max_num_seqs`` and ``max_num_batched_tokens`` are the limits of a step.
        blocks: the KV cache's blocks.
    """

    def __init__(self, config: EngineConfig, blocks: BlockManager) -> None:
        self._config = config
        self._blocks = blocks
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()  # in order of arrival
        self._running: dict[int, Sequence] = {}  # in order of admission

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._waiting or self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises as ``check``."""
        self.check(sequence)
        self._waiting[sequence.seq_id] = sequence

    def check(self, sequence: Sequence) -> None:
        """Refuse a sequence that the KV cache could never hold.

        Raises:
            ValueError: with the blocks that it can come to need and those that there are.
        """
        needed = self._blocks.blocks_for(sequence.max_positions)
        if needed > self._blocks.num_blocks:
            raise ValueError(
                f"the sequence can reach {sequence.max_positions} tokens, {needed} blocks of the KV cache, which has "
                f"{self._blocks.num_blocks}: lower max_tokens, or raise kv_cache_memory_bytes"
            )

    def abort(self, seq_id: int) -> None:
        """Forget a sequence and free its blocks; one that is not here (any more) is ignored."""
        if seq_id in self._running:
            self._blocks.free(self._running.pop(seq_id).block_table)
        else:
            self._waiting.pop(seq_id, None)

    def plan(self, most: int = 1) -> StepPlan:
        """The next step, or steps, at most ``most``; empty only when there is no work."""
        self._admit()
        budget = self._config.max_num_batched_tokens
        parts: list[SequencePlan] = []
        pending = [(sequence, sequence.num_pending) for sequence in self._running.values()]
        # A stable sort: sequences with one pending token, which wait on nobody, come first.
        for sequence, wanted in sorted(pending, key=lambda entry: entry[1] > 1):
            count = min(wanted, budget)
            if count == 0:
                break
            budget -= count
            parts.append(
                SequencePlan(
                    seq_id=sequence.seq_id,
                    token_ids=sequence.pending_tokens(count),
                    start=sequence.num_computed,
                    block_table=sequence.block_table,
                    draw=sequence.next_draw() if count == wanted else None,
                )
            )
        if most == 1 or not parts or not all(len(part.token_ids) == 1 and part.draw for part in parts):
            return StepPlan(parts)
        # Until one of them ends nothing changes: who waits now waits for blocks or a place.
        running = self._running.values()
        most = min(most, *(sequence.num_draws_ahead for sequence in running))
        endings = {token_id for sequence in running for token_id in sequence.final_ids}
        return StepPlan(parts, num_steps=most, ending_ids=tuple(endings))

    def fail(self, plan: StepPlan, error: UndrawableRow) -> Event:
        """End the sequence that a plan cannot be run with; the others stand where they stood before it."""
        drawing = [part.seq_id for part in plan.sequences if part.draw is not None]
        self.abort(drawing[error.row])
        return Event(drawing[error.row], None, "error", str(error))

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._config.max_num_seqs:
            sequence = next(iter(self._waiting.values()))
            needed = self._blocks.blocks_for(sequence.max_positions)
            if needed > self._blocks.num_free:
                return
            del self._waiting[sequence.seq_id]
            sequence.block_table = self._blocks.allocate(needed)
            self._running[sequence.seq_id] = sequence

    def commit(self, plan: StepPlan, result: StepResult) -> list[Event]:
        """Take what a step gave. Sequences that ended or were aborted since the plan was made are passed over."""
        events = []
        for part, drawn in zip(plan.sequences, result.drawn, strict=True):
            sequence = self._running.get(part.seq_id)
            if sequence is None:
                continue
            sequence.num_computed += len(part.token_ids)
            if drawn is None:
                continue
            finish_reason, stop_reason = sequence.append(drawn.token_id)
            if finish_reason is not None:
                self.abort(part.seq_id)
            events.append(Event(part.seq_id, drawn, finish_reason, stop_reason))
        return events
