"""Paged attention against float64: any mixture of prefill, chunks and decode; a position's bits never depend on it."""

from dataclasses import dataclass

import kernel_harness as harness
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import Paging, attention, cost, query_tiles, scratch_sizes
from kernels.tiles import attention_tiles, split_kv

SCALE = 0.3


@dataclass
class Case:
    """Sequences in a shuffled, NaN-poisoned paged cache, and the dense keys and values they hold."""

    paging: Paging
    dense_k: list[torch.Tensor]  # [positions, heads, head_dim] each
    dense_v: list[torch.Tensor]
    queries: list[torch.Tensor]  # [positions, heads * head_dim] each
    k: torch.Tensor
    v: torch.Tensor
    tables: torch.Tensor


def make(lengths: list[int], paging: Paging, dtype: torch.dtype, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    width, size = paging.heads * paging.head_dim, paging.block_size
    blocks = [-(-length // size) for length in lengths]
    order = torch.randperm(sum(blocks) + 2, generator=generator)
    shape = (sum(blocks) + 2, paging.heads, size, paging.head_dim)
    k, v = torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)
    tables = harness.guarded([len(lengths), max(blocks)], torch.int32, gap=3)
    case = Case(paging, [], [], [normal(length, width) for length in lengths], k, v, tables)
    used = 0
    for i, length in enumerate(lengths):
        tables[i, : blocks[i]] = order[used : used + blocks[i]]
        used += blocks[i]
        for cache, dense in ((k, case.dense_k), (v, case.dense_v)):
            dense.append(normal(length, paging.heads, paging.head_dim))
            for p in range(length):
                cache[int(tables[i, p // size]), :, p % size] = dense[i][p]
    return case


def oracle(case: Case, sequence: int, first: int, last: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Attention of positions first to last - 1, in float64 or as plain PyTorch would: [queries, heads * head_dim]."""
    paging = case.paging
    q = case.queries[sequence][first:last].to(dtype).unflatten(1, (paging.heads, paging.head_dim)).transpose(0, 1)
    k, v = (d[sequence][:last].to(dtype).transpose(0, 1) for d in (case.dense_k, case.dense_v))  # [heads, keys, dim]
    mask = torch.arange(last)[None, :] <= torch.arange(first, last)[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE)
    return out.transpose(0, 1).flatten(1)


@dataclass
class Launch:
    """The batch that runs ``spans`` (sequence, first position, last position + 1)."""

    case: Case
    spans: list[tuple[int, int, int]]
    many: bool

    def __post_init__(self) -> None:
        paging, dtype = self.case.paging, self.case.k.dtype
        self.choice = attention_tiles(paging.head_dim, dtype.itemsize, 99 if self.many else 1)
        self.longest = max(last for _, _, last in self.spans)
        starts = np.cumsum([0] + [last - first for _, first, last in self.spans]).astype(np.int32)
        positions = np.concatenate([np.arange(first, last) for _, first, last in self.spans]).astype(np.int32)
        self.tile_list = query_tiles(starts, positions, self.choice.block_q)
        self.tiles = torch.from_numpy(self.tile_list)
        self.tables = harness.guarded_like(self.case.tables[[s for s, _, _ in self.spans]], gap=2)
        self.q = harness.guarded_like(torch.cat([self.case.queries[s][a:b] for s, a, b in self.spans]), gap=8)
        self.out = harness.guarded(self.q.shape, dtype, gap=9)
        partials, counters = scratch_sizes(len(self.q), len(self.tile_list), paging, self.choice, self.longest)
        self.partials, self.counters = torch.full((partials,), torch.nan), torch.zeros(counters, dtype=torch.int32)

    def visible(self) -> list[torch.Tensor]:
        """The parts of the cache that hold positions which a query of the batch sees."""
        found, size = [], self.case.paging.block_size
        for i, (_, _, last) in enumerate(self.spans):
            for block, start in zip(self.tables[i].tolist(), range(0, last, size), strict=False):
                found += [cache[block, :, : last - start] for cache in (self.case.k, self.case.v)]
        return found

    def __call__(self) -> None:
        case = self.case
        attention(
            self.q, case.k, case.v, self.tables, self.tiles, self.out, self.partials, self.counters, case.paging,
            SCALE, self.choice, self.longest,
        )  # fmt: skip

    def run(self) -> torch.Tensor:
        self()
        assert not self.counters.any()
        return self.out.contiguous()


def paging(heads: int, head_dim: int, block_size: int = 16, split: int = 64) -> Paging:
    return Paging(heads, head_dim, block_size, split)


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"),
    [(1, 1, 16), pytest.param(3, 20, 5, marks=pytest.mark.versions), (1, 64, 16), (2, 80, 16), (1, 256, 16)],
)
def test_mixed_batch(heads: int, head_dim: int, block_size: int, many: bool, dtype: torch.dtype) -> None:
    case = make([150, 1, 70, 37], paging(heads, head_dim, block_size), dtype)
    spans = [(0, 149, 150), (1, 0, 1), (2, 40, 70), (3, 0, 17)]
    launch = Launch(case, spans, many)
    harness.run_in_every_order(
        launch, [launch.out], [launch.q, *launch.visible(), launch.tables, launch.tiles],
        [launch.partials, launch.counters],
    )  # fmt: skip
    expected = torch.cat([oracle(case, *span) for span in spans])
    theirs = torch.cat([oracle(case, *span, dtype=dtype) for span in spans])
    floor = (torch.finfo(dtype).eps + 1e-6) * expected.abs().max().item()
    harness.assert_as_good_as_torch(launch.out, expected, theirs, floor)


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize(("split", "head_dim"), [(64, 20), (128, 20), (64, 256)])
def test_a_position_has_the_same_bits_prefilled_chunked_and_decoded(
    split: int, head_dim: int, dtype: torch.dtype
) -> None:
    """With splits of one and of two steps of 64 keys, and of the shorter steps of wide heads."""
    case = make([150], paging(1, head_dim, split=split), dtype)
    whole = Launch(case, [(0, 0, 150)], many=True).run()
    for first, last, many in ((0, 150, False), (0, 70, True), (70, 150, True), (90, 99, False), (99, 120, True)):
        assert harness.same_bits(Launch(case, [(0, first, last)], many).run(), whole[first:last])
    for position in (0, 1, 63, 64, 127, 128, 149):
        for many in (False, True):
            alone = Launch(case, [(0, position, position + 1)], many).run()
            assert harness.same_bits(alone, whole[position : position + 1])


def test_the_softmax_of_a_split_is_online() -> None:
    """The largest score comes last, in the third step of one split: what came before has to be scaled down."""
    case = make([190], paging(1, 16, split=256), torch.float32)
    case.queries[0][189] = 8 * case.dense_k[0][189, 0]
    for many in (False, True):
        out = Launch(case, [(0, 189, 190)], many).run()
        torch.testing.assert_close(out.double(), oracle(case, 0, 189, 190), rtol=0, atol=3e-6)


@pytest.mark.parametrize("many", [False, True])
def test_long_contexts(many: bool) -> None:
    """Odd numbers of keys of GPT-2's order, in up to 16 splits."""
    case = make([768, 1023], paging(1, 64), torch.bfloat16)
    spans = [(0, 767, 768), (1, 1019, 1023)]
    expected = torch.cat([oracle(case, *span) for span in spans])
    theirs = torch.cat([oracle(case, *span, dtype=torch.bfloat16) for span in spans])
    floor = torch.finfo(torch.bfloat16).eps * expected.abs().max().item()
    harness.assert_as_good_as_torch(Launch(case, spans, many).run(), expected, theirs, floor)


@pytest.mark.versions
def test_neighbours_do_not_change_bits() -> None:
    case = make([150, 90], paging(2, 20), torch.float32)
    alone = Launch(case, [(0, 149, 150)], False).run()
    beside = Launch(case, [(1, 10, 90), (0, 149, 150)], False).run()
    assert harness.same_bits(beside[-1:], alone)


def test_other_kv_splits_would_show() -> None:
    """The negative control: splits that followed the batch would change bits."""
    case = make([150], paging(2, 20), torch.float32)
    whole = Launch(case, [(0, 0, 150)], many=True).run()
    case.paging = paging(2, 20, split=128)
    assert not harness.same_bits(Launch(case, [(0, 0, 150)], many=True).run(), whole)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_batch(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 140), min_size=1, max_size=3))
    head_dim, block_size, split = (data.draw(st.sampled_from(c)) for c in ([4, 33], [1, 5, 16, 20], [64, 128, 256]))
    case = make(lengths, paging(1, head_dim, block_size, split), torch.float32)
    spans = []
    for i, length in enumerate(lengths):
        last = data.draw(st.integers(1, length))
        spans.append((i, data.draw(st.integers(max(0, last - 40), last - 1)), last))
    launch = Launch(case, spans, data.draw(st.booleans()))
    out = launch.run()
    torch.testing.assert_close(out.double(), torch.cat([oracle(case, *s) for s in spans]), rtol=0, atol=3e-6)


def test_a_tile_without_queries_does_nothing() -> None:
    case = make([20], paging(1, 16), torch.float32)
    launch = Launch(case, [(0, 19, 20)], False)
    launch.tiles = torch.cat([torch.zeros(1, 4, dtype=torch.int32), launch.tiles])
    launch.partials, launch.counters = launch.partials.repeat(2), launch.counters.repeat(2)
    expected = oracle(case, 0, 19, 20)
    torch.testing.assert_close(launch.run().double(), expected, rtol=0, atol=1e-6)


def test_query_tiles() -> None:
    starts, positions = np.array([0, 1, 1, 21], np.int32), np.array([7, *range(30, 50)], np.int32)
    assert query_tiles(starts, positions, 16).tolist() == [[0, 0, 7, 1], [2, 1, 30, 16], [2, 17, 46, 4]]


@pytest.mark.parametrize("many", [False, True])
def test_cost_is_what_is_touched(many: bool) -> None:
    case = make([200, 33], paging(2, 64), torch.bfloat16)
    launch = Launch(case, [(0, 199, 200), (1, 3, 33)], many)
    with harness.recording() as trace:
        launch()
    expected = cost(launch.tile_list.tolist(), case.paging, 2, launch.choice)
    reads = trace.bytes(False, launch.q, case.k, case.v, launch.tables, launch.tiles)
    assert reads == pytest.approx(expected.reads, rel=0.02)
    assert trace.bytes(True, launch.out) == expected.writes
    assert trace.sectors(case.k) <= 1.1
    assert trace.sectors(case.v) <= 1.1


def test_splits_follow_the_model() -> None:
    assert split_kv(12, 1024) == 64
    assert split_kv(25, 1024) == 128
    assert split_kv(1, 64) == 64


def test_offsets_past_2_to_the_31() -> None:
    """A cache of more than 2**31 elements, of which one block's pages alone are touched, is read at the right place."""
    shape = paging(16, 64)
    blocks = 2**31 // (shape.heads * shape.block_size * shape.head_dim) + 3
    k, v = (torch.empty((blocks, 16, 16, 64), dtype=torch.float16) for _ in range(2))
    case = make([9], shape, torch.float16)
    for big, small in ((k, case.k), (v, case.v)):
        big[blocks - 1] = small[int(case.tables[0, 0])]
    case.tables[0, 0] = blocks - 1
    expected = oracle(case, 0, 8, 9)
    case.k, case.v = k, v
    for many in (False, True):
        out = Launch(case, [(0, 8, 9)], many).run()
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-3)
