"""Dependent launch (sm_90 and later): a kernel starts while the one before it in the stream still runs.

Launched with ``launch_pdl``, a kernel may start as soon as every program of the one before has called
``let_next_start`` or ended. What was written before it is there only after ``wait_for_previous``, which returns when
the kernel before has ended; that one waited for its own, so all earlier ones have ended too. Hence the rules:

- every program waits, also one that has nothing to do: the chain would break at it;
- before the wait nothing is read that a step writes, counters included, and nothing is written;
- what may be done before it is to fetch weights, which no kernel writes.

All three functions are nothing where PDL is false: under the interpreter, on AMD GPUs and before sm_90.
"""

import triton
import triton.language as tl


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Let the next kernel start, as far as there is room for it."""
    if PDL:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the kernel before has ended, and what it wrote is visible."""
    if PDL:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def prefetch_weights(
    w_ptr,  # [N, *], as kernels/weights.py packs them
    outs,  # [BLOCK_N] int64
    first_k,
    w_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Have the lines of up to 4 steps of BLOCK_K weights fetched into the L2 cache, without waiting for them."""
    if PDL:
        PER_ELEMENT: tl.constexpr = 2 if WEIGHTS == "int4" else 1
        SIZE: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth // 8
        LINES: tl.constexpr = (4 * BLOCK_K // PER_ELEMENT * SIZE + 127) // 128
        first = first_k // PER_ELEMENT
        end = tl.minimum(first_k + STEPS * BLOCK_K, K) - 1
        columns = tl.minimum(first + tl.arange(0, LINES) * (128 // SIZE), end // PER_ELEMENT)
        pointers = w_ptr + tl.minimum(outs, N - 1)[:, None] * w_stride + columns[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip
