"""Several steps in one call of the native backend: what they give, step by step, when they end, what is refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from models import random_weights, tiny_config
from native_steps import BLOCK, TOLERANCE, batch, ids_of, logits_of, make, neutral, run_in_process

from engine.backends.base import Batch, StepOutput
from engine.backends.native_backend import NativeBackend

CONFIG = tiny_config()
PROMPTS = [ids_of(seed, length, CONFIG) for seed, length in ((1, 7), (2, 19), (3, 4))]
FIELDS = ("token_ids", "logprobs", "ranks", "top_ids", "top_logprobs")
STEPS = 12


def decode(step: int, token_ids: list[int], **changes: object) -> Batch:
    """Step ``step`` after the prompts: a token of every sequence and a draw after it."""
    rows = range(len(token_ids))
    parts = [(row, len(PROMPTS[row]) + step, [token_ids[row]]) for row in rows]
    positions = np.array([11 + row + step for row in rows], np.uint32)
    sampling = neutral(len(token_ids), num_logprobs=3, top_k=np.full(len(token_ids), 20, np.int32), positions=positions)
    return replace(batch(parts, "none", sampling, list(rows)), **changes)  # type: ignore[arg-type]


def prepared(dtype: str = "float32", threads: int = 2) -> NativeBackend:
    backend = make(CONFIG, dtype, threads)
    for row, ids in enumerate(PROMPTS):
        logits_of(backend, [(row, 0, ids)])
    return backend


def one_by_one(backend: NativeBackend, first: list[int], steps: int = STEPS) -> list[StepOutput]:
    outputs, ids = [], first
    for step in range(steps):
        outputs.append(backend.collect(backend.submit(decode(step, ids))))
        ids = outputs[-1].token_ids.tolist()
    return outputs


def together(backend: NativeBackend, first: list[int], steps: int = STEPS, **changes: object) -> StepOutput:
    return backend.collect(backend.submit(decode(0, first, num_steps=steps, **changes)))


def assert_same(got: StepOutput, wanted: list[StepOutput]) -> None:
    for name in FIELDS:
        assert np.array_equal(getattr(got, name), np.concatenate([getattr(output, name) for output in wanted])), name


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", sorted(TOLERANCE))
def test_the_same_bits_as_step_by_step(dtype: str, threads: int) -> None:
    """The draws, their logprobs, and K and V, as the logits of a step after all show."""
    by_step, at_once = prepared(dtype), prepared(dtype, threads)
    wanted = one_by_one(by_step, [5, 6, 7])
    assert_same(together(at_once, [5, 6, 7]), wanted)
    assert len({int(i) for output in wanted for i in output.token_ids}) > 10  # nor is it one token for ever
    after = [(row, len(PROMPTS[row]) + STEPS, [9]) for row in range(3)]
    assert torch.equal(logits_of(at_once, after), logits_of(by_step, after))


def test_the_first_token_may_come_from_the_step_before() -> None:
    backend = prepared()
    wanted = one_by_one(backend, [5, 6, 7], 6)
    backend = prepared()
    backend.collect(backend.submit(decode(0, [5, 6, 7])))
    rows = np.arange(3, dtype=np.int32)
    pending = replace(decode(1, [0, 0, 0]), num_steps=5, previous_rows=rows)
    assert_same(backend.collect(backend.submit(pending)), wanted[1:])
    follow = decode(6, [0, 0, 0], previous_rows=rows)  # of the last of them
    got = backend.collect(backend.submit(follow)).token_ids.tolist()
    backend = prepared()
    assert got == one_by_one(backend, [5, 6, 7], 7)[-1].token_ids.tolist()


def test_block_copies_are_made_once() -> None:
    """A copy repeated in a later step would undo what the first wrote."""
    copies = np.array([[1, 2]], np.int32)  # sequence 1's first block over sequence 2's
    by_step, at_once = prepared(), prepared()
    wanted = [by_step.collect(by_step.submit(decode(0, [5, 6, 7], block_copies=copies)))]
    for step in range(1, 5):
        wanted.append(by_step.collect(by_step.submit(decode(step, wanted[-1].token_ids.tolist()))))
    assert_same(together(at_once, [5, 6, 7], 5, block_copies=copies), wanted)


def test_an_ending_id_of_any_sequence_ends_them() -> None:
    wanted = one_by_one(prepared(), [5, 6, 7])
    drawn = {int(i) for output in wanted for i in output.token_ids}
    never = next(i for i in range(CONFIG.vocab_size) if i not in drawn)
    seen: set[int] = set()
    for step, output in enumerate(wanted):
        for token_id in set(output.token_ids.tolist()) - seen:
            endings = np.array([never, token_id], np.int32)
            assert_same(together(prepared(), [5, 6, 7], ending_ids=endings), wanted[: step + 1])
        seen |= set(output.token_ids.tolist())
    assert_same(together(prepared(), [5, 6, 7], ending_ids=np.array([never], np.int32)), wanted)


def test_a_later_step_that_cannot_be_drawn_did_not_run() -> None:
    """NaN at one position: the tokens before it are given, and the step that comes to it alone is an error."""
    weights = random_weights(CONFIG, scale=0.15)
    weights["pos_emb"][len(PROMPTS[1]) + 3] = float("nan")
    backend = prepared()
    wanted = one_by_one(prepared(), [5, 6, 7], 3)
    backend.update_weights(weights)
    got = together(backend, [5, 6, 7])
    assert_same(got, wanted)
    rows = np.arange(3, dtype=np.int32)  # of the last step that was given, not of the one that was not
    with pytest.raises(ValueError, match="no token can be drawn"):
        backend.collect(backend.submit(decode(3, [0, 0, 0], previous_rows=rows)))
    here = replace(decode(3, got.token_ids[-3:].tolist()), num_steps=4)
    after = replace(batch([(0, len(PROMPTS[0]) + 4, [1])]), slots=np.array([-1]))  # sees what K and V there have been
    before = backend.collect(backend.submit(after)).logits
    for _ in range(2):
        with pytest.raises(ValueError, match="no token can be drawn from the logits of drawn row 1"):
            backend.collect(backend.submit(here))
        with pytest.raises(ValueError, match="token id drawn before -1"):
            backend.submit(decode(4, [0, 0, 0], previous_rows=np.array([1, 1, 1], np.int32)))
    now = backend.collect(backend.submit(after)).logits
    assert before is not None
    assert now is not None
    assert torch.equal(now, before)  # no step followed it


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, r"number of steps 0 is out of range: it must be in \[1, 65\)"),
        ({"num_steps": 66}, "number of steps 66"),
        ({"num_steps": 46}, r"position in the last step 64 is out of range: it must be in \[0, 64\)"),
        ({"num_steps": 3, "block_tables": np.array([[0, 1, 2, 3]] * 3, np.int32)}, r"in the last step 22 .* \[0, 21\)"),
        ({"num_steps": 20, "block_tables": np.array([[0, 1, 2, 3, 4, 5, 6, 99]] * 3, np.int32)}, "block 99"),
        ({"num_steps": 2, "logits_rows": np.array([0], np.int32)}, "num_steps is 2: several steps need one token"),
        ({"num_steps": 2, "draw_rows": np.array([0, 2, 1], np.int32)}, "num_steps is 2"),
        ({"num_steps": 2, "draw_rows": np.array([0, 2], np.int32), "sampling": neutral(2)}, "num_steps is 2"),
        ({"num_steps": 2, "query_starts": np.array([0, 2, 2, 3], np.int32)}, "num_steps is 2"),
        ({"ending_ids": np.array([1], np.int64)}, "ending_ids must be a contiguous array of int32"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    backend = prepared()
    with pytest.raises(ValueError, match=message):
        backend.submit(replace(decode(0, [5, 6, 7]), **changes))
    assert_same(together(backend, [5, 6, 7]), one_by_one(prepared(), [5, 6, 7]))


def test_penalties_are_refused() -> None:
    from engine.backends.base import Sparse

    counts = Sparse(np.array([0, 1, 1, 1], np.int32), np.array([4], np.int32), np.array([1], np.float32))
    step = decode(0, [5, 6, 7], num_steps=2)
    assert step.sampling is not None
    with pytest.raises(ValueError, match="no logits and no penalties"):
        prepared().submit(replace(step, sampling=replace(step.sampling, output_counts=counts)))


def test_the_blocks_that_later_steps_need_are_checked_and_no_others() -> None:
    tables = decode(0, [5, 6, 7]).block_tables.copy()
    tables[:, -(-(len(PROMPTS[1]) + STEPS) // BLOCK) :] = 10**6
    got = together(prepared(), [5, 6, 7], block_tables=tables)
    assert_same(got, one_by_one(prepared(), [5, 6, 7]))


def test_hundreds_of_steps_need_room_for_hundreds_of_scores() -> None:
    config = tiny_config(context_length=600, embed_dim=16, n_heads=1)
    backend = NativeBackend(config, random_weights(config), dtype="float32", device="cpu", block_size=64, threads=1)
    backend.allocate(96)
    first = replace(batch([(0, 0, [3])], "none", neutral(1), [0], block=64), num_steps=600)
    tokens = backend.collect(backend.submit(first)).token_ids.tolist()
    assert len(tokens) == 600
    ids = [3, *tokens[:-1]]
    same = neutral(600, seeds=np.full(600, 5, np.uint64), positions=np.arange(11, 611, dtype=np.uint32))
    whole = batch([(0, 0, ids)], "none", same, list(range(600)), block=64)
    assert backend.collect(backend.submit(whole)).token_ids.tolist() == tokens


LONG_RUN = """
import os, signal, threading, time
import numpy as np
from dataclasses import replace
from native_steps import batch, ids_of, logits_of, neutral
from models import random_weights, tiny_config
from engine.backends.native_backend import NativeBackend
config = tiny_config(embed_dim=256, n_heads=4, hidden_dim=1024, n_layers=4, vocab_size=8000, context_length=20000)
backend = NativeBackend(config, random_weights(config), dtype="float32", device="cpu", block_size=2000, threads=2)
backend.allocate(96)
step = batch([(0, 0, [3])], "none", neutral(1), [0], block=2000)
before = logits_of(backend, [(1, 0, [1, 2])], block=2000)
"""


def test_ctrl_c_between_later_steps() -> None:
    """One call of thousands of steps: KeyboardInterrupt within seconds, and the backend goes on."""
    code = """
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it ignored
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
started = time.perf_counter()
try:
    backend.submit(replace(step, num_steps=20000))
except KeyboardInterrupt:
    print("interrupted", time.perf_counter() - started < 3)
print((logits_of(backend, [(1, 0, [1, 2])], block=2000) == before).all().item())
"""
    assert run_in_process(LONG_RUN + code) == "interrupted True\nTrue\n"


def test_a_signal_handler_may_use_the_backend_between_later_steps() -> None:
    code = """
seen = []
def handler(number, frame):
    seen.append((logits_of(backend, [(1, 0, [1, 2])], block=2000) == before).all().item())
signal.signal(signal.SIGINT, handler)
alone = backend.collect(backend.submit(replace(step, num_steps=400))).token_ids
threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
disturbed = backend.collect(backend.submit(replace(step, num_steps=400))).token_ids
print(seen, (alone == disturbed).all(), len(disturbed))
"""
    assert run_in_process(LONG_RUN + code) == "[True] True 400\n"
