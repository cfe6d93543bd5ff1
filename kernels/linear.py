"""Linear layer with what comes before and after it fused: y = epilogue(prologue(x) W^T + b).

The weights are the M side of the tensor core and the rows the N side (y^T = W x^T), so that one row and a whole
prefill compile to the same instruction family. K is cut into splits that depend on the model's shape only. With few
rows a program does one split of one [BLOCK_N, BLOCK_T] tile, and the last to arrive at a tile adds the partial sums in
split order; with many rows a program walks all splits itself and adds them in that same order, so that a row's bits
do not depend on how many rows there are.

Prologues: none, or LayerNorm with given row statistics. Epilogues:

- "none": y [T, N] in y's type, after the activation.
- "residual": y = residual + out, [T, N] float32, and the last program to finish a row block computes those rows'
  mean and 1/sigma for the next LayerNorm. y is another buffer than the residual.
- "qkv": the first third of the outputs goes to y [T, N / 3], the others straight into the paged cache of K and V.

Bytes: W once (again for every BLOCK_T rows, from L2), x once per output block (from L2), y once; partial sums are
written and read once, from L2. Splitting K with a last arriver: Osama et al. 2023 (Stream-K).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.common import activate, arrive, normalise, row_statistics
from kernels.cost import Cost
from kernels.dependent import let_next_start, prefetch_weights, wait_for_previous
from kernels.tiles import BLOCK_N, STAT_CHUNK, STAT_ROWS, cdiv, launch_options, linear_tiles
from kernels.weights import Weights, weight_tile

ACTIVATIONS = ("none", "gelu_tanh", "gelu", "relu", "silu")
TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def split_product(
    x_ptr,  # [*, K], float32 where NORM, else the storage type
    w_ptr,  # [N, K], or its quantised form
    scale_ptr,
    norm_weight_ptr,  # [K]
    norm_bias_ptr,  # [K]
    x_rows,  # [BLOCK_T] int64
    row_mask,  # [BLOCK_T]
    mean,  # [BLOCK_T]
    rstd,  # [BLOCK_T]
    outs,  # [BLOCK_N] int64
    split,
    x_stride,
    w_stride,
    scale_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCKS_PER_SPLIT: tl.constexpr,
    NORM: tl.constexpr,
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
        if NORM:
            gamma = tl.load(norm_weight_ptr + ks, mask=ks < K, other=0.0).to(tl.float32)
            beta = tl.load(norm_bias_ptr + ks, mask=ks < K, other=0.0).to(tl.float32)
            x = normalise(x, mean[None, :], rstd[None, :], gamma[:, None], beta[:, None])
        acc = tl.dot(w, x.to(DTYPE), acc, input_precision="ieee")
    return acc


@triton.jit
def _store_qkv(
    y,  # [BLOCK_N, BLOCK_T] float32
    outs,
    rows,
    row_mask,
    q_ptr,  # [T, N / 3]
    k_ptr,  # [num_blocks, heads, BLOCK_SIZE, HEAD_DIM]
    v_ptr,
    slots_ptr,  # [T] int64
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
    slots = tl.load(slots_ptr + rows, mask=row_mask, other=-1)
    kept = (slots >= 0)[None, :]
    head_row = (slots // BLOCK_SIZE)[None, :] * (WIDTH // HEAD_DIM) + (within // HEAD_DIM)[:, None]
    place = (head_row * BLOCK_SIZE + (slots % BLOCK_SIZE)[None, :]) * HEAD_DIM + (within % HEAD_DIM)[:, None]
    tl.store(k_ptr + place, y, mask=(part == 1)[:, None] & kept)
    tl.store(v_ptr + place, y, mask=(part == 2)[:, None] & kept)


@triton.jit
def _finish_rows(
    y_ptr,
    mean_ptr,
    rstd_ptr,
    row_counter_ptr,
    row_block,
    num_rows,
    y_stride,
    eps,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAT_ROWS: tl.constexpr,
    STAT_CHUNK: tl.constexpr,
):
    """Statistics of a row block, by the last program that stored a tile of it."""
    if arrive(row_counter_ptr + row_block, (N + BLOCK_N - 1) // BLOCK_N):
        for first in range(0, BLOCK_T, STAT_ROWS):
            rows = row_block * BLOCK_T + first + tl.arange(0, STAT_ROWS).to(tl.int64)
            row_mask = rows < num_rows
            mean, rstd = row_statistics(y_ptr, rows, row_mask, y_stride, eps, N, STAT_ROWS, STAT_CHUNK)
            tl.store(mean_ptr + rows, mean, mask=row_mask)
            tl.store(rstd_ptr + rows, rstd, mask=row_mask)


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
    for split in range(SPLITS):
        place = partial_ptr + split * BLOCK_N * BLOCK_T + within
        total += tl.load(place, mask=row_mask[None, :], other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def _linear_tile(
    pid,
    x_ptr,  # [T, K], float32 where NORM, else the storage type
    w_ptr,
    scale_ptr,
    bias_ptr,  # [N]
    norm_weight_ptr,  # [K]
    norm_bias_ptr,  # [K]
    mean_ptr,  # [T] float32
    rstd_ptr,  # [T] float32
    y_ptr,  # [T, N], or the queries [T, N / 3]
    residual_ptr,  # [T, N] float32
    next_mean_ptr,  # [T] float32
    next_rstd_ptr,  # [T] float32
    k_ptr,  # [num_blocks, heads, BLOCK_SIZE, HEAD_DIM]
    v_ptr,
    slots_ptr,  # [T] int64
    partial_ptr,  # [tiles, SPLITS, BLOCK_T, BLOCK_N] float32
    tile_counter_ptr,  # [tiles] int32, zero before and after
    row_counter_ptr,  # [row blocks] int32, zero before and after
    num_rows,
    x_stride,
    w_stride,
    scale_stride,
    y_stride,
    residual_stride,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCKS_PER_SPLIT: tl.constexpr,
    FUSED: tl.constexpr,
    NORM: tl.constexpr,
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
    STAT_ROWS: tl.constexpr,
    STAT_CHUNK: tl.constexpr,
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
    mean = tl.load(mean_ptr + rows, mask=row_mask & NORM, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=row_mask & NORM, other=0.0)
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for s in range(SPLITS if FUSED else 1):
        total += split_product(
            x_ptr, w_ptr, scale_ptr, norm_weight_ptr, norm_bias_ptr, rows, row_mask, mean, rstd, outs, split + s,
            x_stride, w_stride, scale_stride, N, K, BLOCKS_PER_SPLIT, NORM, WEIGHTS, GROUP, DTYPE,
            BLOCK_N, BLOCK_T, BLOCK_K,
        )  # fmt: skip
    last = True
    if not FUSED:
        tile_id = tile * tl.cdiv(num_rows, BLOCK_T) + row_block
        tile_partial_ptr = partial_ptr + tile_id.to(tl.int64) * (SPLITS * BLOCK_N * BLOCK_T)
        within = tl.arange(0, BLOCK_N)[:, None] + tl.arange(0, BLOCK_T)[None, :] * BLOCK_N
        tl.store(tile_partial_ptr + split * (BLOCK_N * BLOCK_T) + within, total, mask=row_mask[None, :])
        last = arrive(tile_counter_ptr + tile_id, SPLITS)
        if last:
            total = _sum_partials(tile_partial_ptr, row_mask, SPLITS, BLOCK_N, BLOCK_T)
    if last:
        out_mask = outs < N
        if WEIGHTS == "int8":
            total *= tl.load(scale_ptr + outs, mask=out_mask, other=0.0)[:, None]
        total += tl.load(bias_ptr + outs, mask=out_mask, other=0.0).to(tl.float32)[:, None]
        y = activate(total, ACTIVATION)
        mask = out_mask[:, None] & row_mask[None, :]
        if EPILOGUE == "qkv":
            _store_qkv(y, outs, rows, row_mask, y_ptr, k_ptr, v_ptr, slots_ptr, y_stride, N, HEAD_DIM, BLOCK_SIZE)
        elif EPILOGUE == "residual":
            old = tl.load(residual_ptr + rows[None, :] * residual_stride + outs[:, None], mask=mask, other=0.0)
            tl.store(y_ptr + rows[None, :] * y_stride + outs[:, None], old + y, mask=mask)
            _finish_rows(
                y_ptr, next_mean_ptr, next_rstd_ptr, row_counter_ptr, row_block, num_rows, y_stride, eps,
                N, BLOCK_N, BLOCK_T, STAT_ROWS, STAT_CHUNK,
            )  # fmt: skip
        else:
            tl.store(y_ptr + rows[None, :] * y_stride + outs[:, None], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, rstd_ptr, y_ptr, residual_ptr,
    next_mean_ptr, next_rstd_ptr, k_ptr, v_ptr, slots_ptr, partial_ptr, tile_counter_ptr, row_counter_ptr,
    num_rows, x_stride, w_stride, scale_stride, y_stride, residual_stride, eps,
    N: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, BLOCKS_PER_SPLIT: tl.constexpr, FUSED: tl.constexpr,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, EPILOGUE: tl.constexpr, WEIGHTS: tl.constexpr,
    GROUP: tl.constexpr, DTYPE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAT_ROWS: tl.constexpr,
    STAT_CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _linear_tile(
        tl.program_id(0),
        x_ptr, w_ptr, scale_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, rstd_ptr, y_ptr, residual_ptr,
        next_mean_ptr, next_rstd_ptr, k_ptr, v_ptr, slots_ptr, partial_ptr, tile_counter_ptr, row_counter_ptr,
        num_rows, x_stride, w_stride, scale_stride, y_stride, residual_stride, eps,
        N, K, SPLITS, BLOCKS_PER_SPLIT, FUSED, NORM, ACTIVATION, EPILOGUE, WEIGHTS, GROUP, DTYPE, HEAD_DIM,
        BLOCK_SIZE, BLOCK_N, BLOCK_T, BLOCK_K, STAT_ROWS, STAT_CHUNK, PDL,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Norm:
    """The LayerNorm before a linear: its parameters [K], and the rows' mean and 1/sigma [T] float32."""

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    rstd: torch.Tensor


@dataclass(frozen=True, slots=True)
class Residual:
    """The residual stream [T, N] float32 to add to, and where its new row statistics [T] float32 go."""

    x: torch.Tensor
    mean: torch.Tensor
    rstd: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class KVCache:
    """One layer's paged cache [num_blocks, heads, block_size, head_dim], and the rows' slots [T] int64 (-1: none)."""

    k: torch.Tensor
    v: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class Workspace:
    """What programs hand to each other. Counters are zero before and after every launch; partials are scratch."""

    partials: torch.Tensor  # float32
    tile_counters: torch.Tensor  # int32
    row_counters: torch.Tensor  # int32

    @staticmethod
    def needed(num_rows: int, out_features: int, in_features: int, element_size: int) -> tuple[int, int, int]:
        """Elements of partials, tile counters and row counters that a linear of this shape needs."""
        tiles = linear_tiles(num_rows, out_features, in_features, element_size)
        row_blocks = cdiv(num_rows, tiles.block_t)
        if tiles.fused:
            return 1, 1, row_blocks
        count = cdiv(out_features, BLOCK_N) * row_blocks
        return count * tiles.splits * BLOCK_N * tiles.block_t, count, row_blocks


def linear(
    x: torch.Tensor,
    weights: Weights,
    bias: torch.Tensor,
    y: torch.Tensor,
    workspace: Workspace,
    *,
    dtype: torch.dtype,
    norm: Norm | None = None,
    activation: str = "none",
    residual: Residual | None = None,
    cache: KVCache | None = None,
    dependent: bool = False,
) -> None:
    """Write y = epilogue(prologue(x) W^T + bias) for the T rows of x [T, K].

    Args:
        x: float32 with a ``norm``, else ``dtype``; columns contiguous.
        weights: [N, K], bias: [N].
        y: [T, N] of any float type, float32 with a ``residual``; [T, N / 3] queries in ``dtype`` with a ``cache``.
        dtype: the storage type, in which the product's operands are.
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
    tiles = linear_tiles(num_rows, n, k, dtype.itemsize)
    grid = cdiv(num_rows, tiles.block_t) * cdiv(n, BLOCK_N) * (1 if tiles.fused else tiles.splits)
    scales = weights.scales
    num_warps = 8 if weights.kind == "int4" and tiles.block_t == 64 else tiles.num_warps  # with 4, sm_80 spills
    stat_rows = STAT_ROWS if n <= 1280 else STAT_ROWS // 2  # of wider rows, 8 at once spill there
    _linear_kernel[(grid,)](
        x, weights.data, bias if scales is None else scales, bias,
        norm.weight if norm else bias, norm.bias if norm else bias, norm.mean if norm else x, norm.rstd if norm else x,
        y, residual.x if residual else y, residual.mean if residual else y, residual.rstd if residual else y,
        cache.k if cache else y, cache.v if cache else y, cache.slots if cache else workspace.tile_counters,
        workspace.partials, workspace.tile_counters, workspace.row_counters,
        num_rows, x.stride(0), weights.data.stride(0), 0 if scales is None else scales.stride(0), y.stride(0),
        residual.x.stride(0) if residual else 0, residual.eps if residual else 0.0,
        N=n, K=k, SPLITS=tiles.splits, BLOCKS_PER_SPLIT=tiles.blocks_per_split, FUSED=tiles.fused,
        NORM=norm is not None, ACTIVATION=activation,
        EPILOGUE="residual" if residual else "qkv" if cache else "none",
        WEIGHTS=weights.kind, GROUP=weights.group, DTYPE=TRITON_TYPES[dtype],
        HEAD_DIM=cache.k.shape[3] if cache else 1, BLOCK_SIZE=cache.k.shape[2] if cache else 1,
        BLOCK_N=BLOCK_N, BLOCK_T=tiles.block_t, BLOCK_K=tiles.block_k, STAT_ROWS=stat_rows, STAT_CHUNK=STAT_CHUNK,
        PDL=dependent, **launch_options(num_warps, tiles.num_stages, dependent),
    )  # fmt: skip


def cost(
    num_rows: int, weights: Weights, dtype: torch.dtype, bias_size: int, norm: bool, epilogue: str, y_size: int
) -> Cost:
    """Bytes of one launch; ``bias_size`` and ``y_size`` are bytes of an element, ``epilogue`` as in the module's text.

    Partial sums and counters are left out: they stay in the L2 cache (``rereads`` names them).
    """
    (n, k), rows = weights.shape, num_rows
    tiles = linear_tiles(rows, n, k, dtype.itemsize)
    row_blocks, out_blocks = cdiv(rows, tiles.block_t), cdiv(n, BLOCK_N)
    x_bytes = rows * k * (4 if norm else dtype.itemsize) + (rows * 8 if norm else 0)
    reads = x_bytes + (rows * n * 4 if epilogue == "residual" else rows * 8 if epilogue == "qkv" else 0)
    writes = rows * n * (4 if epilogue == "residual" else y_size) + (rows * 8 if epilogue == "residual" else 0)
    rereads = {
        "weights and bias": (weights.nbytes + n * bias_size) * (row_blocks - 1),
        "x": x_bytes * (out_blocks - 1),
    }
    if not tiles.fused:
        rereads["partial sums, written and read"] = 2 * rows * out_blocks * tiles.splits * BLOCK_N * 4
    if epilogue == "residual":
        rereads["new residual, for its statistics"] = 2 * rows * n * 4
    if epilogue == "qkv":
        rereads["slots"] = rows * 8 * (out_blocks - 1)
    norm_bytes = 2 * k * dtype.itemsize if norm else 0
    rereads["norm weight and bias"] = norm_bytes * (out_blocks * row_blocks - 1)
    rereads["bias"] = n * bias_size * (row_blocks - 1)
    return Cost(weights.nbytes + n * bias_size + norm_bytes, reads, writes, 2 * rows * n * k, rereads)
