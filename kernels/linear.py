"""Linear layer with what comes after it fused: y = epilogue(x W^T + b).

The weights are the M side of the tensor core and the rows the N side (y^T = W x^T), so that one row and a whole
prefill compile to the same instruction family. K is cut into splits that depend on the model's shape only. With few
rows a program does one split of one [BLOCK_N, BLOCK_T] tile, and the last to arrive at a tile adds the partial sums in
split order; with many rows a program walks all splits itself and adds them in that same order, so that a row's bits
do not depend on how many rows there are.

Epilogues:

- "none": y [T, N] in y's type, after the activation.
- "residual": y = residual + out, [T, N] float32, and the last program to finish a row block writes the next LayerNorm
  of those rows, from means and squares that each program left of its tile. y is another buffer than the residual.
- "qkv": the first third of the outputs goes to y [T, N / 3], the others straight into the paged cache of K and V.

Bytes: W once (again for every BLOCK_T rows, from L2), x once per output block (from L2), y once; partial sums are
written and read once, from L2. Splitting K with a last arriver: Osama et al. 2023 (Stream-K).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from kernels.common import activate, apply_norm, arrive, product, tree_sum
from kernels.cost import Cost
from kernels.dependent import let_next_start, prefetch_weights, wait_for_previous
from kernels.tiles import BLOCK_N, MIN_ROWS, LinearTiles, cdiv, launch_options, linear_tiles, next_power_of_2
from kernels.weights import Weights, weight_tile

ACTIVATIONS = ("none", "gelu_tanh", "gelu", "relu", "silu")
NORM_TILE = tl.constexpr(2048)  # elements that the last program of a row block normalises at a time
TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def split_product(
    x_ptr,  # [*, K] in the storage type
    w_ptr,  # [N, K], or its quantised form
    scale_ptr,
    x_rows,  # [BLOCK_T] int64
    row_mask,  # [BLOCK_T]
    outs,  # [BLOCK_N] int64
    split,
    x_stride,
    w_stride,
    scale_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCKS_PER_SPLIT: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Partial sums of one K split, steps of BLOCK_K in order: [BLOCK_N, BLOCK_T] float32."""
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for step in range(BLOCKS_PER_SPLIT):
        first_k = (split * BLOCKS_PER_SPLIT + step) * BLOCK_K
        w = weight_tile(
            w_ptr, scale_ptr, outs, first_k, w_stride, scale_stride, N, K, WEIGHTS, GROUP, DTYPE, BLOCK_N, BLOCK_K
        )  # [BLOCK_N, BLOCK_K]
        ks = first_k + tl.arange(0, BLOCK_K)
        x_mask = (ks < K)[:, None] & row_mask[None, :]
        x = tl.load(x_ptr + x_rows[None, :] * x_stride + ks[:, None], mask=x_mask, other=0.0)  # [BLOCK_K, BLOCK_T]
        acc = product(w, x, acc)
    return acc


@triton.jit
def _store_qkv(
    y,  # [BLOCK_N, BLOCK_T] float32
    outs,
    rows,
    row_mask,
    slots,  # [BLOCK_T] int64
    q_ptr,  # [T, N / 3]
    k_ptr,  # [num_blocks, heads, BLOCK_SIZE, HEAD_DIM]
    v_ptr,
    q_stride,
    N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Queries to q, keys and values of the rows whose slot is not negative into the cache."""
    WIDTH: tl.constexpr = N // 3
    y = y.to(q_ptr.dtype.element_ty)
    part = outs // WIDTH
    within = outs % WIDTH
    tl.store(q_ptr + rows[None, :] * q_stride + within[:, None], y, mask=(part == 0)[:, None] & row_mask[None, :])
    kept = (slots >= 0)[None, :]
    in_token = within // HEAD_DIM * (BLOCK_SIZE * HEAD_DIM) + within % HEAD_DIM
    place = (slots // BLOCK_SIZE * (BLOCK_SIZE * WIDTH) + slots % BLOCK_SIZE * HEAD_DIM)[None, :] + in_token[:, None]
    tl.store(k_ptr + place, y, mask=(part == 1)[:, None] & kept)
    tl.store(v_ptr + place, y, mask=(part == 2)[:, None] & kept)


@triton.jit
def _store_moments(
    y,  # [BLOCK_N, BLOCK_T] float32
    out_mask,  # [BLOCK_N]
    moment_ptr,  # [T, TILES, 2] float32
    rows,
    row_mask,
    tile,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Of each row's part in this tile: the mean, and the sum of squared differences from it."""
    part = tl.trans(tl.where(out_mask[:, None], y, 0.0))  # [BLOCK_T, BLOCK_N]
    mean = tree_sum(part, BLOCK_T, BLOCK_N) / tl.minimum(N - tile * BLOCK_N, BLOCK_N).to(tl.float32)
    apart = tl.where(out_mask[None, :], part - mean[:, None], 0.0)
    squares = tree_sum(apart * apart, BLOCK_T, BLOCK_N)
    place = moment_ptr + (rows * ((N + BLOCK_N - 1) // BLOCK_N) + tile) * 2
    tl.store(place, mean, mask=row_mask)
    tl.store(place + 1, squares, mask=row_mask)


@triton.jit
def _finish_rows(
    y_ptr,
    moment_ptr,
    weight_ptr,
    bias_ptr,
    normed_ptr,
    row_counter_ptr,
    row_block,
    num_rows,
    y_stride,
    normed_stride,
    eps,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    NORM_ROWS: tl.constexpr,
    NORM_SPAN: tl.constexpr,
):
    """LayerNorm of a row block, by the last program that stored a tile of it: moments of tiles as Chan et al. 1983."""
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    if arrive(row_counter_ptr + row_block, TILES):
        tiles = tl.arange(0, NORM_SPAN)
        counts = tl.maximum(tl.minimum(N - tiles * BLOCK_N, BLOCK_N), 0).to(tl.float32)[None, :]
        for first in range(0, tl.minimum(BLOCK_T, num_rows - row_block * BLOCK_T), NORM_ROWS):
            rows = row_block * BLOCK_T + first + tl.arange(0, NORM_ROWS).to(tl.int64)
            row_mask = rows < num_rows
            mask = row_mask[:, None] & (tiles < TILES)[None, :]
            place = moment_ptr + (rows[:, None] * TILES + tiles[None, :]) * 2
            means = tl.load(place, mask=mask, other=0.0)
            squares = tl.load(place + 1, mask=mask, other=0.0)
            mean = tree_sum(means * counts, NORM_ROWS, NORM_SPAN) / N
            apart = tl.where(mask, means - mean[:, None], 0.0)
            variance = tree_sum(squares + counts * apart * apart, NORM_ROWS, NORM_SPAN) / N
            apply_norm(
                y_ptr, rows, row_mask, mean, variance, weight_ptr, bias_ptr, normed_ptr, y_stride, normed_stride, eps,
                N, NORM_TILE // NORM_ROWS,
            )  # fmt: skip


@triton.jit
def _sum_partials(
    partial_ptr,  # [SPLITS, BLOCK_T, BLOCK_N] of one tile
    row_mask,  # [BLOCK_T]
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The partial sums of a tile, added in split order: [BLOCK_N, BLOCK_T]."""
    within = tl.arange(0, BLOCK_N)[:, None] + tl.arange(0, BLOCK_T)[None, :] * BLOCK_N
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for split in tl.range(SPLITS, loop_unroll_factor=8 if BLOCK_T == 16 else 4 if BLOCK_T == 32 else 2):
        place = partial_ptr + split * BLOCK_N * BLOCK_T + within
        total += tl.load(place, mask=row_mask[None, :], other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def _linear_tile(
    pid,
    x_ptr,  # [T, K] in the storage type
    w_ptr,
    scale_ptr,
    bias_ptr,  # [N]
    y_ptr,  # [T, N], or the queries [T, N / 3]
    residual_ptr,  # [T, N] float32
    norm_weight_ptr,  # [N]
    norm_bias_ptr,  # [N]
    normed_ptr,  # [T, N] in the storage type
    k_ptr,  # [num_blocks, heads, BLOCK_SIZE, HEAD_DIM]
    v_ptr,
    slots_ptr,  # [T] int64
    partial_ptr,  # [tiles, SPLITS, BLOCK_T, BLOCK_N] float32
    moment_ptr,  # [T, tiles of a row, 2] float32
    tile_counter_ptr,  # [tiles] int32, zero before and after
    row_counter_ptr,  # [row blocks] int32, zero before and after
    num_rows,
    x_stride,
    w_stride,
    scale_stride,
    y_stride,
    residual_stride,
    normed_stride,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCKS_PER_SPLIT: tl.constexpr,
    FUSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM_ROWS: tl.constexpr,
    NORM_SPAN: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    row_block = pid % tl.cdiv(num_rows, BLOCK_T)
    tile = pid // tl.cdiv(num_rows, BLOCK_T)  # all row blocks of a weight tile run together
    split = 0
    if not FUSED:
        split = tile % SPLITS
        tile = tile // SPLITS
    outs = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    rows = row_block * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    row_mask = rows < num_rows
    first_k = split * (BLOCKS_PER_SPLIT * BLOCK_K)
    STEPS: tl.constexpr = BLOCKS_PER_SPLIT * SPLITS if FUSED else BLOCKS_PER_SPLIT
    prefetch_weights(w_ptr, outs, first_k, w_stride, N, K, WEIGHTS, BLOCK_K, STEPS, PDL)
    wait_for_previous(PDL)
    out_mask = outs < N
    # Loaded early, their way from memory is hidden, but before sm_90 many rows leave no registers for it.
    EARLY: tl.constexpr = not FUSED or EPILOGUE == "residual" or BLOCKS_PER_SPLIT <= 3 or cuda_capability_geq(9)
    if EARLY:
        bias = tl.load(bias_ptr + outs, mask=out_mask, other=0.0)
        if EPILOGUE == "qkv":
            slots = tl.load(slots_ptr + rows, mask=row_mask, other=-1)
        elif EPILOGUE == "residual":  # a load whose value nobody wants has to be volatile
            tl.load(norm_weight_ptr + outs, mask=out_mask, other=0.0, volatile=True)
            tl.load(norm_bias_ptr + outs, mask=out_mask, other=0.0, volatile=True)
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for s in range(SPLITS if FUSED else 1):
        total += split_product(
            x_ptr, w_ptr, scale_ptr, rows, row_mask, outs, split + s, x_stride, w_stride, scale_stride, N, K,
            BLOCKS_PER_SPLIT, WEIGHTS, GROUP, DTYPE, BLOCK_N, BLOCK_T, BLOCK_K,
        )  # fmt: skip
    last = True
    if not FUSED:
        tile_id = tile * tl.cdiv(num_rows, BLOCK_T) + row_block
        tile_partial_ptr = partial_ptr + tile_id.to(tl.int64) * (SPLITS * BLOCK_N * BLOCK_T)
        within = tl.arange(0, BLOCK_N)[:, None] + tl.arange(0, BLOCK_T)[None, :] * BLOCK_N
        tl.store(tile_partial_ptr + split * (BLOCK_N * BLOCK_T) + within, total, mask=row_mask[None, :])
        last = arrive(tile_counter_ptr + tile_id, SPLITS)
    if last:
        mask = out_mask[:, None] & row_mask[None, :]
        if EPILOGUE == "residual":
            old = tl.load(residual_ptr + rows[None, :] * residual_stride + outs[:, None], mask=mask, other=0.0)
        if not FUSED:
            total = _sum_partials(tile_partial_ptr, row_mask, SPLITS, BLOCK_N, BLOCK_T)
        if WEIGHTS == "int8":
            total *= tl.load(scale_ptr + outs, mask=out_mask, other=0.0)[:, None]
        if not EARLY:
            bias = tl.load(bias_ptr + outs, mask=out_mask, other=0.0)
            if EPILOGUE == "qkv":
                slots = tl.load(slots_ptr + rows, mask=row_mask, other=-1)
        total += bias.to(tl.float32)[:, None]
        y = activate(total, ACTIVATION)
        if EPILOGUE == "qkv":
            _store_qkv(y, outs, rows, row_mask, slots, y_ptr, k_ptr, v_ptr, y_stride, N, HEAD_DIM, BLOCK_SIZE)
        elif EPILOGUE == "residual":
            y += old
            tl.store(y_ptr + rows[None, :] * y_stride + outs[:, None], y, mask=mask)
            _store_moments(y, out_mask, moment_ptr, rows, row_mask, tile, N, BLOCK_N, BLOCK_T)
            _finish_rows(
                y_ptr, moment_ptr, norm_weight_ptr, norm_bias_ptr, normed_ptr, row_counter_ptr, row_block, num_rows,
                y_stride, normed_stride, eps, N, BLOCK_N, BLOCK_T, NORM_ROWS, NORM_SPAN,
            )  # fmt: skip
        else:
            tl.store(y_ptr + rows[None, :] * y_stride + outs[:, None], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, y_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, normed_ptr, k_ptr, v_ptr,
    slots_ptr, partial_ptr, moment_ptr, tile_counter_ptr, row_counter_ptr, num_rows, x_stride, w_stride, scale_stride,
    y_stride, residual_stride, normed_stride, eps,
    N: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, BLOCKS_PER_SPLIT: tl.constexpr, FUSED: tl.constexpr,
    ACTIVATION: tl.constexpr, EPILOGUE: tl.constexpr, WEIGHTS: tl.constexpr, GROUP: tl.constexpr,
    DTYPE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, NORM_ROWS: tl.constexpr, NORM_SPAN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    _linear_tile(
        tl.program_id(0),
        x_ptr, w_ptr, scale_ptr, bias_ptr, y_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, normed_ptr, k_ptr,
        v_ptr, slots_ptr, partial_ptr, moment_ptr, tile_counter_ptr, row_counter_ptr, num_rows, x_stride, w_stride,
        scale_stride, y_stride, residual_stride, normed_stride, eps, N, K, SPLITS, BLOCKS_PER_SPLIT, FUSED, ACTIVATION,
        EPILOGUE, WEIGHTS, GROUP, DTYPE, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_T, BLOCK_K, NORM_ROWS, NORM_SPAN, PDL,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Residual:
    """The residual stream x [T, N] float32 to add to, and the LayerNorm after it: its parameters [N], its eps, and
    where the normalised rows [T, N] go, any float type."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    normed: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class KVCache:
    """One layer's paged cache [num_blocks, heads, block_size, head_dim], and the rows' slots [T] int64 (-1: none)."""

    k: torch.Tensor
    v: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class Workspace:
    """What programs hand to each other. Counters are zero before and after every launch; the rest is scratch."""

    partials: torch.Tensor  # float32: partial sums, then the moments of rows
    tile_counters: torch.Tensor  # int32
    row_counters: torch.Tensor  # int32

    @staticmethod
    def needed(
        num_rows: int, out_features: int, in_features: int, element_size: int, residual: bool = False
    ) -> tuple[int, int, int]:
        """Elements of partials, tile counters and row counters that suffice for a linear of this shape."""
        tiles = linear_tiles(num_rows, out_features, in_features, element_size, residual)
        row_blocks, out_blocks = cdiv(num_rows, tiles.block_t), cdiv(out_features, BLOCK_N)
        moments = 2 * num_rows * out_blocks if residual else 0
        sums = _partial_sums(tiles, out_blocks * row_blocks)
        return max(1, sums + moments), 1 if tiles.fused else out_blocks * row_blocks, cdiv(num_rows, MIN_ROWS)


def _partial_sums(tiles: LinearTiles, count: int) -> int:
    """Elements of the partial sums of ``count`` tiles."""
    return 0 if tiles.fused else count * tiles.splits * BLOCK_N * tiles.block_t


def linear(
    x: torch.Tensor,
    weights: Weights,
    bias: torch.Tensor,
    y: torch.Tensor,
    workspace: Workspace,
    *,
    activation: str = "none",
    residual: Residual | None = None,
    cache: KVCache | None = None,
    dependent: bool = False,
) -> None:
    """Write y = epilogue(x W^T + bias) for the T rows of x [T, K].

    Args:
        x: in the storage type, in which the product's operands are; columns contiguous.
        weights: [N, K], bias: [N].
        y: [T, N] of any float type, float32 with a ``residual``; [T, N / 3] queries in x's type with a ``cache``.
        activation: one of ``ACTIVATIONS``.
        dependent: launched as ``kernels/dependent.py`` says.

    Raises:
        ValueError: an unknown activation, a residual and a cache together, or x of another width than the weights.
    """
    (num_rows, width), (n, k) = x.shape, weights.shape
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear has no activation {activation!r}; choose from {', '.join(ACTIVATIONS)}")
    if residual is not None and cache is not None:
        raise ValueError("linear takes a residual or a cache, not both")
    if width != k:
        raise ValueError(f"linear got x with {width} columns for weights of {k}")
    tiles = linear_tiles(num_rows, n, k, x.element_size(), residual is not None, weights.kind)
    count = cdiv(num_rows, tiles.block_t) * cdiv(n, BLOCK_N)
    grid = count * (1 if tiles.fused else tiles.splits)
    moments = workspace.partials[_partial_sums(tiles, count) :] if residual else workspace.partials
    scales = weights.scales
    _linear_kernel[(grid,)](
        x, weights.data, bias if scales is None else scales, bias, y, residual.x if residual else y,
        residual.weight if residual else bias, residual.bias if residual else bias, residual.normed if residual else y,
        cache.k if cache else y, cache.v if cache else y, cache.slots if cache else workspace.tile_counters,
        workspace.partials, moments, workspace.tile_counters, workspace.row_counters,
        num_rows, x.stride(0), weights.data.stride(0), 0 if scales is None else scales.stride(0), y.stride(0),
        residual.x.stride(0) if residual else 0, residual.normed.stride(0) if residual else 0,
        residual.eps if residual else 0.0,
        N=n, K=k, SPLITS=tiles.splits, BLOCKS_PER_SPLIT=tiles.blocks_per_split, FUSED=tiles.fused,
        ACTIVATION=activation, EPILOGUE="residual" if residual else "qkv" if cache else "none",
        WEIGHTS=weights.kind, GROUP=weights.group, DTYPE=TRITON_TYPES[x.dtype],
        HEAD_DIM=cache.k.shape[3] if cache else 1, BLOCK_SIZE=cache.k.shape[2] if cache else 1,
        BLOCK_N=BLOCK_N, BLOCK_T=tiles.block_t, BLOCK_K=tiles.block_k, NORM_ROWS=tiles.norm_rows if residual else 1,
        NORM_SPAN=next_power_of_2(cdiv(n, BLOCK_N)) if residual else 1, PDL=dependent,
        **launch_options(tiles.num_warps, tiles.num_stages, dependent),
    )  # fmt: skip


def cost(num_rows: int, weights: Weights, element_size: int, epilogue: str) -> Cost:
    """Bytes of one launch; x, bias, y (but a residual) and norm are stored in ``element_size`` bytes.

    ``epilogue`` is as in the module's text. Partial sums and counters are left out: they stay in the L2 cache
    (``rereads`` names them).
    """
    (n, k), rows = weights.shape, num_rows
    residual = epilogue == "residual"
    tiles = linear_tiles(rows, n, k, element_size, residual, weights.kind)
    row_blocks, out_blocks = cdiv(rows, tiles.block_t), cdiv(n, BLOCK_N)
    x_bytes, bias_bytes, norm_bytes = rows * k * element_size, n * element_size, 2 * n * element_size * residual
    reads = x_bytes + (rows * n * 4 if residual else rows * 8 if epilogue == "qkv" else 0)
    writes = rows * n * (4 * residual + element_size)
    splits = 1 if tiles.fused else tiles.splits
    rereads = {
        "weights": weights.nbytes * (row_blocks - 1),
        "bias": bias_bytes * (splits * row_blocks - 1),
        "x": x_bytes * (out_blocks - 1),
    }
    if not tiles.fused:
        rereads["partial sums, written and read"] = 2 * rows * out_blocks * tiles.splits * BLOCK_N * 4
    if residual:
        rereads["new residual, to normalise it"] = rows * n * 4
        rereads["moments of rows, written and read"] = 4 * rows * out_blocks * 4
        rereads["norm weight and bias"] = norm_bytes * (splits * row_blocks + cdiv(rows, tiles.norm_rows) - 1)
    if epilogue == "qkv":
        rereads["slots"] = rows * 8 * (splits * out_blocks - 1)
    return Cost(weights.nbytes + bias_bytes + norm_bytes, reads, writes, 2 * rows * n * k, rereads)
