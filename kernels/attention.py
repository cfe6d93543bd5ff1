"""Causal attention over the paged KV cache: softmax(scale * q k^T) v, any number of queries of any sequences at once.

There is no phase flag: a query tile is up to BLOCK_Q consecutive positions of one sequence, one in a decode step. The
keys are cut into KV splits of SPLIT positions, a number that depends on the model's shape only. Within a split the
softmax is online (Milakov and Gimelshein 2018; Dao et al. 2022) over steps of BLOCK_KV keys; splits are combined in
order, each as one (max, sum, output) triple. With few queries a program does one split, and the last to arrive
combines them (Dao et al. 2023, Flash-Decoding); with many a program walks all splits and combines them with the same
arithmetic. So a position's bits do not depend on how it was computed. Keys that a row may not see contribute exact
zeros, and a step or split without any visible key changes no bit.

Queries are the M side of the product, in tiles of 16 or 32 rows, which stay ``mma.sync`` on every NVIDIA target: one
tensor-core family from decode to prefill.

Bytes: q and the output once, K and V of the sequence once for each query tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from kernels.common import arrive, product, tree_sum
from kernels.cost import Cost
from kernels.dependent import let_next_start, wait_for_previous
from kernels.linear import TRITON_TYPES
from kernels.tiles import AttentionTiles, cdiv, launch_options, next_power_of_2


@triton.jit
def _attend_split(
    q,  # [BLOCK_Q, BLOCK_D]
    k_ptr,  # [num_blocks, HEADS, BLOCK_SIZE, HEAD_DIM]
    v_ptr,
    table_ptr,  # the sequence's block ids, int32
    head,
    positions,  # [BLOCK_Q]
    kv_end,
    split,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One KV split for one query tile: running maximum [BLOCK_Q], sum [BLOCK_Q], output [BLOCK_Q, BLOCK_D]."""
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < HEAD_DIM
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_Q], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, kv_end), BLOCK_KV):
        keys = start + tl.arange(0, BLOCK_KV)
        key_mask = keys < kv_end
        block = tl.load(table_ptr + keys // BLOCK_SIZE, mask=key_mask, other=0).to(tl.int64)
        base = ((block * HEADS + head) * BLOCK_SIZE + keys % BLOCK_SIZE) * HEAD_DIM
        k_mask = dim_mask[:, None] & key_mask[None, :]
        k = tl.load(k_ptr + base[None, :] + dims[:, None], mask=k_mask, other=0.0)  # [BLOCK_D, BLOCK_KV]
        s = product(q, k, tl.zeros([BLOCK_Q, BLOCK_KV], tl.float32)) * scale
        s = tl.where((keys[None, :] <= positions[:, None]) & key_mask[None, :], s, float("-inf"))
        new_m = tl.maximum(m, tl.max(s, axis=1))
        safe = tl.where(new_m == float("-inf"), 0.0, new_m)
        alpha = tl.exp(m - safe)
        p = tl.exp(s - safe[:, None])
        l = l * alpha + tree_sum(p, BLOCK_Q, BLOCK_KV)  # noqa: E741
        v_mask = key_mask[:, None] & dim_mask[None, :]
        v = tl.load(v_ptr + base[:, None] + dims[None, :], mask=v_mask, other=0.0)  # [BLOCK_KV, BLOCK_D]
        acc = product(p.to(DTYPE), v, acc * alpha[:, None])
        m = new_m
    return m, l, acc


@triton.jit
def _combine(m, l, acc, split_m, split_l, split_acc):  # noqa: E741
    """Add one split's (max, sum, output) to those of the splits before it."""
    new_m = tl.maximum(m, split_m)
    safe = tl.where(new_m == float("-inf"), 0.0, new_m)
    old, new = tl.exp(m - safe), tl.exp(split_m - safe)
    return new_m, l * old + split_l * new, acc * old[:, None] + split_acc * new[:, None]


@triton.jit
def _attention_tile(
    pid,
    q_ptr,  # [T, HEADS * HEAD_DIM]
    k_ptr,  # [num_blocks, HEADS, BLOCK_SIZE, HEAD_DIM]
    v_ptr,
    tables_ptr,  # [S, *] int32
    tiles_ptr,  # [tiles, 4] int32: sequence, first row, first position, number of queries
    out_ptr,  # [T, HEADS * HEAD_DIM]
    partial_ptr,  # [T * HEADS, split_programs, BLOCK_D + 2] float32
    counter_ptr,  # [tiles * HEADS] int32, zero before and after
    split_programs,
    scale,
    q_stride,
    table_stride,
    out_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    FUSED: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait_for_previous(PDL)
    split = 0
    if not FUSED:
        split = pid % split_programs
        pid = pid // split_programs
    head = pid % HEADS
    tile_ptr = tiles_ptr + (pid // HEADS) * 4
    sequence = tl.load(tile_ptr).to(tl.int64)
    first_row = tl.load(tile_ptr + 1).to(tl.int64)
    first_position = tl.load(tile_ptr + 2)
    count = tl.load(tile_ptr + 3)
    kv_end = first_position + count
    num_splits = tl.cdiv(kv_end, SPLIT)
    if (count > 0) & (split < num_splits):
        lanes = tl.arange(0, BLOCK_Q)
        dims = tl.arange(0, BLOCK_D)
        row_mask = lanes < count
        mask = row_mask[:, None] & (dims < HEAD_DIM)[None, :]
        rows = first_row + lanes
        positions = first_position + lanes
        table_ptr = tables_ptr + sequence * table_stride
        columns = head * HEAD_DIM + dims
        q = tl.load(q_ptr + rows[:, None] * q_stride + columns[None, :], mask=mask, other=0.0)
        m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_Q], tl.float32)  # noqa: E741
        acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        last = True
        if FUSED:
            for s in range(num_splits):
                split_m, split_l, split_acc = _attend_split(
                    q, k_ptr, v_ptr, table_ptr, head, positions, kv_end, s, scale, HEADS, HEAD_DIM, BLOCK_SIZE,
                    SPLIT, DTYPE, BLOCK_Q, BLOCK_KV, BLOCK_D,
                )  # fmt: skip
                m, l, acc = _combine(m, l, acc, split_m, split_l, split_acc)  # noqa: E741
        else:
            split_m, split_l, split_acc = _attend_split(
                q, k_ptr, v_ptr, table_ptr, head, positions, kv_end, split, scale, HEADS, HEAD_DIM, BLOCK_SIZE,
                SPLIT, DTYPE, BLOCK_Q, BLOCK_KV, BLOCK_D,
            )  # fmt: skip
            WIDTH: tl.constexpr = BLOCK_D + 2
            row_partial_ptr = partial_ptr + (rows * HEADS + head) * split_programs * WIDTH
            place = row_partial_ptr + split * WIDTH
            tl.store(place[:, None] + dims[None, :], split_acc, mask=mask)
            tl.store(place + BLOCK_D, split_m, mask=row_mask)
            tl.store(place + BLOCK_D + 1, split_l, mask=row_mask)
            last = arrive(counter_ptr + pid, num_splits)
            if last:
                for s in range(num_splits):
                    place = row_partial_ptr + s * WIDTH
                    split_acc = tl.load(place[:, None] + dims[None, :], mask=mask, other=0.0, cache_modifier=".cg")
                    split_m = tl.load(place + BLOCK_D, mask=row_mask, other=0.0, cache_modifier=".cg")
                    split_l = tl.load(place + BLOCK_D + 1, mask=row_mask, other=0.0, cache_modifier=".cg")
                    m, l, acc = _combine(m, l, acc, split_m, split_l, split_acc)  # noqa: E741
        if last:
            l = tl.where(row_mask, l, 1.0)  # noqa: E741
            out = (acc / l[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + rows[:, None] * out_stride + columns[None, :], out, mask=mask)


@triton.jit(do_not_specialize=["split_programs", "table_stride"])
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, tables_ptr, tiles_ptr, out_ptr, partial_ptr, counter_ptr, split_programs, scale, q_stride,
    table_stride, out_stride, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr, FUSED: tl.constexpr, DTYPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _attention_tile(
        tl.program_id(0), q_ptr, k_ptr, v_ptr, tables_ptr, tiles_ptr, out_ptr, partial_ptr, counter_ptr,
        split_programs, scale, q_stride, table_stride, out_stride, HEADS, HEAD_DIM, BLOCK_SIZE, SPLIT, FUSED, DTYPE,
        BLOCK_Q, BLOCK_KV, BLOCK_D, PDL,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Paging:
    """What a model's shape fixes of attention: heads, head width, tokens of a block, positions of a KV split."""

    heads: int
    head_dim: int
    block_size: int
    split: int


def query_tiles(
    query_starts: npt.NDArray[np.int32], positions: npt.NDArray[np.int32], block_q: int
) -> npt.NDArray[np.int32]:
    """[tiles, 4] int32 (sequence, first row, first position, number of queries) of a batch.

    Args:
        query_starts: [S + 1], sequence s has the rows query_starts[s]:query_starts[s + 1].
        positions: [T], consecutive within a sequence.
    """
    counts = np.diff(query_starts)
    per_sequence = -(-counts // block_q)
    sequence = np.repeat(np.arange(len(counts)), per_sequence)
    index = np.arange(len(sequence)) - np.repeat(np.cumsum(per_sequence) - per_sequence, per_sequence)
    first = query_starts[:-1][sequence] + index * block_q
    count = np.minimum(block_q, counts[sequence] - index * block_q)
    return np.stack([sequence, first, positions[first] if len(first) else first, count], axis=1).astype(np.int32)


def query_tiles_of_decode(positions: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """``query_tiles`` of a batch whose sequences have one row each, at ``positions`` [S]."""
    listed = np.ones((len(positions), 4), np.int32)
    listed[:, 0] = listed[:, 1] = np.arange(len(positions), dtype=np.int32)
    listed[:, 2] = positions
    return listed


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: torch.Tensor,
    tiles: torch.Tensor,
    out: torch.Tensor,
    partials: torch.Tensor,
    counters: torch.Tensor,
    paging: Paging,
    scale: float,
    choice: AttentionTiles,
    longest: int,
    dependent: bool = False,
) -> None:
    """Write out [T, heads * head_dim] for the query tiles.

    Args:
        q, out: [T, heads * head_dim] in the storage type, columns contiguous.
        k, v: one layer's cache, [num_blocks, heads, block_size, head_dim] contiguous, this step's keys in it.
        tables: [S, *] int32 block ids.
        tiles: [tiles, 4] int32 as ``query_tiles`` makes them with ``choice.block_q``; a tile of 0 queries does nothing.
        partials, counters: at least ``scratch_sizes`` elements; counters are zero before and after.
        scale: multiplies q.k.
        choice: from ``attention_tiles``.
        longest: the most keys that a query of the batch sees, or more.
        dependent: launched as ``kernels/dependent.py`` says.
    """
    splits = 1 if choice.fused else cdiv(longest, paging.split)
    _attention_kernel[(tiles.shape[0] * paging.heads * splits,)](
        q, k, v, tables, tiles, out, partials, counters, splits, scale, q.stride(0), tables.stride(0), out.stride(0),
        HEADS=paging.heads, HEAD_DIM=paging.head_dim, BLOCK_SIZE=paging.block_size, SPLIT=paging.split,
        FUSED=choice.fused, DTYPE=TRITON_TYPES[q.dtype], BLOCK_Q=choice.block_q,
        BLOCK_KV=choice.block_kv, BLOCK_D=max(16, next_power_of_2(paging.head_dim)),
        PDL=dependent, **launch_options(choice.num_warps, choice.num_stages, dependent),
    )  # fmt: skip


def scratch_sizes(
    num_rows: int, num_tiles: int, paging: Paging, choice: AttentionTiles, longest: int
) -> tuple[int, int]:
    """Elements of partials and counters that a launch on ``num_rows`` rows in ``num_tiles`` query tiles needs."""
    if choice.fused:
        return 1, 1
    width = max(16, next_power_of_2(paging.head_dim)) + 2
    return num_rows * paging.heads * cdiv(longest, paging.split) * width, num_tiles * paging.heads


def cost(tiles: Sequence[Sequence[int]], paging: Paging, element_size: int, choice: AttentionTiles) -> Cost:
    """Bytes of one launch for these query tiles (sequence, first row, first position, number of queries).

    Partial results are left out: they stay in the L2 cache (``rereads`` names them).
    """
    width = paging.heads * paging.head_dim * element_size
    queries = sum(tile[3] for tile in tiles)
    ends: dict[int, int] = {}
    for sequence, _, first, count in tiles:
        ends[sequence] = max(ends.get(sequence, 0), first + count)
    keys, walked = sum(ends.values()), sum(first + count for _, _, first, count in tiles)
    tables = sum(cdiv(end, paging.block_size) for end in ends.values()) * 4
    walked_tables = sum(cdiv(first + count, paging.block_size) for _, _, first, count in tiles) * paging.heads * 4
    rereads = {"keys and values": 2 * (walked - keys) * width, "tables": walked_tables - tables}
    if not choice.fused:
        parts = sum(count * cdiv(first + count, paging.split) for _, _, first, count in tiles)
        rereads["queries"] = (parts - queries) * width
        rereads["partial results, written and read"] = 2 * parts * paging.heads * (paging.head_dim + 2) * 4
    flops = sum(4 * paging.heads * paging.head_dim * count * (first + count) for _, _, first, count in tiles)
    reads = 2 * keys * width + queries * width + tables + len(tiles) * 16
    return Cost(0, reads, queries * width, flops, rereads)
