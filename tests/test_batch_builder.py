"""The arrays of a batch are those that the plan says, entry by entry, whatever the steps before were."""

import random
from typing import Any

import numpy as np
import pytest

from engine.backends.base import Batch
from engine.execution.batch_builder import BatchBuilder
from engine.messages import Draw, SamplingParams, SequencePlan, StepPlan

BLOCK, BLOCKS, SEQS, VOCAB = 4, 8, 6, 70
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"top_k": 7, "top_p": 0.5, "min_p": 0.1},
    {"presence_penalty": 0.5},
    {"repetition_penalty": 2.0, "frequency_penalty": -0.5},
    {"logit_bias": {3: 1.5, 69: -2.0}},
    {"allowed_token_ids": [1, 2, 64]},
    {"logprobs": 0},
    {"logprobs": 4, "temperature": 0.7},
]


def entry_by_entry(plan: StepPlan) -> dict[str, Any]:
    """The batch as lists, each entry from the plan alone."""
    made: dict[str, Any] = {name: [] for name in ("token_ids", "positions", "slots", "previous", "draws", "logits")}
    made |= {"starts": [0], "lens": [], "tables": []}
    for part in plan.sequences:
        for i, token in enumerate(part.token_ids):
            position = part.start + i
            made["token_ids"].append(token)
            made["positions"].append(position)
            made["slots"].append(part.block_table[position // BLOCK] * BLOCK + position % BLOCK)
            last = i + 1 == len(part.token_ids)
            made["previous"].append(part.previous_row if last and part.take_previous else -1)
        end = len(made["token_ids"])
        made["starts"].append(end)
        made["lens"].append(part.start + len(part.token_ids))
        made["tables"].append(list(part.block_table))
        if part.draw is not None:
            made["draws"].append(end - 1)
        made["logits"].extend(range(end - part.num_logits, end))
    return made


def check(batch: Batch, plan: StepPlan) -> None:
    wanted = entry_by_entry(plan)
    arrays = (batch.token_ids, batch.positions, batch.slots, batch.query_starts, batch.context_lens)
    for array, name in zip(arrays, ("token_ids", "positions", "slots", "starts", "lens"), strict=True):
        assert array.tolist() == wanted[name], name
    assert [array.dtype for array in arrays] == [np.int32, np.int32, np.int64, np.int32, np.int32]
    for row, blocks in zip(batch.block_tables, wanted["tables"], strict=True):
        assert row[: len(blocks)].tolist() == blocks
    assert (batch.draw_rows.tolist(), batch.draw_rows.dtype) == (wanted["draws"], np.int32)
    assert (batch.logits_rows.tolist(), batch.logits_rows.dtype) == (wanted["logits"], np.int32)
    if any(part.take_previous for part in plan.sequences):
        assert batch.previous_rows is not None
        assert batch.previous_rows.tolist() == wanted["previous"]
    else:
        assert batch.previous_rows is None
    check_sampling(batch, [part.draw for part in plan.sequences if part.draw is not None])


def check_sampling(batch: Batch, draws: list[Draw]) -> None:
    s = batch.sampling
    if s is None:
        assert not draws
        return
    for r, draw in enumerate(draws):
        p = draw.params
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
            assert getattr(s, name)[r] == np.float32(getattr(p, name)), name
        assert (s.seeds[r], s.positions[r], s.sample_index[r]) == (draw.seed, draw.position, draw.sample_index)
        assert s.top_k[r] == max(0, p.top_k)
        allowed = set(range(VOCAB)) if p.allowed_token_ids is None else set(p.allowed_token_ids)
        allowed -= set(draw.banned_token_ids)
        if s.allowed is None:
            assert allowed == set(range(VOCAB))
        else:
            assert {i for i in range(96) if s.allowed[r, i >> 5] >> np.uint32(i & 31) & np.uint32(1)} == allowed
        counts = dict.fromkeys(draw.history[: draw.num_prompt_tokens], 0.0)
        for i in draw.history[draw.num_prompt_tokens :]:
            counts[i] = counts.get(i, 0.0) + 1
        for sparse, values in ((s.output_counts, counts), (s.logit_bias, p.logit_bias or {})):
            if sparse is None:
                assert not values
            else:
                place = slice(sparse.starts[r], sparse.starts[r + 1])
                assert dict(zip(sparse.ids[place].tolist(), sparse.values[place].tolist(), strict=True)) == values
        assert s.token_only is not None
        plain = p == SamplingParams(temperature=p.temperature) and allowed == set(range(VOCAB))
        assert s.token_only[r] == plain
    assert s.num_logprobs == max(draw.params.logprobs or 0 for draw in draws)
    assert s.ranks == any(draw.params.logprobs is not None for draw in draws)


def random_plan(rng: random.Random, params: list[SamplingParams], tables: list[Any]) -> StepPlan:
    parts = []
    for seq_id in range(rng.randint(1, SEQS)):
        start, count = rng.randrange(20), rng.choice([1, 1, 1, rng.randint(1, 12)])
        p = rng.choice(params)
        history = tuple(rng.randrange(VOCAB) for _ in range(9)) if p.has_penalties else ()
        banned = (5, 66) if rng.random() < 0.05 else ()
        draw = Draw(p, rng.getrandbits(64), rng.randrange(99), rng.randrange(3), history, 4, banned)
        parts.append(
            SequencePlan(
                seq_id,
                [rng.randrange(VOCAB) for _ in range(count)],
                start,
                rng.choice(tables),
                draw if rng.random() < 0.9 else None,
                num_logits=rng.randint(0, count) if rng.random() < 0.2 else 0,
                take_previous=rng.random() < 0.1,
                previous_row=rng.randrange(4),
            )
        )
    return StepPlan(parts)


@pytest.mark.parametrize("seed", range(20))
def test_any_steps(seed: int) -> None:
    """Few tables and options, so that a row often finds what it had, and what another had that is equal."""
    rng = random.Random(seed)
    tables: list[Any] = [tuple(rng.sample(range(64), BLOCKS)) for _ in range(3)]
    tables += [range(8, 16), range(16, 24), list(range(BLOCKS))]
    builder = BatchBuilder(128, SEQS, BLOCKS, BLOCK, VOCAB)
    for _ in range(60):
        if rng.random() < 0.2:
            rng.shuffle(tables[-1])  # a list may change under the same name
        chosen = rng.sample(OPTIONS, 2)
        params = [SamplingParams(**options) for options in chosen]
        for _ in range(rng.randint(1, 3)):
            plan = random_plan(rng, params, tables)
            check(builder.build(plan), plan)


def test_the_same_requests_step_by_step() -> None:
    """A decode: positions and seeds are new, options and tables are not."""
    builder = BatchBuilder(128, SEQS, BLOCKS, BLOCK, VOCAB)
    params = SamplingParams(temperature=0.5)
    tables = [tuple(range(8 * s, 8 * s + 8)) for s in range(SEQS)]
    for step in range(20):
        live = [s for s in range(SEQS) if s != step // 5]  # one leaves and another comes in, with the same options
        plan = StepPlan([SequencePlan(s, [step], step, tables[s], Draw(params, s, step, 0)) for s in live])
        check(builder.build(plan), plan)


def test_the_same_streams_with_other_options() -> None:
    """What is kept of the step before belongs to its options and to its streams, not to either alone."""
    builder = BatchBuilder(128, SEQS, BLOCKS, BLOCK, VOCAB)
    rng = random.Random(5)
    for step in range(60):
        options = [SamplingParams(**rng.choice(OPTIONS[:3])) for _ in range(2)]
        streams = [rng.choice([(7, 0), (7, 1), (2**64 - 1, 0)]) for _ in range(2)]
        draws = [Draw(p, seed, step, index) for p, (seed, index) in zip(options, streams, strict=True)]
        plan = StepPlan([SequencePlan(s, [step], 0, (s,), draw) for s, draw in enumerate(draws)])
        check(builder.build(plan), plan)


def test_a_table_that_is_too_short() -> None:
    builder = BatchBuilder(128, SEQS, BLOCKS, BLOCK, VOCAB)
    builder.build(StepPlan([SequencePlan(0, [1], 30, tuple(range(8)))]))
    with pytest.raises(IndexError):
        builder.build(StepPlan([SequencePlan(0, [1], 30, tuple(range(7)))]))
