"""The head, on the rows that need a token or whose logits are asked for: y = x[rows] W^T.

One program does one [VOCAB_TILE, BLOCK_T] tile, weights as the M side of the tensor core, and walks the whole of K:
the vocabulary makes enough programs without K splits. x is what the last layer's projection left normalised. Bytes: W
once (again for every BLOCK_T rows, from L2), the rows once per vocabulary tile (from L2), the logits once, in float32.
"""

import torch
import triton
import triton.language as tl

from kernels.cost import Cost
from kernels.dependent import let_next_start, prefetch_weights, wait_for_previous
from kernels.linear import TRITON_TYPES, split_product
from kernels.tiles import VOCAB_TILE, cdiv, launch_options, logits_tiles
from kernels.weights import Weights


@triton.jit
def logits_of_tile(
    x_ptr,  # [T, K] in the storage type
    w_ptr,  # [N, K], or its quantised form
    scale_ptr,
    row_ids_ptr,  # [R] int32
    rows,  # [BLOCK_T]
    row_mask,  # [BLOCK_T]
    outs,  # [BLOCK_N] int64
    x_stride,
    w_stride,
    scale_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The logits of one tile: [BLOCK_N, BLOCK_T] float32."""
    x_rows = tl.load(row_ids_ptr + rows, mask=row_mask, other=0).to(tl.int64)
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    y = split_product(
        x_ptr, w_ptr, scale_ptr, x_rows, row_mask, outs, 0, x_stride, w_stride, scale_stride, N, K, STEPS, WEIGHTS,
        GROUP, DTYPE, BLOCK_N, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    if WEIGHTS == "int8":
        y *= tl.load(scale_ptr + outs, mask=outs < N, other=0.0)[:, None]
    return y


@triton.jit
def _logits_tile(
    pid, x_ptr, w_ptr, scale_ptr, row_ids_ptr,
    y_ptr,  # [R, N] float32
    num_rows, x_stride, w_stride, scale_stride, y_stride,
    N: tl.constexpr, K: tl.constexpr, WEIGHTS: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    row_blocks = tl.cdiv(num_rows, BLOCK_T)
    outs = (pid // row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    rows = (pid % row_blocks) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    row_mask = rows < num_rows
    prefetch_weights(w_ptr, outs, 0, w_stride, N, K, WEIGHTS, BLOCK_K, (K + BLOCK_K - 1) // BLOCK_K, PDL)
    wait_for_previous(PDL)
    y = logits_of_tile(
        x_ptr, w_ptr, scale_ptr, row_ids_ptr, rows, row_mask, outs, x_stride, w_stride, scale_stride, N, K, WEIGHTS,
        GROUP, DTYPE, BLOCK_N, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    mask = (outs < N)[:, None] & row_mask[None, :]
    tl.store(y_ptr + rows[None, :] * y_stride + outs[:, None], y, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _logits_kernel(
    x_ptr, w_ptr, scale_ptr, row_ids_ptr, y_ptr, num_rows, x_stride, w_stride, scale_stride, y_stride,
    N: tl.constexpr, K: tl.constexpr, WEIGHTS: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _logits_tile(
        tl.program_id(0), x_ptr, w_ptr, scale_ptr, row_ids_ptr, y_ptr, num_rows, x_stride, w_stride, scale_stride,
        y_stride, N, K, WEIGHTS, GROUP, DTYPE, BLOCK_N, BLOCK_T, BLOCK_K, PDL,
    )  # fmt: skip


def logits(
    x: torch.Tensor,
    weights: Weights,
    row_ids: torch.Tensor,
    y: torch.Tensor,
    dependent: bool = False,
) -> None:
    """Write y [R, V] float32, the logits of the rows ``row_ids`` [R] int32 of x [T, D].

    Args:
        x: normalised rows in the storage type, in which the product's operands are; columns contiguous.
        weights: the head, [V, D].
        dependent: launched as ``kernels/dependent.py`` says.
    """
    num_rows, (n, k) = row_ids.shape[0], weights.shape
    tiles = logits_tiles(num_rows, k, x.element_size(), weights.kind)
    scales = x if weights.scales is None else weights.scales
    _logits_kernel[(cdiv(n, VOCAB_TILE) * cdiv(num_rows, tiles.block_t),)](
        x, weights.data, scales, row_ids, y, num_rows, x.stride(0),
        weights.data.stride(0), 0 if weights.scales is None else scales.stride(0), y.stride(0),
        N=n, K=k, WEIGHTS=weights.kind, GROUP=weights.group, DTYPE=TRITON_TYPES[x.dtype],
        BLOCK_N=VOCAB_TILE, BLOCK_T=tiles.block_t, BLOCK_K=tiles.block_k, PDL=dependent,
        **launch_options(tiles.num_warps, tiles.num_stages, dependent),
    )  # fmt: skip


def cost(num_rows: int, weights: Weights, element_size: int) -> Cost:
    """Bytes of one launch on ``num_rows`` different rows."""
    n, k = weights.shape
    x_bytes = num_rows * (k * element_size + 4)
    out_blocks, row_blocks = cdiv(n, VOCAB_TILE), cdiv(num_rows, logits_tiles(num_rows, k, element_size).block_t)
    return Cost(
        weights=weights.nbytes,
        reads=x_bytes,
        writes=num_rows * n * 4,
        flops=2 * num_rows * n * k,
        rereads={"weights": weights.nbytes * (row_blocks - 1), "x": x_bytes * (out_blocks - 1)},
    )
