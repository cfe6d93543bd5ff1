"""The planning floor with a fake executor: every request gets its tokens, no block is lost, limits are kept."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.messages import Drawn, SamplingParams, StepPlan, StepResult
from engine.planning.block_manager import BlockManager
from engine.planning.core import EngineCore
from engine.planning.scheduler import Scheduler
from engine.planning.sequence import Sequence

CONTEXT = 24


def next_token(history: list[int]) -> int:
    """The fake model: a function of the whole window, so that a lost or doubled token shows."""
    return (sum((i + 1) * token for i, token in enumerate(history)) + len(history)) % 50


@dataclass
class FakeModel:
    """Keeps what each block holds, as a backend's KV cache does, and draws from the positions it can see."""

    config: EngineConfig
    block_size: int

    def __post_init__(self) -> None:
        self.cache: dict[tuple[int, int], int] = {}
        self.steps = 0

    def execute(self, plan: StepPlan) -> list[StepResult]:
        """Of the steps that the plan allows some or all run, as a backend may, which need not see who ends."""
        results, blind = [self.step(plan)], self.steps % 2
        while len(results) < plan.num_steps and self.steps % 5:
            assert all(len(part.token_ids) == 1 for part in plan.sequences)
            drawn = [result.token_id for result in results[-1].drawn if result is not None]
            if any(token_id in plan.ending_ids for token_id in drawn) and not blind:
                break
            parts = zip(plan.sequences, drawn, strict=True)
            plan = replace(plan, sequences=[p._replace(token_ids=[i], start=p.start + 1) for p, i in parts])
            results.append(self.step(plan))
        return results

    def step(self, plan: StepPlan) -> StepResult:
        self.steps += 1
        assert sum(len(part.token_ids) for part in plan.sequences) <= self.config.max_num_batched_tokens
        assert 0 < len(plan.sequences) <= self.config.max_num_seqs
        drawn: list[Drawn | None] = []
        for part in plan.sequences:
            for i, token in enumerate(part.token_ids):
                position = part.start + i
                self.cache[part.block_table[position // self.block_size], position % self.block_size] = token
            if part.draw is None:
                drawn.append(None)
                continue
            length = part.start + len(part.token_ids)
            seen = [self.cache[part.block_table[p // self.block_size], p % self.block_size] for p in range(length)]
            drawn.append(Drawn(next_token(seen), -1.0, 1))
        return StepResult(drawn)


def alone(prompt: list[int], max_tokens: int, slide: bool, eos: int | None = None) -> list[int]:
    """What a sequence must give: the loop on the fake model."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens and (slide or len(tokens) <= CONTEXT):
        tokens.append(next_token(tokens[-CONTEXT:]))
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) :]


@given(
    requests=st.lists(st.tuples(st.integers(1, CONTEXT), st.integers(1, 30), st.booleans()), min_size=1, max_size=12),
    max_seqs=st.integers(1, 5),
    budget=st.integers(5, 40),
    num_blocks=st.integers(6, 30),
    block_size=st.sampled_from([4, 5]),
    aborts=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 11)), max_size=4),
    most=st.sampled_from([1, 2, 32]),
    eos=st.sampled_from([None, 7, 20]),
)
@settings(max_examples=300, deadline=None)
def test_any_company_gives_the_same_tokens(
    requests, max_seqs, budget, num_blocks, block_size, aborts, most, eos
) -> None:
    config = EngineConfig(max_num_seqs=max_seqs, max_num_batched_tokens=budget, block_size=block_size)
    blocks = BlockManager(num_blocks, block_size)
    model = FakeModel(config, block_size)
    core = EngineCore(Scheduler(config, blocks), model.execute)
    given_: dict[int, list[int]] = {}
    finished: set[int] = set()
    prompts = {i: [(7 * i + j) % 50 for j in range(length)] for i, (length, _, _) in enumerate(requests)}
    for i, (_, max_tokens, slide) in enumerate(requests):
        given_[i] = []
        params = SamplingParams(max_tokens=max_tokens)
        core.add(Sequence(i, list(prompts[i]), params, 0, 0, CONTEXT, eos_token_id=eos, slide=slide))
    aborted = set()
    while core.has_work:
        for step, victim in aborts:
            if step == model.steps and victim in given_ and victim not in finished:
                core.abort(victim)
                aborted.add(victim)
        if not core.has_work:
            break
        for event in core.step(most):
            given_[event.seq_id].append(event.drawn.token_id)
            if event.finish_reason:
                finished.add(event.seq_id)
        blocks.check_integrity()
    assert blocks.num_free == num_blocks
    for i, (_, max_tokens, slide) in enumerate(requests):
        expected = alone(prompts[i], max_tokens, slide, eos)
        if i in aborted:
            assert given_[i] == expected[: len(given_[i])]
        else:
            assert i in finished
            assert given_[i] == expected


def run_one(sequence: Sequence) -> tuple[list[int], str | None, int | None]:
    config = EngineConfig(max_num_seqs=2, max_num_batched_tokens=64, block_size=4)
    core = EngineCore(Scheduler(config, BlockManager(12, 4)), FakeModel(config, 4).execute)
    core.add(sequence)
    tokens: list[int] = []
    while core.has_work:
        (event,) = core.step()
        tokens.append(event.drawn.token_id)
    return tokens, event.finish_reason, event.stop_reason


def test_end_of_text_and_stop_ids_end_a_sequence() -> None:
    expected = alone([3, 4], 20, False)
    eos = expected[2]
    tokens, reason, stop = run_one(Sequence(0, [3, 4], SamplingParams(max_tokens=20), 0, 0, CONTEXT, eos_token_id=eos))
    first = expected.index(eos) + 1
    assert (tokens, reason, stop) == (expected[:first], "stop", None)
    params = SamplingParams(max_tokens=20, stop_token_ids=[eos])
    assert run_one(Sequence(0, [3, 4], params, 0, 0, CONTEXT)) == (expected[:first], "stop", eos)
    ignoring = SamplingParams(max_tokens=20, ignore_eos=True)
    tokens, reason, _ = run_one(Sequence(0, [3, 4], ignoring, 0, 0, CONTEXT, eos_token_id=eos))
    assert (tokens, reason) == (expected, "length")


def test_context_length_ends_a_sequence() -> None:
    params = SamplingParams(max_tokens=None)
    tokens, reason, _ = run_one(Sequence(0, [1] * 20, params, 0, 0, CONTEXT))
    assert (len(tokens), reason) == (5, "length")  # the last one is drawn from a full context


def test_min_tokens_bans_the_ending_ids() -> None:
    params = SamplingParams(max_tokens=9, min_tokens=2, stop_token_ids=[5])
    sequence = Sequence(0, [1, 2], params, 0, 0, CONTEXT, eos_token_id=7)
    assert sequence.next_draw().banned_token_ids == (5, 7)
    sequence.append(1)
    sequence.append(1)
    assert sequence.next_draw().banned_token_ids == ()


@pytest.mark.parametrize(
    ("options", "prompt", "drawn", "ahead"),
    [
        ({"max_tokens": 9}, 5, 0, 9),
        ({"max_tokens": 9}, 5, 3, 6),
        ({"max_tokens": None}, 20, 0, CONTEXT - 20 + 1),  # the last one fills the context
        ({"max_tokens": 9}, 20, 0, CONTEXT - 20 + 1),
        ({"max_tokens": 9, "min_tokens": 4}, 5, 1, 3),  # then the ending ids can be drawn
        ({"max_tokens": 9, "min_tokens": 4}, 5, 4, 5),
        ({"max_tokens": 9, "stop": "x"}, 5, 0, 1),
        ({"max_tokens": 9, "frequency_penalty": 0.5}, 5, 0, 1),
        ({"max_tokens": 9, "logit_bias": {3: 1.0}, "allowed_token_ids": [1, 3], "logprobs": 2}, 5, 0, 9),
    ],
)
def test_draws_ahead(options: dict[str, Any], prompt: int, drawn: int, ahead: int) -> None:
    sequence = Sequence(0, [1] * prompt, SamplingParams(**options), 0, 0, CONTEXT)
    for _ in range(drawn):
        sequence.append(1)
    assert sequence.num_draws_ahead == ahead


def plan_of(most: int, *sequences: Sequence, budget: int = 64) -> StepPlan:
    config = EngineConfig(max_num_seqs=2, max_num_batched_tokens=budget, block_size=4)
    core = EngineCore(Scheduler(config, BlockManager(12, 4)), FakeModel(config, 4).execute)
    for sequence in sequences:
        core.add(sequence)
    core.step()
    return core._scheduler.plan(most)


def sequence_of(seq_id: int, length: int, **options: Any) -> Sequence:
    return Sequence(seq_id, [1] * length, SamplingParams(**options), 0, 0, CONTEXT, eos_token_id=7)


def test_several_steps_are_for_decoding_alone() -> None:
    short, long = sequence_of(0, 3, max_tokens=5), sequence_of(1, 9, stop_token_ids=[30], ignore_eos=True)
    plan = plan_of(32, short, long)
    assert (plan.num_steps, set(plan.ending_ids)) == (4, {7, 30})  # what ends either of them
    assert plan_of(3, sequence_of(0, 3)).num_steps == 3
    assert plan_of(1, sequence_of(0, 3)).num_steps == 1
    for budget in (2, 5):
        plan = plan_of(32, sequence_of(0, 3), sequence_of(1, 9), budget=budget)  # a prompt in chunks, of 1 and of 4
        assert [(len(part.token_ids), part.draw is None) for part in plan.sequences] == [(1, False), (budget - 1, True)]
        assert plan.num_steps == 1
    assert plan_of(32, sequence_of(0, 3, ignore_eos=True)).ending_ids == ()
    waiting = [sequence_of(0, 3, max_tokens=5), sequence_of(1, 3, max_tokens=6), sequence_of(2, 3)]
    assert plan_of(32, *waiting).num_steps == 4  # until there is a place


def test_a_sequence_that_can_never_fit_is_refused() -> None:
    config = EngineConfig(max_num_seqs=2, max_num_batched_tokens=64, block_size=4)
    scheduler = Scheduler(config, BlockManager(3, 4))
    with pytest.raises(ValueError, match="can reach 16 tokens, 4 blocks of the KV cache, which has 3"):
        scheduler.add(Sequence(0, [1] * 8, SamplingParams(max_tokens=8), 0, 0, CONTEXT))
    scheduler.add(Sequence(0, [1] * 8, SamplingParams(max_tokens=4), 0, 0, CONTEXT))


def test_blocks_freed_twice_are_noticed() -> None:
    blocks = BlockManager(4, 4)
    table = blocks.allocate(2)
    blocks.free(table)
    with pytest.raises(AssertionError):
        blocks.free(table)
