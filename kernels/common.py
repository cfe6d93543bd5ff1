"""Jit functions that several operators share: sums in a fixed order, LayerNorm, activations, "the last to arrive".

A float ``tl.sum`` adds in an order that follows from the layout the compiler picks. Here every sum is either an
explicit tree (``tree_sum``) or elementwise, so that it is the same for any tile, number of warps and GPU.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda


@triton.jit
def product(a, b, acc):
    """acc + a b in float32.

    On NVIDIA GPUs, which have no tensor cores for float32, such operands are each the sum of two of 11 bits, and three
    of the four products are made (CUTLASS's 3xTF32): closer to the exact sum than PyTorch's float32 (RESULTS.md).
    """
    if is_cuda():
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def tree_sum(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum of x [ROWS, COLUMNS] over its columns, neighbours first: [ROWS]. COLUMNS is a power of two."""
    for level in tl.static_range(1, 14):
        if (COLUMNS >> level) > 0:
            left, right = tl.split(tl.reshape(x, [ROWS, COLUMNS >> level, 2]))
            x = left + right  # [ROWS, COLUMNS >> level]
    return tl.reshape(x, [ROWS])


@triton.constexpr_function
def unroll(width, chunk):
    """How many steps of a walk over a row are unrolled: all of a narrow one, few of a wide one, which would spill."""
    return (width + chunk - 1) // chunk if width <= 8 * chunk else 4


@triton.jit
def normalise_rows(
    x_ptr,  # [T, WIDTH]
    rows,  # [ROWS] int64
    row_mask,  # [ROWS]
    weight_ptr,  # [WIDTH]
    bias_ptr,  # [WIDTH]
    y_ptr,  # [T, WIDTH]
    x_stride,
    y_stride,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """LayerNorm of ROWS rows, in three passes over them: the mean, then the variance, then y in y's type."""
    columns = tl.arange(0, CHUNK)
    pointers = x_ptr + rows[:, None] * x_stride + columns[None, :]
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    for start in tl.range(0, WIDTH, CHUNK, loop_unroll_factor=unroll(WIDTH, CHUNK)):
        mask = row_mask[:, None] & (start + columns < WIDTH)[None, :]
        total += tl.load(pointers + start, mask=mask, other=0.0).to(tl.float32)
    mean = tree_sum(total, ROWS, CHUNK) / WIDTH
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    for start in tl.range(0, WIDTH, CHUNK, loop_unroll_factor=unroll(WIDTH, CHUNK)):
        mask = row_mask[:, None] & (start + columns < WIDTH)[None, :]
        x = tl.load(pointers + start, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, x - mean[:, None], 0.0)
        total += centred * centred
    variance = tree_sum(total, ROWS, CHUNK) / WIDTH
    apply_norm(
        x_ptr, rows, row_mask, mean, variance, weight_ptr, bias_ptr, y_ptr, x_stride, y_stride, eps, WIDTH, CHUNK
    )


@triton.jit
def apply_norm(
    x_ptr,  # [T, WIDTH]
    rows,  # [ROWS] int64
    row_mask,  # [ROWS]
    mean,  # [ROWS]
    variance,  # [ROWS]
    weight_ptr,  # [WIDTH]
    bias_ptr,  # [WIDTH]
    y_ptr,  # [T, WIDTH]
    x_stride,
    y_stride,
    eps,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The last pass of a LayerNorm whose rows' mean and variance are known: y in y's type.

    A chunk is loaded before the one before it is stored: the compiler moves no load over a store.
    """
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    columns = tl.arange(0, CHUNK)
    x_ptr += rows[:, None] * x_stride
    y_ptr += rows[:, None] * y_stride
    x = tl.load(x_ptr + columns[None, :], mask=row_mask[:, None] & (columns < WIDTH)[None, :], other=0.0)
    weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0)
    bias = tl.load(bias_ptr + columns, mask=columns < WIDTH, other=0.0)
    for start in range(0, WIDTH, CHUNK):  # not unrolled: sm_80 would spill
        y = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
        y = y * weight.to(tl.float32)[None, :] + bias.to(tl.float32)[None, :]
        following = start + CHUNK + columns
        following_mask = following < WIDTH
        x = tl.load(x_ptr + following[None, :], mask=row_mask[:, None] & following_mask[None, :], other=0.0)
        weight = tl.load(weight_ptr + following, mask=following_mask, other=0.0)
        bias = tl.load(bias_ptr + following, mask=following_mask, other=0.0)
        mask = row_mask[:, None] & (start + columns < WIDTH)[None, :]
        tl.store(y_ptr + (start + columns)[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The feed-forward's non-linearity on float32 values. GELU: Hendrycks and Gimpel 2016, exact and tanh form.

    tanh is written as a sigmoid: 0.5 * (1 + tanh(z)) = sigmoid(2 z).
    """
    if ACTIVATION == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
    return x


@triton.jit
def arrive(counter_ptr, expected):
    """Count this program in at ``counter_ptr``; true for the last of ``expected``, which also resets the counter.

    What every program stored before is visible to the last one after: the barrier orders the program's own threads,
    the atomic the programs.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == expected - 1
    if last:
        tl.store(counter_ptr, 0)
    return last
