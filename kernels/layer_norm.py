"""LayerNorm (Ba et al. 2016): y = (x - mean) / sqrt(var + eps) * weight + bias, with an optional residual add.

With a residual, s = x + residual is written in float32 and normalised. Statistics are in float32, in two passes.
One program does STAT_ROWS rows. Bytes: x (and residual) read once, y (and s) written once; the statistics' and the
last pass read the rows again from the cache.
"""

import torch
import triton
import triton.language as tl

from kernels.common import normalise_rows, unroll
from kernels.cost import Cost
from kernels.tiles import STAT_CHUNK, STAT_ROWS, cdiv, launch_options


@triton.jit
def _layer_norm_tile(
    pid,
    x_ptr,  # [T, WIDTH]
    residual_ptr,  # [T, WIDTH]
    weight_ptr,  # [WIDTH]
    bias_ptr,  # [WIDTH]
    y_ptr,  # [T, WIDTH]
    sum_ptr,  # [T, WIDTH] float32
    num_rows,
    x_stride,
    residual_stride,
    y_stride,
    sum_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    rows = pid * ROWS + tl.arange(0, ROWS).to(tl.int64)
    row_mask = rows < num_rows
    if HAS_RESIDUAL:
        for start in tl.range(0, WIDTH, CHUNK, loop_unroll_factor=unroll(WIDTH, CHUNK)):
            columns = start + tl.arange(0, CHUNK)
            mask = row_mask[:, None] & (columns < WIDTH)[None, :]
            x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0)
            residual = tl.load(residual_ptr + rows[:, None] * residual_stride + columns[None, :], mask=mask, other=0.0)
            s = x.to(tl.float32) + residual.to(tl.float32)
            tl.store(sum_ptr + rows[:, None] * sum_stride + columns[None, :], s, mask=mask)
        tl.debug_barrier()  # what follows reads what other threads wrote
        x_ptr = sum_ptr
        x_stride = sum_stride
    normalise_rows(x_ptr, rows, row_mask, weight_ptr, bias_ptr, y_ptr, x_stride, y_stride, eps, WIDTH, ROWS, CHUNK)


@triton.jit(do_not_specialize=["num_rows"])
def _layer_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    sum_ptr,
    num_rows,
    x_stride,
    residual_stride,
    y_stride,
    sum_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    _layer_norm_tile(
        tl.program_id(0),
        x_ptr,
        residual_ptr,
        weight_ptr,
        bias_ptr,
        y_ptr,
        sum_ptr,
        num_rows,
        x_stride,
        residual_stride,
        y_stride,
        sum_stride,
        eps,
        HAS_RESIDUAL,
        WIDTH,
        ROWS,
        CHUNK,
    )


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    y: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
) -> None:
    """Write y [T, D], any float type; with a ``residual`` also ``total`` = x + residual, [T, D] float32.

    Raises:
        ValueError: one of ``residual`` and ``total`` without the other, or D above 8192.
    """
    num_rows, width = x.shape
    if (residual is None) != (total is None):
        raise ValueError("layer_norm takes residual and total together, or neither")
    if width > 8192:
        raise ValueError(f"layer_norm takes rows of up to 8192 columns, got {width}")
    _layer_norm_kernel[(cdiv(num_rows, STAT_ROWS),)](
        x,
        x if residual is None else residual,
        weight,
        bias,
        y,
        x if total is None else total,
        num_rows,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        y.stride(0),
        0 if total is None else total.stride(0),
        eps,
        HAS_RESIDUAL=residual is not None,
        WIDTH=width,
        ROWS=STAT_ROWS,
        CHUNK=STAT_CHUNK,
        **launch_options(num_warps=8),  # with 4, sm_80 spills
    )


def cost(num_rows: int, width: int, element_size: int, has_residual: bool) -> Cost:
    """Bytes of one launch; x, residual, weight, bias and y are stored in ``element_size`` bytes."""
    row = num_rows * width
    passes = {"the row, for statistics and output": row * (3 * 4 if has_residual else 2 * element_size)}
    return Cost(
        weights=2 * width * element_size,
        reads=row * element_size * (2 if has_residual else 1),
        writes=row * element_size + (row * 4 if has_residual else 0),
        flops=0,
        rereads=passes | {"weight and bias": 2 * width * element_size * (cdiv(num_rows, STAT_ROWS) - 1)},
    )
