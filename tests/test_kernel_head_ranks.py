"""Ranks and top-N after the fused head: right, the same in any order of programs, and computing no tile in vain."""

import kernel_harness as harness
import pytest
import torch
from test_kernel_head_sample import assert_is_the_oracle_s, drawn_from, exact, make, scratch
from test_kernel_sampling import Row, options, outputs

from kernels.head_ranks import cost, head_ranks
from kernels.head_sample import head_sample

FORCED = [Row(temperature=0), Row(temperature=0, allowed=(140,)), Row(temperature=0, bias=((3, 99.0),))]


def test_in_every_order() -> None:
    x, weights = make(4, 150, 64, torch.bfloat16)
    ids = harness.guarded_like(torch.tensor([3, 1, 0], dtype=torch.int32))
    drawn, space = outputs(3, 4), scratch(3, 150, 4)
    head_sample(x, weights, ids, options(FORCED, 150), drawn, space, ranks_follow=True)
    before = drawn.ranks.clone()

    def launch() -> None:
        drawn.ranks.copy_(before)
        head_ranks(x, weights, ids, drawn, space)

    harness.run_in_every_order(
        launch, [drawn.top_ids, drawn.top_logprobs],
        [x, weights.data, ids, space.floats, space.ids], [drawn.ranks],
    )  # fmt: skip
    assert drawn.ranks[0] == 1
    assert (drawn.ranks[1:] > 1).all()


@pytest.mark.parametrize("rank", [1, 2, 64, pytest.param(65, marks=pytest.mark.versions), 130, 200])
def test_any_rank(rank: int) -> None:
    """The token of each rank, the only one allowed; the logits fall with the id, or rise, or are below zero."""
    for logits in (torch.arange(200.0, 0, -1)[None], torch.arange(1.0, 201)[None], -torch.arange(1.0, 201)[None]):
        token = int(logits[0].argsort(descending=True)[rank - 1])
        rows = [Row(temperature=0, allowed=(token,))]
        drawn = drawn_from(logits / 16, rows, 1)
        assert drawn.ranks.item() == rank
        assert_is_the_oracle_s(drawn, logits / 16, rows)


def test_equals_are_not_above() -> None:
    drawn = drawn_from(torch.tensor([[1.0, 2.0] * 50]), [Row(temperature=0, allowed=(98,))], 3)
    assert drawn.ranks.item() == 51
    assert drawn.top_ids.tolist() == [[1, 3, 5]]


def test_more_candidates_than_a_tile_has() -> None:
    """All of the best are in the second tile, which has 64 places and the last one 22."""
    logits = torch.zeros(1, 150)
    logits[0, 64:128] = torch.arange(64.0) / 16 + 1
    assert_is_the_oracle_s(drawn_from(logits, [Row(temperature=0)], 80), logits, [Row(temperature=0)])


@pytest.mark.parametrize("top", [0, 3])
def test_cost_is_what_is_touched(top: int) -> None:
    """Greedy rows compute no tile again; a row of the largest rank computes all of them."""
    logits = torch.arange(0, 300.0).expand(20, -1).contiguous()
    x, weights = exact(logits)
    for rows, above in (([Row(temperature=0)] * 20, 0), ([Row(temperature=0, allowed=(0,))] * 20, 5)):
        drawn, space, ids = outputs(20, top), scratch(20, 300, top), torch.arange(20).int()
        head_sample(x, weights, ids, options(rows, 300), drawn, space, ranks_follow=True)
        with harness.recording() as trace:
            head_ranks(x, weights, ids, drawn, space)
        expected = cost(20, weights, 4, top, above)
        read = trace.bytes(False) - trace.bytes(False, drawn.ranks)
        assert read == pytest.approx(expected.weights + expected.reads, rel=0.02)
        assert trace.bytes(True) == expected.writes
        assert trace.bytes(False, weights.data) == above // 5 * 300 * 20 * 4
