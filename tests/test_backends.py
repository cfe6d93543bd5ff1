"""The contract of a backend, on every backend of this machine, held to ``GPTModel``."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from models import random_weights, tiny_config
from sampling_batches import neutral_sampling

from engine.backends.base import Backend, Batch, Sparse
from engine.backends.registry import BACKENDS, missing
from engine.backends.torch_backend import TorchBackend
from engine.checkpoints.canonical import to_reference
from engine.config import ModelConfig
from engine.execution.batch_builder import BatchBuilder
from engine.execution.runner import Runner
from engine.messages import Draw, SamplingParams, SequencePlan, StepPlan

BLOCK = 4
CONFIGS = {
    "plain": tiny_config(),
    "head_dim_20": tiny_config(embed_dim=60, n_heads=3),
    "head_dim_80": tiny_config(embed_dim=80, n_heads=1),
    "tied": tiny_config(tied_head=True),
    "exact_gelu": tiny_config(activation="gelu"),
    "scaled": tiny_config(activation="silu", attn_scales=(1.0, 0.25), norm_eps=1e-3),
}


def make(config: ModelConfig, name: str = "torch", dtype: str = "float32", blocks: int = 64) -> Backend:
    backend = BACKENDS[name]()(config, random_weights(config), dtype=dtype, device="cpu", block_size=BLOCK)
    backend.allocate(blocks)
    return backend


def runner_for(backend: Backend, config: ModelConfig) -> Runner:
    return Runner(backend, BatchBuilder(256, 16, 16, BLOCK, config.vocab_size))


def table(row: int) -> tuple[int, ...]:
    """Blocks of sequence ``row``: 16 of them, scattered, so that nothing rests on their order."""
    return tuple(4 * ((i * 5) % 16) + row for i in range(16))


def ids_of(seed: int, length: int, config: ModelConfig) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(config.vocab_size, (length,), generator=generator).tolist()
    return ids


def reference_logits(config: ModelConfig, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return to_reference(config, random_weights(config))(torch.tensor([ids]))[0]


@pytest.fixture(params=sorted(name for name, load in BACKENDS.items() if "cpu" in load().devices))
def name(request: pytest.FixtureRequest) -> str:
    reason = missing(request.param)
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.mark.parametrize("key", CONFIGS)
def test_whole_prefill(name: str, key: str) -> None:
    config = CONFIGS[key]
    ids = ids_of(1, 37, config)
    runner = runner_for(make(config, name), config)
    logits = runner.logits(StepPlan([SequencePlan(0, ids, 0, table(0), num_logits=37)]))
    assert (logits - reference_logits(config, ids)).abs().max() < 1e-4


@pytest.mark.parametrize("chunks", [[37], pytest.param([1] * 37, marks=pytest.mark.slow), [5, 1, 16, 15], [36, 1]])
def test_chunks_and_decode(name: str, chunks: list[int]) -> None:
    config = CONFIGS["plain"]
    ids, rows, start = ids_of(2, 37, config), [], 0
    runner = runner_for(make(config, name), config)
    for count in chunks:
        plan = StepPlan([SequencePlan(0, ids[start : start + count], start, table(1), num_logits=count)])
        rows.append(runner.logits(plan).clone())
        start += count
    assert (torch.cat(rows) - reference_logits(config, ids)).abs().max() < 1e-4


def test_mixed_batch(name: str) -> None:
    """A decode, a whole prompt and a chunk of one in the same step."""
    config = CONFIGS["plain"]
    a, b, c = ids_of(3, 20, config), ids_of(4, 9, config), ids_of(5, 30, config)
    runner = runner_for(make(config, name), config)
    runner.logits(StepPlan([SequencePlan(0, a[:19], 0, table(0), num_logits=1), SequencePlan(2, c[:10], 0, table(2))]))
    logits = runner.logits(
        StepPlan(
            [
                SequencePlan(0, a[19:], 19, table(0), num_logits=1),
                SequencePlan(1, b, 0, table(1), num_logits=9),
                SequencePlan(2, c[10:25], 10, table(2), num_logits=2),
            ]
        )
    )
    wanted = torch.cat(
        [reference_logits(config, a)[19:], reference_logits(config, b), reference_logits(config, c)[23:25]]
    )
    assert (logits - wanted).abs().max() < 1e-4


def greedy(position: int, **changes: object) -> Draw:
    return Draw(SamplingParams(temperature=0.0, logprobs=3, **changes), 0, position, 0)  # type: ignore[arg-type]


def test_draws_with_logprobs(name: str) -> None:
    config = CONFIGS["plain"]
    ids = ids_of(6, 15, config)
    runner = runner_for(make(config, name), config)
    (result,) = runner.execute(StepPlan([SequencePlan(0, ids, 0, table(0), draw=greedy(15))]))
    wanted = torch.log_softmax(reference_logits(config, ids)[-1], dim=0)
    drawn = result.drawn[0]
    assert drawn is not None
    assert drawn.token_id == int(wanted.argmax())
    assert drawn.rank == 1
    assert drawn.logprob == pytest.approx(float(wanted.max()), abs=1e-4)
    best = wanted.topk(3)
    assert [i for i, _ in drawn.top] == best.indices.tolist()
    assert [p for _, p in drawn.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_token_of_the_step_before(name: str) -> None:
    config = CONFIGS["plain"]
    ids = ids_of(7, 12, config)
    runner = runner_for(make(config, name), config)
    first = runner.submit(StepPlan([SequencePlan(0, ids, 0, table(0), draw=greedy(12))]))
    follow = SequencePlan(0, [0], 12, table(0), draw=greedy(13), take_previous=True, previous_row=0)
    second = runner.submit(StepPlan([follow]))
    drawn = [result.drawn[0] for pending in (first, second) for result in runner.collect(pending)]
    expected = list(ids)
    for token in drawn:
        assert token is not None
        assert token.token_id == int(reference_logits(config, expected)[-1].argmax())
        expected.append(token.token_id)


def test_several_steps_are_the_steps_one_by_one(name: str) -> None:
    """A backend may run fewer than are allowed, but one at least."""
    config = CONFIGS["plain"]
    params = SamplingParams(top_k=20)

    def run(most: int) -> list[list[int]]:
        runner = runner_for(make(config, name), config)
        pending, starts, drawn = [ids_of(8, 12, config), ids_of(9, 5, config)], [0, 0], []
        while len(drawn) < 9:
            parts = [
                SequencePlan(row, ids, start, table(row), Draw(params, row, start + len(ids), 0))
                for row, (ids, start) in enumerate(zip(pending, starts, strict=True))
            ]
            results = runner.execute(StepPlan(parts, num_steps=most if drawn else 1))
            assert 1 <= len(results) <= (most if drawn else 1)
            starts = [part.start + len(part.token_ids) + len(results) - 1 for part in parts]
            drawn += [[token.token_id for token in result.drawn if token is not None] for result in results]
            pending = [[token_id] for token_id in drawn[-1]]
        return drawn

    assert run(4) == run(1)


def test_several_steps_of_what_has_no_such_steps_are_refused(name: str) -> None:
    config = CONFIGS["plain"]
    one = raw_batch(
        np.array([1], np.int32),
        draw_rows=np.array([0], np.int32),
        logits_rows=np.zeros(0, np.int32),
        sampling=neutral_sampling(1),
    )
    counts = Sparse(np.array([0, 1], np.int32), np.array([4], np.int32), np.array([1], np.float32))
    for changes, message in (
        ({"num_steps": 0}, r"number of steps 0 is out of range: it must be in \[1, 65\)"),
        ({"num_steps": 2, "logits_rows": np.array([0], np.int32)}, "num_steps is 2: several steps need one token"),
        ({"num_steps": 2, "sampling": neutral_sampling(1, output_counts=counts)}, "num_steps is 2"),
        (
            {"num_steps": 64, "positions": np.array([1], np.int32), "context_lens": np.array([2], np.int32)},
            r"position in the last step 64 is out of range: it must be in \[0, 64\)",
        ),
        (
            {"num_steps": 60, "block_tables": np.array([[0]], np.int32)},
            r"context length in the last step 60 is out of range: it must be in \[0, 5\)",
        ),
        ({"num_steps": 30, "block_tables": np.array([[0, 1, 2, 3, 4, 5, 6, 999]], np.int32)}, "block 999"),
    ):
        with pytest.raises(ValueError, match=message):
            make(config, name).submit(replace(one, **changes))


def test_block_copies_and_unwritten_slots(name: str) -> None:
    config = CONFIGS["plain"]
    ids = ids_of(8, 11, config)
    backend = make(config, name)
    runner = runner_for(backend, config)
    runner.logits(StepPlan([SequencePlan(0, ids[:10], 0, (0, 1, 2), num_logits=1)]))
    copied = StepPlan([SequencePlan(1, ids[10:], 10, (0, 1, 9), num_logits=1)], block_copies=[(2, 9)])
    assert (runner.logits(copied)[0] - reference_logits(config, ids)[-1]).abs().max() < 1e-4
    # A padding sequence writes nothing: block 0 still holds what it held.
    step = raw_batch(np.array([1], np.int32), slots=np.array([-1], np.int64))
    backend.collect(backend.submit(step))
    again = StepPlan([SequencePlan(1, ids[10:], 10, (0, 1, 2), num_logits=1)])
    assert (runner.logits(again)[0] - reference_logits(config, ids)[-1]).abs().max() < 1e-4


def raw_batch(tokens: np.ndarray, **changes: np.ndarray) -> Batch:
    count = len(tokens)
    fields = {
        "token_ids": tokens,
        "positions": np.arange(count, dtype=np.int32),
        "slots": np.arange(count, dtype=np.int64),
        "query_starts": np.array([0, count], np.int32),
        "context_lens": np.array([count], np.int32),
        "block_tables": np.arange(16, dtype=np.int32)[None],
        "draw_rows": np.zeros(0, np.int32),
        "logits_rows": np.array([count - 1], np.int32),
    }
    return Batch(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": np.array([1, 97, 2], np.int32)}, "token id 97 is out of range"),
        ({"token_ids": np.array([1, -1, 2], np.int32)}, "token id -1 is out of range"),
        ({"positions": np.array([62, 63, 64], np.int32)}, "position 64 is out of range"),
        ({"slots": np.array([0, 1, 256], np.int64)}, "slot 256 is out of range"),
        ({"block_tables": np.array([[64]], np.int32)}, "block 64 is out of range"),
        ({"logits_rows": np.array([3], np.int32)}, "logits row 3 is out of range"),
        ({"previous_rows": np.array([-1, -1, 9], np.int32)}, "(row of the step before|previous row) 9 is out of range"),
        ({"block_copies": np.array([[0, 64]], np.int32)}, "block (to copy )?64 is out of range"),
    ],
)
def test_out_of_range_is_refused(name: str, changes: dict[str, np.ndarray], message: str) -> None:
    backend = make(CONFIGS["plain"], name)
    with pytest.raises(ValueError, match=message):
        backend.collect(backend.submit(raw_batch(np.array([1, 2, 3], np.int32), **changes)))


def test_empty_batch_is_refused(name: str) -> None:
    backend = make(CONFIGS["plain"], name)
    with pytest.raises(ValueError, match="no tokens"):
        backend.submit(raw_batch(np.zeros(0, np.int32), logits_rows=np.zeros(0, np.int32)))


def test_nan_weights_are_an_error_when_drawn(name: str) -> None:
    config = CONFIGS["plain"]
    weights = random_weights(config)
    weights["blocks.1.fc.bias"][3] = float("nan")
    backend = BACKENDS[name]()(config, weights, dtype="float32", device="cpu", block_size=BLOCK)
    backend.allocate(16)
    runner = runner_for(backend, config)
    with pytest.raises(ValueError, match="no token can be drawn"):
        runner.execute(StepPlan([SequencePlan(0, [1, 2, 3], 0, tuple(range(4)), draw=greedy(3))]))


def test_update_weights(name: str) -> None:
    config = CONFIGS["plain"]
    backend = make(config, name)
    new = random_weights(config, seed=9)
    backend.update_weights(new)
    ids = ids_of(9, 10, config)
    logits = runner_for(backend, config).logits(StepPlan([SequencePlan(0, ids, 0, table(0), num_logits=10)]))
    with torch.no_grad():
        wanted = to_reference(config, new)(torch.tensor([ids]))[0]
    assert (logits - wanted).abs().max() < 1e-4


def test_capacity_is_what_is_allocated(name: str) -> None:
    config = CONFIGS["plain"]
    capacity = make(config, name).capacity()
    smallest = 2 * config.n_layers * BLOCK * config.embed_dim * 4
    padding = 3 if name == "native" else 1  # to whole vectors and cache lines, of which these sizes are no multiples
    assert smallest <= capacity.bytes_per_block <= padding * smallest
    assert capacity.weight_bytes >= config.num_parameters * 4
    assert capacity.free_bytes > 0


def test_what_a_backend_lacks_is_refused(name: str) -> None:
    config = CONFIGS["plain"]
    backend = BACKENDS[name]()
    with pytest.raises(ValueError, match=f"{name} backend has no dtype 'int3'"):
        backend(config, random_weights(config), dtype="int3", device="cpu", block_size=BLOCK)
    with pytest.raises(ValueError, match=f"{name} backend has no device 'tpu'"):
        backend(config, random_weights(config), dtype="float32", device="tpu", block_size=BLOCK)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_as_good_as_plain_pytorch(dtype: str) -> None:
    """The tolerance rule: an error against float64 of at most twice plain PyTorch's in that precision."""
    config = tiny_config(n_layers=3)
    weights = random_weights(config, scale=0.12)
    stored = {key: value.to(getattr(torch, dtype)) for key, value in weights.items()}
    ids = ids_of(10, 40, config)
    backend = TorchBackend(config, stored, dtype=dtype, device="cpu", block_size=BLOCK)
    backend.allocate(64)
    got = runner_for(backend, config).logits(StepPlan([SequencePlan(0, ids, 0, table(0), num_logits=40)])).double()
    with torch.no_grad():
        exact = to_reference(config, stored).double()(torch.tensor([ids]))[0]
        plain = to_reference(config, stored).to(getattr(torch, dtype))(torch.tensor([ids]))[0].double()
    assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max()
    assert (got - exact).square().mean() <= 4 * (plain - exact).square().mean()


def test_float64_is_exact() -> None:
    config = CONFIGS["plain"]
    ids = ids_of(11, 20, config)
    runner = runner_for(make(config, dtype="float64"), config)
    logits = runner.logits(StepPlan([SequencePlan(0, ids, 0, table(0), num_logits=20)]))
    with torch.no_grad():
        exact = to_reference(config, random_weights(config)).double()(torch.tensor([ids]))[0]
    assert (logits - exact).abs().max() < 1e-11


def test_rows_may_repeat_with_another_sample_index(name: str) -> None:
    """The same row drawn twice with two sample indices: two draws from one distribution."""
    config = CONFIGS["plain"]
    backend = make(config, name)
    count = 40
    sampling = neutral_sampling(
        count,
        seeds=np.full(count, 5, np.uint64),
        positions=np.full(count, 3, np.uint32),
        sample_index=np.arange(count, dtype=np.uint32),
    )
    rows = np.full(count, 2, np.int32)
    batch = raw_batch(
        np.array([1, 2, 3], np.int32), draw_rows=rows, logits_rows=np.zeros(0, np.int32), sampling=sampling
    )
    output = backend.collect(backend.submit(batch))
    assert len(set(output.token_ids.tolist())) > 5
    assert output.logits is None
    assert output.top_ids.shape == (count, 0)
