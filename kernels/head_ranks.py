"""After ``head_sample``: the exact rank of each drawn token, and the N most probable tokens; still no logits.

A rank is 1 + the number of raw logits above the drawn token's. A program of a vocabulary tile looks at the tile's
maxima, which ``head_sample`` left, and is done where none is above the drawn logit of its row. Otherwise it computes
the tile again, with the same bits, and adds what it counts to the ranks: integers, so that no order of programs shows.
A program of a row merges the tiles' candidates, each a list in order: N times the best head, the lowest id among
equals.

Bytes: W of the tiles that have a logit above a drawn one, none where the most probable tokens were drawn; maxima and
candidates (L2).
"""

import torch
import triton
import triton.language as tl

from kernels.cost import Cost
from kernels.head_sample import HeadScratch
from kernels.linear import TRITON_TYPES
from kernels.logits import logits_of_tile
from kernels.sampling import Drawn
from kernels.tiles import VOCAB_TILE, cdiv, launch_options, logits_tiles, next_power_of_2
from kernels.weights import Weights


@triton.jit
def _merge(
    row, values_ptr, value_ids_ptr, log_mass_ptr, top_ids_ptr, top_logprobs_ptr, num_logprobs, plane,
    TILES: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Write the N best of a row's candidates."""
    tiles = tl.arange(0, SPAN)
    place = row.to(tl.int64) * TILES + tiles
    log_mass = tl.load(log_mass_ptr + row)
    value = tl.load(values_ptr + place, mask=tiles < TILES, other=float("-inf"))  # the heads of the lists
    ids = tl.load(value_ids_ptr + place, mask=tiles < TILES, other=2147483647)
    for n in range(num_logprobs):
        best = tl.max(value)
        best_id = tl.min(tl.where(value == best, ids, 2147483647))
        tl.store(top_ids_ptr + row * num_logprobs + n, best_id)
        tl.store(top_logprobs_ptr + row * num_logprobs + n, best - log_mass)
        taken = (value == best) & (ids == best_id)
        place += tl.where(taken, plane, 0)
        follows = taken & (n + 1 < num_logprobs) & (tiles < TILES)
        value = tl.where(taken, tl.load(values_ptr + place, mask=follows, other=float("-inf")), value)
        ids = tl.where(taken, tl.load(value_ids_ptr + place, mask=follows, other=2147483647), ids)


@triton.jit
def _head_ranks_tile(
    pid, x_ptr, w_ptr, scale_ptr, row_ids_ptr,
    tops_ptr,  # [R, TILES] float32
    values_ptr,  # [N, plane] float32, of which [N, R, TILES] is read
    chosen_ptr, log_mass_ptr,  # [R] float32
    value_ids_ptr,  # [N, plane] int32
    rank_ptr,  # [R] int32, 1 before
    top_ids_ptr, top_logprobs_ptr,  # [R, N]
    num_rows, num_logprobs, merges, plane, x_stride, w_stride, scale_stride,
    N: tl.constexpr, K: tl.constexpr, WEIGHTS: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
    SPAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The first ``merges`` programs, R where there is a top-N, merge a row each; the others count in a tile each."""
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    if pid < merges:
        _merge(
            pid, values_ptr, value_ids_ptr, log_mass_ptr, top_ids_ptr, top_logprobs_ptr, num_logprobs, plane, TILES,
            SPAN,
        )  # fmt: skip
    else:
        row_blocks = tl.cdiv(num_rows, BLOCK_T)
        tile = (pid - merges) // row_blocks
        rows = (pid - merges) % row_blocks * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
        row_mask = rows < num_rows
        chosen = tl.load(chosen_ptr + rows, mask=row_mask, other=float("inf"))
        top = tl.load(tops_ptr + rows * TILES + tile, mask=row_mask, other=float("-inf"))
        if tl.max((top > chosen).to(tl.int32)) != 0:
            outs = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
            y = logits_of_tile(
                x_ptr, w_ptr, scale_ptr, row_ids_ptr, rows,
                row_mask, outs, x_stride, w_stride, scale_stride, N, K, WEIGHTS, GROUP, DTYPE, BLOCK_N, BLOCK_T,
                BLOCK_K,
            )  # fmt: skip
            # Loaded again rather than held over the product, where registers are short.
            chosen = tl.load(chosen_ptr + rows, mask=row_mask, other=float("inf"))
            above = (y > chosen[None, :]) & (outs < N)[:, None]
            tl.atomic_add(rank_ptr + rows, tl.sum(above.to(tl.int32), axis=0), mask=row_mask, sem="relaxed")


@triton.jit(do_not_specialize=["num_rows", "num_logprobs", "merges", "plane"])
def _head_ranks_kernel(
    x_ptr, w_ptr, scale_ptr, row_ids_ptr, tops_ptr, values_ptr,
    chosen_ptr, log_mass_ptr, value_ids_ptr, rank_ptr, top_ids_ptr, top_logprobs_ptr, num_rows, num_logprobs, merges,
    plane, x_stride, w_stride, scale_stride,
    N: tl.constexpr, K: tl.constexpr, WEIGHTS: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
    SPAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    _head_ranks_tile(
        tl.program_id(0), x_ptr, w_ptr, scale_ptr, row_ids_ptr,
        tops_ptr, values_ptr, chosen_ptr, log_mass_ptr, value_ids_ptr, rank_ptr, top_ids_ptr, top_logprobs_ptr,
        num_rows, num_logprobs, merges, plane, x_stride, w_stride, scale_stride, N, K, WEIGHTS, GROUP, DTYPE, SPAN,
        BLOCK_N, BLOCK_T, BLOCK_K,
    )  # fmt: skip


def head_ranks(
    x: torch.Tensor,
    weights: Weights,
    row_ids: torch.Tensor,
    drawn: Drawn,
    scratch: HeadScratch,
) -> None:
    """Complete ``drawn``: ranks, and the N most probable tokens.

    The arguments are those of the ``head_sample`` with ``ranks_follow=True`` that came right before.
    """
    num_rows, (n, k), num_logprobs = row_ids.shape[0], weights.shape, drawn.top_ids.shape[1]
    tiles, count = logits_tiles(num_rows, k, x.element_size(), weights.kind), cdiv(n, VOCAB_TILE)
    planes, candidates, rows, _, candidate_ids = scratch.parts(num_rows, n, num_logprobs)
    scales = x if weights.scales is None else weights.scales
    merges = num_rows if num_logprobs else 0
    _head_ranks_kernel[(merges + count * cdiv(num_rows, tiles.block_t),)](
        x, weights.data, scales, row_ids, planes[0], candidates, *rows,
        candidate_ids, drawn.ranks, drawn.top_ids, drawn.top_logprobs, num_rows, num_logprobs, merges,
        planes.shape[1], x.stride(0), weights.data.stride(0), 0 if weights.scales is None else scales.stride(0),
        N=n, K=k, WEIGHTS=weights.kind, GROUP=weights.group, DTYPE=TRITON_TYPES[x.dtype], SPAN=next_power_of_2(count),
        BLOCK_N=VOCAB_TILE, BLOCK_T=tiles.block_t, BLOCK_K=tiles.block_k,
        **launch_options(tiles.num_warps, tiles.num_stages),
    )  # fmt: skip


def cost(num_rows: int, weights: Weights, element_size: int, num_logprobs: int, tiles_above: int) -> Cost:
    """Bytes of one launch; ``tiles_above`` vocabulary tiles hold a logit above that of a row's drawn token.

    Counted as if all rows of a block had logits above theirs in the same tiles. What ``head_sample`` left is in L2.
    """
    n, k = weights.shape
    count, computed = cdiv(n, VOCAB_TILE), min(tiles_above, 1)
    x_bytes = computed * num_rows * (k * element_size + 4)
    merging = num_rows * (4 + 8 * (count + num_logprobs - 1)) if num_logprobs else 0
    return Cost(
        weights=weights.nbytes * tiles_above // count,
        reads=x_bytes + num_rows * (4 + 4 * count) + merging,
        writes=num_rows * (4 * computed + 8 * num_logprobs),
        flops=2 * num_rows * VOCAB_TILE * tiles_above * k,
        rereads={"x": x_bytes * max(0, tiles_above - 1)},
    )
