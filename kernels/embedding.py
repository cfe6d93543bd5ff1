"""Token and position embedding: x[t] = tok[id[t]] + pos[position[t]], and the first LayerNorm of those rows.

The id of row t is ``token_ids[t]``, or, where ``previous_rows[t] >= 0``, ``drawn_ids[previous_rows[t]]``: the token
that the step before drew, which the host need not know yet.

One program does STAT_ROWS rows: it gathers, adds in float32, writes the residual stream, and normalises the rows.
Bytes: the rows gathered, the residual written once and read three times again from the cache, the normalised rows.
"""

import torch
import triton
import triton.language as tl

from kernels.common import normalise_rows, unroll
from kernels.cost import Cost
from kernels.dependent import let_next_start, wait_for_previous
from kernels.tiles import STAT_CHUNK, STAT_ROWS, cdiv, launch_options


@triton.jit
def _embedding_tile(
    pid,
    token_ids_ptr,  # [T] int32
    previous_rows_ptr,  # [T] int32
    drawn_ids_ptr,  # [*] int32
    positions_ptr,  # [T] int32
    tok_ptr,  # [V, WIDTH]
    pos_ptr,  # [C, WIDTH]
    x_ptr,  # [T, WIDTH] float32
    weight_ptr,  # [WIDTH]
    bias_ptr,  # [WIDTH]
    normed_ptr,  # [T, WIDTH]
    num_rows,
    tok_stride,
    pos_stride,
    x_stride,
    normed_stride,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait_for_previous(PDL)
    rows = pid * ROWS + tl.arange(0, ROWS).to(tl.int64)
    row_mask = rows < num_rows
    previous = tl.load(previous_rows_ptr + rows, mask=row_mask, other=-1)
    drawn = tl.load(drawn_ids_ptr + previous, mask=row_mask & (previous >= 0), other=0)
    given = tl.load(token_ids_ptr + rows, mask=row_mask, other=0)
    ids = tl.where(previous >= 0, drawn, given).to(tl.int64)
    positions = tl.load(positions_ptr + rows, mask=row_mask, other=0).to(tl.int64)
    for start in tl.range(0, WIDTH, CHUNK, loop_unroll_factor=unroll(WIDTH, CHUNK)):
        columns = start + tl.arange(0, CHUNK)
        mask = row_mask[:, None] & (columns < WIDTH)[None, :]
        tok = tl.load(tok_ptr + ids[:, None] * tok_stride + columns[None, :], mask=mask, other=0.0)
        pos = tl.load(pos_ptr + positions[:, None] * pos_stride + columns[None, :], mask=mask, other=0.0)
        x = tok.to(tl.float32) + pos.to(tl.float32)
        tl.store(x_ptr + rows[:, None] * x_stride + columns[None, :], x, mask=mask)
    tl.debug_barrier()  # what follows reads what other threads wrote
    normalise_rows(
        x_ptr, rows, row_mask, weight_ptr, bias_ptr, normed_ptr, x_stride, normed_stride, eps, WIDTH, ROWS, CHUNK
    )


@triton.jit(do_not_specialize=["num_rows"])
def _embedding_kernel(
    token_ids_ptr, previous_rows_ptr, drawn_ids_ptr, positions_ptr, tok_ptr, pos_ptr, x_ptr, weight_ptr, bias_ptr,
    normed_ptr, num_rows, tok_stride, pos_stride, x_stride, normed_stride, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _embedding_tile(
        tl.program_id(0), token_ids_ptr, previous_rows_ptr, drawn_ids_ptr, positions_ptr, tok_ptr, pos_ptr, x_ptr,
        weight_ptr, bias_ptr, normed_ptr, num_rows, tok_stride, pos_stride, x_stride, normed_stride, eps, WIDTH, ROWS,
        CHUNK, PDL,
    )  # fmt: skip


def embedding(
    token_ids: torch.Tensor,
    previous_rows: torch.Tensor,
    drawn_ids: torch.Tensor,
    positions: torch.Tensor,
    tok: torch.Tensor,
    pos: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    normed: torch.Tensor,
    eps: float,
    dependent: bool = False,
) -> None:
    """Write x [T, D] float32 and its LayerNorm ``normed`` [T, D], any float type.

    Args:
        token_ids, previous_rows, positions: [T] int32; ``previous_rows[t] < 0`` means that ``token_ids[t]`` counts.
        drawn_ids: int32, what ``previous_rows`` points into.
        tok, pos: [V, D] and [C, D], any float type, columns contiguous.
        weight, bias: [D], of the LayerNorm.
        eps: added to the variance.
        dependent: launched as ``kernels/dependent.py`` says.
    """
    num_rows, width = x.shape
    _embedding_kernel[(cdiv(num_rows, STAT_ROWS),)](
        token_ids, previous_rows, drawn_ids, positions, tok, pos, x, weight, bias, normed,
        num_rows, tok.stride(0), pos.stride(0), x.stride(0), normed.stride(0), eps,
        WIDTH=width, ROWS=STAT_ROWS, CHUNK=STAT_CHUNK, PDL=dependent, **launch_options(4, dependent=dependent),
    )  # fmt: skip


def cost(num_rows: int, width: int, element_size: int, num_ids: int, num_positions: int) -> Cost:
    """``num_ids`` and ``num_positions`` are how many different ones the rows have; no row takes a drawn token.

    All but the residual stream is stored in ``element_size`` bytes.
    """
    return Cost(
        weights=(num_ids + num_positions + 2) * width * element_size,
        reads=num_rows * 12,
        writes=num_rows * width * (4 + element_size),
        flops=0,
        rereads={
            "tables": (2 * num_rows - num_ids - num_positions) * width * element_size,
            "residual, to normalise it": 3 * num_rows * width * 4,
            "norm weight and bias": 2 * width * element_size * (cdiv(num_rows, STAT_ROWS) - 1),
        },
    )
