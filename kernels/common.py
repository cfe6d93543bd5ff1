"""Jit functions that several operators share: sums in a fixed order, row statistics, activations, "the last to arrive".

A float ``tl.sum`` adds in an order that follows from the layout the compiler picks. Here every sum is either an
explicit tree (``tree_sum``) or elementwise, so that it is the same for any tile, number of warps and GPU.
"""

import triton
import triton.language as tl


@triton.jit
def tree_sum(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum of x [ROWS, COLUMNS] over its columns, neighbours first: [ROWS]. COLUMNS is a power of two."""
    for level in tl.static_range(1, 14):
        if (COLUMNS >> level) > 0:
            left, right = tl.split(tl.reshape(x, [ROWS, COLUMNS >> level, 2]))
            x = left + right  # [ROWS, COLUMNS >> level]
    return tl.reshape(x, [ROWS])


@triton.jit
def row_statistics(
    x_ptr,  # [T, WIDTH] float32
    rows,  # [ROWS] int64
    row_mask,  # [ROWS]
    stride,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Mean and 1/sqrt(variance + eps) of each row, in two passes: (mean [ROWS], rstd [ROWS])."""
    columns = tl.arange(0, CHUNK)
    pointers = x_ptr + rows[:, None] * stride + columns[None, :]
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    for start in tl.static_range(0, WIDTH, CHUNK):
        mask = row_mask[:, None] & (start + columns < WIDTH)[None, :]
        total += tl.load(pointers + start, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    mean = tree_sum(total, ROWS, CHUNK) / WIDTH
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    for start in tl.static_range(0, WIDTH, CHUNK):
        mask = row_mask[:, None] & (start + columns < WIDTH)[None, :]
        x = tl.load(pointers + start, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
        centred = tl.where(mask, x - mean[:, None], 0.0)
        total += centred * centred
    variance = tree_sum(total, ROWS, CHUNK) / WIDTH
    return mean, tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def normalise(x, mean, rstd, weight, bias):
    """LayerNorm of float32 values whose row statistics are known; the arguments broadcast."""
    return (x - mean) * rstd * weight + bias


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
