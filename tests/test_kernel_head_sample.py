"""The fused head and draw: the very tokens and logprobs of logits followed by sampling."""

from dataclasses import replace

import kernel_harness as harness
import pytest
import torch
from test_kernel_sampling import Row, options, outputs

from kernels.head_sample import HeadScratch, cost, head_sample
from kernels.linear import Norm
from kernels.logits import logits
from kernels.sampling import Drawn, sampling
from kernels.weights import Weights, pack

EPS = 1e-5


def make(
    total: int, vocab: int, width: int, dtype: torch.dtype, kind: str = "float"
) -> tuple[torch.Tensor, Weights, Norm]:
    torch.manual_seed(vocab)
    x = harness.guarded_like(torch.randn(total, width))
    gamma, beta = harness.guarded_like(torch.randn(width), dtype), harness.guarded_like(torch.randn(width), dtype)
    mean, rstd = x.mean(dim=1), (x.var(dim=1, correction=0) + EPS).rsqrt()
    norm = Norm(gamma, beta, harness.guarded_like(mean), harness.guarded_like(rstd))
    return x, pack(torch.randn(vocab, width) / width**0.5, dtype, kind), norm


def scratch(rows: int, vocab: int) -> HeadScratch:
    count = rows * -(-vocab // 64)
    padded = -(-count // 16) * 16
    return HeadScratch(
        torch.full((4 * padded,), torch.nan), torch.full((count,), -1, dtype=torch.int32),
        torch.zeros(rows, dtype=torch.int32),
    )  # fmt: skip


ROWS = [
    Row(temperature=0),
    Row(seed=5, position=3),
    Row(temperature=0.6, seed=2**64 - 2, sample=2),
    Row(temperature=0, allowed=(3, 60)),
    Row(seed=9, allowed=tuple(range(20, 40))),
]


def both_paths(x: torch.Tensor, weights: Weights, norm: Norm, rows: list[Row], ids: list[int]) -> tuple[Drawn, Drawn]:
    vocab, dtype = weights.shape[0], norm.weight.dtype
    row_ids = torch.tensor(ids, dtype=torch.int32)
    fused, apart = outputs(len(ids), 0), outputs(len(ids), 0)
    y = torch.empty(len(ids), vocab)
    chosen = options(rows, vocab)
    head_sample(x, weights, norm, row_ids, chosen, fused, scratch(len(ids), vocab), dtype)
    logits(x, weights, norm, row_ids, y, dtype)
    sampling(y, chosen, apart, y)
    return fused, apart


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.versions
@pytest.mark.parametrize(("vocab", "kind"), [(61, "float"), (200, "int8"), (333, "int4")])
def test_same_bits_as_logits_and_sampling(vocab: int, kind: str, dtype: torch.dtype) -> None:
    fused, apart = both_paths(*make(7, vocab, 70, dtype, kind), ROWS, [6, 0, 3, 3, 1])
    for name in ("tokens", "logprobs", "status"):
        assert harness.same_bits(getattr(fused, name), getattr(apart, name))
    assert fused.ranks[0] == apart.ranks[0] == 1


def test_many_rows_and_row_blocks() -> None:
    rows = [Row(temperature=i % 3 / 2, seed=i) for i in range(70)]
    fused, apart = both_paths(*make(70, 130, 64, torch.float32), rows, list(range(70)))
    assert harness.same_bits(fused.tokens, apart.tokens)
    assert harness.same_bits(fused.logprobs, apart.logprobs)


def test_a_large_vocabulary_of_equals() -> None:
    """More than one step of the walk over the tiles' results: the lowest id, and all of the mass."""
    x, _, norm = make(1, 1, 16, torch.float32)
    fused, apart = both_paths(x, pack(torch.zeros(4200, 16), torch.float32), norm, [Row(temperature=0)], [0])
    assert fused.tokens.item() == apart.tokens.item() == 0
    assert harness.same_bits(fused.logprobs, apart.logprobs)


def test_in_every_order() -> None:
    x, weights, norm = make(4, 150, 64, torch.bfloat16)
    ids, drawn, space = harness.guarded_like(torch.tensor([3, 1], dtype=torch.int32)), outputs(2, 0), scratch(2, 150)
    rows = options(ROWS[:2], 150)
    inputs = [v for v in (getattr(rows, n) for n in rows.__slots__) if isinstance(v, torch.Tensor)]
    written = [drawn.tokens, drawn.logprobs, drawn.ranks, drawn.status]
    harness.run_in_every_order(
        lambda: head_sample(x, weights, norm, ids, rows, drawn, space, torch.bfloat16), written,
        [x, weights.data, norm.weight, norm.bias, norm.mean, norm.rstd, ids, *inputs],
        [space.floats, space.ids, space.counters],
    )  # fmt: skip
    assert not space.counters.any()


def test_status_of_rows_without_a_token() -> None:
    x, weights, norm = make(3, 100, 64, torch.float32)
    norm.mean[1] = torch.nan
    fused, _ = both_paths(x, weights, norm, [Row(), Row(), Row(allowed=())], [0, 1, 2])
    assert fused.status.tolist() == [0, 1, 2]


def test_cost_is_what_is_touched() -> None:
    x, weights, norm = make(20, 150, 256, torch.bfloat16)
    drawn, space, rows = outputs(3, 0), scratch(3, 150), options([Row()] * 3, 150)
    ids = torch.tensor([1, 5, 19], dtype=torch.int32)
    with harness.recording() as trace:
        head_sample(x, weights, norm, ids, rows, drawn, space, torch.bfloat16)
    expected = cost(3, weights, 2)
    handed_over = trace.bytes(False, space.floats, space.ids, space.counters)
    assert trace.bytes(False) - handed_over == pytest.approx(expected.weights + expected.reads, rel=0.02)
    assert trace.bytes(True, drawn.tokens, drawn.logprobs, drawn.ranks, drawn.status) == expected.writes
    assert trace.sectors(weights.data) <= 1.1


def test_refuses_what_it_does_not_do() -> None:
    x, weights, norm = make(1, 10, 16, torch.float32)
    ids, space = torch.zeros(1, dtype=torch.int32), scratch(1, 10)
    biased = options([Row(bias=((1, 1.0),))], 10)
    for chosen, drawn in ((biased, outputs(1, 0)), (replace(biased, logit_bias=None), outputs(1, 2))):
        with pytest.raises(ValueError, match="use logits and sampling"):
            head_sample(x, weights, norm, ids, chosen, drawn, space, torch.float32)
