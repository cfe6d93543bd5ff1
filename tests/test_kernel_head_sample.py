"""The fused head and draw, with the ranks that follow it: all that logits followed by sampling give, bit for bit."""

from dataclasses import replace

import kernel_harness as harness
import pytest
import torch
from test_kernel_sampling import Row, expected_token, options, outputs

from kernels.head_ranks import head_ranks
from kernels.head_sample import HeadScratch, cost, head_sample
from kernels.logits import logits
from kernels.sampling import Drawn, sampling
from kernels.weights import Weights, pack

NAMES = ("tokens", "logprobs", "ranks", "status", "top_ids", "top_logprobs")


def make(total: int, vocab: int, width: int, dtype: torch.dtype, kind: str = "float") -> tuple[torch.Tensor, Weights]:
    torch.manual_seed(vocab)
    x = harness.guarded_like(torch.randn(total, width), dtype)
    return x, pack(torch.randn(vocab, width) / width**0.5, dtype, kind)


def scratch(rows: int, vocab: int, top: int = 0) -> HeadScratch:
    floats, ids, counters = HeadScratch.needed(rows, vocab, top)
    return HeadScratch(
        harness.guarded([floats], torch.float32), harness.guarded([ids], torch.int32),
        harness.guarded([counters], torch.int32, fill=0),
    )  # fmt: skip


ROWS = [
    Row(temperature=0),
    Row(seed=5, position=3),
    Row(temperature=0.6, seed=2**64 - 2, sample=2),
    Row(temperature=0, allowed=(3, 60)),
    Row(seed=9, allowed=tuple(range(20, 40))),
]
EDITS = [
    Row(temperature=0, bias=((0, -9.0), (31, 3.0), (60, 8.0))),
    Row(seed=5, presence=0.7, frequency=0.3, repetition=1.4, counts=tuple((i, i % 3) for i in range(0, 61, 2))),
    Row(temperature=0.6, seed=3, repetition=0.7, counts=((3, 0), (17, 4)), bias=((3, -2.0), (4, 5.0))),
    Row(temperature=0, frequency=2.0, counts=((7, 9),), allowed=tuple(range(5, 50))),
    Row(temperature=1.5, seed=11, position=7),
]


def both_paths(x: torch.Tensor, weights: Weights, rows: list[Row], ids: list[int], top: int = 0) -> tuple[Drawn, Drawn]:
    vocab = weights.shape[0]
    row_ids = torch.tensor(ids, dtype=torch.int32)
    fused, apart = outputs(len(ids), top), outputs(len(ids), top)
    chosen, space = options(rows, vocab), scratch(len(ids), vocab, top)
    head_sample(x, weights, row_ids, chosen, fused, space, ranks_follow=True)
    head_ranks(x, weights, row_ids, fused, space)
    y = torch.empty(len(ids), vocab)
    logits(x, weights, row_ids, y)
    sampling(y, chosen, apart, torch.empty_like(y))
    return fused, apart


def assert_same(fused: Drawn, apart: Drawn) -> None:
    for name in NAMES:
        assert harness.same_bits(getattr(fused, name), getattr(apart, name)), name


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.versions
@pytest.mark.parametrize(("vocab", "kind"), [(61, "float"), (200, "int8"), (333, "int4")])
def test_same_bits_as_logits_and_sampling(vocab: int, kind: str, dtype: torch.dtype) -> None:
    assert_same(*both_paths(*make(7, vocab, 70, dtype, kind), ROWS, [6, 0, 3, 3, 1]))


@pytest.mark.parametrize(("vocab", "dtype", "top"), [(61, torch.float32, 0), (200, torch.bfloat16, 3)])
def test_same_bits_with_edits_and_top_n(vocab: int, dtype: torch.dtype, top: int) -> None:
    """Entries at both ends of a tile too, a tile full of them, and a list without the other."""
    ends = tuple((i, 1.5) for i in (63, 64, 127, vocab - 1) if 60 < i < vocab)
    full = replace(EDITS[1], counts=tuple((i, i % 5) for i in range(vocab)))
    rows = [replace(row, bias=(*row.bias, *ends)) for row in (EDITS[0], full, *EDITS[2:])]
    assert_same(*both_paths(*make(7, vocab, 70, dtype), rows, [6, 0, 3, 3, 1], top))
    for name in ("counts", "bias"):
        rows = [replace(row, **{name: ()}, allowed=None) for row in EDITS]
        assert_same(*both_paths(*make(7, vocab, 70, dtype), rows, [1, 2, 3, 4, 5], top))


def exact(logits: torch.Tensor) -> tuple[torch.Tensor, Weights]:
    """Arguments whose logits are ``logits`` [R, V], to the bit: an identity for x."""
    return torch.eye(len(logits)), pack(logits.T.contiguous(), torch.float32)


def drawn_from(logits: torch.Tensor, rows: list[Row], top: int = 0) -> Drawn:
    x, weights = exact(logits)
    drawn, space, ids = outputs(len(rows), top), scratch(len(rows), logits.shape[1], top), torch.arange(len(rows)).int()
    head_sample(x, weights, ids, options(rows, logits.shape[1]), drawn, space, ranks_follow=True)
    head_ranks(x, weights, ids, drawn, space)
    return drawn


def assert_is_the_oracle_s(drawn: Drawn, logits: torch.Tensor, rows: list[Row]) -> None:
    """Tokens by NumPy; logprobs, ranks and top-N of the raw logits in float64, ties by the lowest id."""
    logprobs = logits.double().log_softmax(dim=1)
    best = logits.sort(dim=1, descending=True, stable=True).indices[:, : drawn.top_ids.shape[1]]
    assert drawn.tokens.tolist() == [expected_token(logits[i].numpy(), row) for i, row in enumerate(rows)]
    chosen = drawn.tokens.long()[:, None]
    torch.testing.assert_close(drawn.logprobs.double(), logprobs.gather(1, chosen)[:, 0], rtol=0, atol=3e-6)
    assert drawn.ranks.tolist() == (1 + (logits > logits.gather(1, chosen)).sum(dim=1)).tolist()
    assert torch.equal(drawn.top_ids.long(), best)
    torch.testing.assert_close(drawn.top_logprobs.double(), logprobs.gather(1, best), rtol=0, atol=3e-6)
    assert not drawn.status.any()


@pytest.mark.parametrize(("vocab", "top"), [(61, 61), (150, 5)])
def test_every_option_against_numpy(vocab: int, top: int) -> None:
    """On coarse logits too, where many are equal."""
    for step in (1, 64):
        logits = (torch.randn(10, vocab, generator=torch.Generator().manual_seed(step)) * 3 * step).round() / step
        rows = [*ROWS, *EDITS]
        assert_is_the_oracle_s(drawn_from(logits, rows, top), logits, rows)


@pytest.mark.slow
def test_gpt2_vocabulary() -> None:
    logits = torch.randn(3, 50257) * 3
    rows = [
        Row(seed=11, temperature=1.3),
        Row(temperature=0, bias=((50256, 40.0), (50255, 39.0))),
        Row(seed=4, repetition=1.2, counts=((7, 1), (29999, 2), (50254, 1)), allowed=tuple(range(1, 50257, 3))),
    ]
    assert_is_the_oracle_s(drawn_from(logits, rows, 2), logits, rows)


def test_many_rows_and_row_blocks() -> None:
    rows = [Row(temperature=i % 3 / 2, seed=i, bias=((i, 3.0),)) for i in range(70)]
    assert_same(*both_paths(*make(70, 130, 64, torch.float32), rows, list(range(70)), 2))


def test_a_large_vocabulary_of_equals() -> None:
    """More than one step of the walk over the tiles' results: the lowest ids, and all of the mass."""
    fused, apart = both_paths(
        torch.randn(1, 16), pack(torch.zeros(4200, 16), torch.float32), [Row(temperature=0)], [0], 3
    )
    assert_same(fused, apart)
    assert fused.tokens.item() == 0
    assert fused.top_ids.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("rows", [ROWS[:2], EDITS[2:4]], ids=["plain", "edited"])
def test_in_every_order(rows: list[Row]) -> None:
    x, weights = make(4, 150, 64, torch.bfloat16)
    top = len(rows[0].counts) and 2
    ids, drawn = harness.guarded_like(torch.tensor([3, 1], dtype=torch.int32)), outputs(2, top)
    space, chosen = scratch(2, 150, top), options(rows, 150)
    inputs = [v for v in (getattr(chosen, n) for n in chosen.__slots__) if isinstance(v, torch.Tensor)]
    inputs += [t for s in (chosen.output_counts, chosen.logit_bias) if s for t in (s.starts, s.ids, s.values)]
    written = [drawn.tokens, drawn.logprobs, drawn.ranks, drawn.status]
    harness.run_in_every_order(
        lambda: head_sample(x, weights, ids, chosen, drawn, space), written, [x, weights.data, ids, *inputs],
        [space.floats, space.ids, space.counters],
    )  # fmt: skip
    assert not space.counters.any()


def test_status_of_rows_without_a_token() -> None:
    x, weights = make(3, 100, 64, torch.float32)
    x[1, 0] = torch.nan
    fused, _ = both_paths(x, weights, [Row(), Row(), Row(allowed=())], [0, 1, 2])
    assert fused.status.tolist() == [0, 1, 2]


def test_infinite_logits_are_refused() -> None:
    x, weights = exact(torch.zeros(2, 70))
    weights.data[69, 1] = torch.inf
    fused, apart = both_paths(x[1:], weights, [Row()], [0])
    assert fused.status.tolist() == apart.status.tolist() == [1]


def test_a_rank_that_is_not_counted_is_0() -> None:
    x, weights = exact(torch.tensor([[1.0, 3.0, 2.0]] * 3))
    drawn, ids = outputs(3, 0), torch.arange(3).int()
    chosen = options([Row(temperature=0), Row(temperature=0, allowed=(2,)), Row(temperature=0, allowed=(1, 2))], 3)
    head_sample(x, weights, ids, chosen, drawn, scratch(3, 3))
    assert drawn.tokens.tolist() == [1, 2, 1]
    assert drawn.ranks.tolist() == [1, 0, 1]


def test_cost_is_what_is_touched() -> None:
    x, weights = make(20, 150, 256, torch.bfloat16)
    drawn, space, rows = outputs(3, 0), scratch(3, 150), options([Row()] * 3, 150)
    ids = torch.tensor([1, 5, 19], dtype=torch.int32)
    with harness.recording() as trace:
        head_sample(x, weights, ids, rows, drawn, space)
    expected = cost(3, weights, 2)
    handed_over = trace.bytes(False, space.floats, space.ids, space.counters)
    assert trace.bytes(False) - handed_over == pytest.approx(expected.weights + expected.reads, rel=0.02)
    assert trace.bytes(True, drawn.tokens, drawn.logprobs, drawn.ranks, drawn.status) == expected.writes
    assert trace.sectors(weights.data) <= 1.1
