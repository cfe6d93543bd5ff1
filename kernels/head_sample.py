"""Final LayerNorm, head and draw in one launch, for rows that need no top-k, top-p or edits: no logits in memory.

A program computes one [VOCAB_TILE, BLOCK_T] tile of logits as ``logits`` does, and keeps of each row the tile's
maximum, its softmax mass, and its best score: x + Gumbel noise, or x where greedy, with the lowest id among equals.
The last program to finish a row block combines the tiles in vocabulary order, as ``sampling`` does with the same
arithmetic: a token and its logprob have the same bits on both paths. What this path cannot give is the rank of a drawn
token, since the logits are gone; a greedy row's is 1.

Bytes: W once (again for every BLOCK_T rows, from L2), the rows once per vocabulary tile (from L2), 20 bytes for each
row and vocabulary tile, written and read once (L2).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.common import arrive
from kernels.cost import Cost
from kernels.linear import TRITON_TYPES, Norm
from kernels.logits import logits_of_tile
from kernels.sampling import Drawn, Options, add_masses, gumbel_noise, tile_mass
from kernels.tiles import VOCAB_TILE, cdiv, launch_options, logits_tiles, vocab_groups
from kernels.weights import Weights


@triton.jit
def _tile_best(
    raw,  # [BLOCK_T, TILE] float32, -inf past the vocabulary
    first_id,
    rows,
    row_mask,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    sample_index_ptr,
    allowed_ptr,
    V: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TILE: tl.constexpr,
):
    """Best score of each row, its id, and its raw logit: [BLOCK_T] each."""
    ids = first_id + tl.arange(0, TILE)
    wanted = tl.load(temperature_ptr + rows, mask=row_mask, other=0.0)
    x = raw / tl.where(wanted == 0.0, 1.0, wanted)[:, None]
    if HAS_ALLOWED:
        WORDS: tl.constexpr = (V + 31) // 32
        mask = row_mask[:, None] & (ids < V)[None, :]
        word = tl.load(allowed_ptr + rows[:, None] * WORDS + (ids // 32)[None, :], mask=mask, other=0)
        x = tl.where(((word >> (ids % 32)[None, :]) & 1) != 0, x, float("-inf"))
    seed = tl.load(seed_ptr + rows, mask=row_mask, other=0)[:, None]
    position = tl.load(position_ptr + rows, mask=row_mask, other=0).to(tl.uint32, bitcast=True)[:, None]
    sample_index = tl.load(sample_index_ptr + rows, mask=row_mask, other=0).to(tl.uint32, bitcast=True)[:, None]
    quads = first_id // 4 + tl.arange(0, TILE // 4)[None, :] + tl.zeros([BLOCK_T, 1], tl.int32)
    noise = gumbel_noise(seed, quads, position, sample_index, BLOCK_T, TILE)
    score = tl.where((wanted == 0.0)[:, None], x, x + noise)
    best = tl.max(score, axis=1)
    best_id = tl.min(tl.where(score == best[:, None], ids[None, :], 2147483647), axis=1)
    best_raw = tl.max(tl.where(ids[None, :] == best_id[:, None], raw, float("-inf")), axis=1)
    return best, best_id, best_raw


@triton.jit
def _finish_row(
    row, tops_ptr, masses_ptr, scores_ptr, raws_ptr, best_ids_ptr, token_ptr, logprob_ptr, rank_ptr, status_ptr,
    TILES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Combine a row's vocabulary tiles in order, and write what was drawn."""
    maximum = float("-inf")
    best = float("-inf")
    best_id = 2147483647
    chosen = float("-inf")
    for first in range(0, TILES, GROUPS):
        tiles = first + tl.arange(0, GROUPS)
        mask = tiles < TILES
        place = row * TILES + tiles
        top = tl.load(tops_ptr + place, mask=mask, other=float("-inf"), cache_modifier=".cg")
        score = tl.load(scores_ptr + place, mask=mask, other=float("-inf"), cache_modifier=".cg")
        raw = tl.load(raws_ptr + place, mask=mask, other=float("-inf"), cache_modifier=".cg")
        ids = tl.load(best_ids_ptr + place, mask=mask, other=2147483647, cache_modifier=".cg")
        maximum = tl.maximum(maximum, tl.max(top))
        step_best = tl.max(score)
        step_id = tl.min(tl.where(score == step_best, ids, 2147483647))
        step_raw = tl.max(tl.where((score == step_best) & (ids == step_id), raw, float("-inf")))
        better = step_best > best
        chosen = tl.where(better, step_raw, chosen)
        best_id = tl.where(better, step_id, best_id)
        best = tl.where(better, step_best, best)
    mass = 0.0
    for first in range(0, TILES, GROUPS):
        tiles = first + tl.arange(0, GROUPS)
        mask = tiles < TILES
        place = row * TILES + tiles
        top = tl.load(tops_ptr + place, mask=mask, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(masses_ptr + place, mask=mask, other=0.0, cache_modifier=".cg")
        mass = add_masses(mass, top, part, maximum, GROUPS)
    status = tl.where(maximum == float("inf"), 1, tl.where(best == float("-inf"), 2, 0))
    tl.store(token_ptr + row, tl.where(status == 0, best_id, 0))
    tl.store(logprob_ptr + row, chosen - (maximum + tl.log(mass)))
    tl.store(rank_ptr + row, 1)
    tl.store(status_ptr + row, status)


@triton.jit
def _head_sample_tile(
    pid, x_ptr, w_ptr, scale_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, rstd_ptr, row_ids_ptr,
    temperature_ptr, seed_ptr, position_ptr, sample_index_ptr, allowed_ptr,
    tops_ptr, masses_ptr, scores_ptr, raws_ptr,  # [R, TILES] float32
    best_ids_ptr,  # [R, TILES] int32
    counter_ptr,  # [row blocks] int32, zero before and after
    token_ptr, logprob_ptr, rank_ptr, status_ptr,  # [R]
    num_rows, x_stride, w_stride, scale_stride,
    N: tl.constexpr, K: tl.constexpr, WEIGHTS: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
    HAS_ALLOWED: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    row_blocks = tl.cdiv(num_rows, BLOCK_T)
    tile = pid // row_blocks
    row_block = pid % row_blocks
    outs = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    rows = row_block * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    row_mask = rows < num_rows
    y = logits_of_tile(
        x_ptr, w_ptr, scale_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, rstd_ptr, row_ids_ptr, rows, row_mask,
        outs, x_stride, w_stride, scale_stride, N, K, WEIGHTS, GROUP, DTYPE, BLOCK_N, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    raw = tl.where((outs < N)[None, :], tl.trans(y), float("-inf"))  # [BLOCK_T, BLOCK_N]
    top, mass = tile_mass(raw, BLOCK_T, BLOCK_N)
    bad = tl.max(((raw != raw) | (raw == float("inf"))).to(tl.int32), axis=1)
    best, best_id, best_raw = _tile_best(
        raw, tile * BLOCK_N, rows, row_mask, temperature_ptr, seed_ptr, position_ptr, sample_index_ptr, allowed_ptr,
        N, HAS_ALLOWED, BLOCK_T, BLOCK_N,
    )  # fmt: skip
    place = rows * TILES + tile
    tl.store(tops_ptr + place, tl.where(bad != 0, float("inf"), top), mask=row_mask)
    tl.store(masses_ptr + place, mass, mask=row_mask)
    tl.store(scores_ptr + place, best, mask=row_mask)
    tl.store(raws_ptr + place, best_raw, mask=row_mask)
    tl.store(best_ids_ptr + place, best_id, mask=row_mask)
    if arrive(counter_ptr + row_block, TILES):
        for row in range(row_block * BLOCK_T, tl.minimum((row_block + 1) * BLOCK_T, num_rows)):
            _finish_row(
                row, tops_ptr, masses_ptr, scores_ptr, raws_ptr, best_ids_ptr, token_ptr, logprob_ptr, rank_ptr,
                status_ptr, TILES, GROUPS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _head_sample_kernel(
    x_ptr, w_ptr, scale_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, rstd_ptr, row_ids_ptr, temperature_ptr,
    seed_ptr, position_ptr, sample_index_ptr, allowed_ptr, tops_ptr, masses_ptr, scores_ptr, raws_ptr, best_ids_ptr,
    counter_ptr, token_ptr, logprob_ptr, rank_ptr, status_ptr, num_rows, x_stride, w_stride, scale_stride,
    N: tl.constexpr, K: tl.constexpr, WEIGHTS: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
    HAS_ALLOWED: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    _head_sample_tile(
        tl.program_id(0), x_ptr, w_ptr, scale_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, rstd_ptr, row_ids_ptr,
        temperature_ptr, seed_ptr, position_ptr, sample_index_ptr, allowed_ptr, tops_ptr, masses_ptr, scores_ptr,
        raws_ptr, best_ids_ptr, counter_ptr, token_ptr, logprob_ptr, rank_ptr, status_ptr, num_rows, x_stride,
        w_stride, scale_stride, N, K, WEIGHTS, GROUP, DTYPE, HAS_ALLOWED, GROUPS, BLOCK_N, BLOCK_T, BLOCK_K,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class HeadScratch:
    """What programs hand to each other: tile results, and counters that are zero before and after."""

    floats: torch.Tensor  # float32, at least 4 * (R * vocabulary tiles, rounded up to a multiple of 16)
    ids: torch.Tensor  # int32, at least R * vocabulary tiles
    counters: torch.Tensor  # int32, at least the row blocks


def head_sample(
    x: torch.Tensor,
    weights: Weights,
    norm: Norm,
    row_ids: torch.Tensor,
    options: Options,
    drawn: Drawn,
    scratch: HeadScratch,
    dtype: torch.dtype,
) -> None:
    """Draw a token after each of the rows ``row_ids`` [R] int32 of x [T, D] float32.

    Args:
        weights: the head, [V, D].
        norm: the final LayerNorm and the statistics of all T rows.
        options: temperature, the random stream and the mask; top-k, top-p and min-p are not looked at.
        drawn: written, but for the top-N; ``ranks`` are 1, which is right for greedy rows without a mask only.
        dtype: the storage type, in which the product's operands are.

    Raises:
        ValueError: options with penalties or a bias, or a ``drawn`` that wants top-N.
    """
    if options.output_counts is not None or options.logit_bias is not None or drawn.top_ids.shape[1]:
        raise ValueError("head_sample takes no penalties, no bias and no top-N; use logits and sampling")
    num_rows, (n, k) = row_ids.shape[0], weights.shape
    tiles, count = logits_tiles(num_rows, k, dtype.itemsize), cdiv(n, VOCAB_TILE)
    padded = cdiv(num_rows * count, 16) * 16  # each part starts where the compiler likes it
    tops, masses, scores, raws = scratch.floats[: 4 * padded].view(4, padded)
    scales = norm.weight if weights.scales is None else weights.scales
    num_warps = 8 if tiles.block_t == 64 else tiles.num_warps  # with 4, sm_80 spills
    _head_sample_kernel[(count * cdiv(num_rows, tiles.block_t),)](
        x, weights.data, scales, norm.weight, norm.bias, norm.mean, norm.rstd, row_ids, options.temperature,
        options.seeds, options.positions, options.sample_index,
        options.positions if options.allowed is None else options.allowed, tops, masses, scores, raws, scratch.ids,
        scratch.counters, drawn.tokens, drawn.logprobs, drawn.ranks, drawn.status, num_rows, x.stride(0),
        weights.data.stride(0), 0 if weights.scales is None else scales.stride(0),
        N=n, K=k, WEIGHTS=weights.kind, GROUP=weights.group, DTYPE=TRITON_TYPES[dtype],
        HAS_ALLOWED=options.allowed is not None, GROUPS=vocab_groups(n), BLOCK_N=VOCAB_TILE,
        BLOCK_T=tiles.block_t, BLOCK_K=tiles.block_k, **launch_options(num_warps, tiles.num_stages),
    )  # fmt: skip


def cost(num_rows: int, weights: Weights, element_size: int) -> Cost:
    """Bytes of one launch on ``num_rows`` different rows; the tiles' results stay in the L2 cache."""
    n, k = weights.shape
    x_bytes = num_rows * (k * 4 + 12)
    count = cdiv(n, VOCAB_TILE)
    return Cost(
        weights=weights.nbytes + 2 * k * element_size,
        reads=x_bytes + num_rows * 20,
        writes=num_rows * 16,
        flops=2 * num_rows * n * k,
        rereads={
            "weights": weights.nbytes * (cdiv(num_rows, logits_tiles(num_rows, k, element_size).block_t) - 1),
            "x": x_bytes * (count - 1),
            "tile results, written and read": 2 * 20 * num_rows * count,
        },
    )
