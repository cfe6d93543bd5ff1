"""How a linear's weights are stored, and how a tile of them becomes the tensor core's operand in registers.

- "float": [N, K] in the storage type of the activations.
- "int8": [N, K] int8, one float32 scale per output, W = scale * q. The scale multiplies the finished sum.
- "int4": [N, K / 2] uint8, columns 2i and 2i + 1 in the low and high half of byte i, one float16 scale for each group
  of GROUP columns of an output, W = scale * (q - 8). Dequantised before the product.

Both quantised forms are weight-only (W8A16, W4A16): activations stay in the storage type.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

KINDS = ("float", "int8", "int4")
ROW_ALIGN = 64  # columns; rows of packed weights start at 16-byte boundaries in every kind
INT4_GROUP = 64


@dataclass(frozen=True, slots=True)
class Weights:
    """A packed [N, K] weight. ``shape`` is [N, K]; rows of ``data`` may be padded beyond K."""

    data: torch.Tensor
    shape: tuple[int, int]
    kind: str = "float"
    scales: torch.Tensor | None = None  # [N] float32 for int8, [N, groups] float16 for int4
    group: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of a pass over all weights, padding not counted."""
        n, k = self.shape
        if self.kind == "int8":
            return n * k + n * 4
        if self.kind == "int4":
            return n * ((k + 1) // 2) + n * -(-k // self.group) * 2
        return n * k * self.data.element_size()


def _padded(values: torch.Tensor, columns: int) -> torch.Tensor:
    """``values`` [N, K] with zeros up to a multiple of ``columns``, contiguous."""
    extra = -values.shape[1] % columns
    return torch.nn.functional.pad(values, (0, extra)).contiguous()


def pack(weight: torch.Tensor, dtype: torch.dtype, kind: str = "float", group: int = INT4_GROUP) -> Weights:
    """Pack a [N, K] weight of any float type. ``dtype`` is the storage type where ``kind`` is "float".

    int8: symmetric, scale = max |row| / 127. int4: symmetric around 8, scale = max |group| / 7.

    Raises:
        ValueError: an unknown kind, or a group that is not 32, 64 or 128.
    """
    n, k = weight.shape
    if kind == "float":
        return Weights(_padded(weight.to(dtype), ROW_ALIGN), (n, k))
    wide = weight.float()
    if kind == "int8":
        scales = wide.abs().amax(dim=1).clamp(min=1e-12) / 127
        return Weights(_padded((wide / scales[:, None]).round().to(torch.int8), ROW_ALIGN), (n, k), kind, scales)
    if kind != "int4":
        raise ValueError(f"weights have no kind {kind!r}; choose from {', '.join(KINDS)}")
    if group not in (32, 64, 128):
        raise ValueError(f"int4 weights take groups of 32, 64 or 128 columns, got {group}")
    grouped = _padded(wide, 2 * 128).unflatten(1, (-1, group))  # [N, groups, group]
    scales = (grouped.abs().amax(dim=2).clamp(min=1e-7) / 7).to(torch.float16)
    quantised = (grouped / scales.float()[:, :, None]).round().clamp(-7, 7).to(torch.int16) + 8
    pairs = quantised.flatten(1).to(torch.uint8).unflatten(1, (-1, 2))  # [N, K / 2, 2]
    return Weights((pairs[:, :, 0] | pairs[:, :, 1] << 4).contiguous(), (n, k), kind, scales.contiguous(), group)


def unpack(weights: Weights) -> torch.Tensor:
    """The [N, K] float32 values that the kernels multiply with."""
    n, k = weights.shape
    if weights.kind == "float":
        return weights.data[:, :k].float()
    assert weights.scales is not None
    if weights.kind == "int8":
        return weights.data[:, :k].float() * weights.scales[:, None]
    halves = torch.stack([weights.data & 15, weights.data >> 4], dim=2).flatten(1).float() - 8
    scales = weights.scales.float().repeat_interleave(weights.group, dim=1)
    return (halves * scales)[:, :k].reshape(n, k)


@triton.jit
def weight_tile(
    w_ptr,
    scale_ptr,
    outs,  # [BLOCK_N] int64
    first_k,  # a multiple of BLOCK_K
    w_stride,
    scale_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights [BLOCK_N, BLOCK_K] as DTYPE; int8 without its scale, which the finished sum takes."""
    out_mask = outs < N
    # Words of 32 bits make copies to shared memory that are 128 bits wide, and a tile needs few registers. int8 is left
    # as it is from sm_90 on: there words took up to a third longer.
    PER_WORD: tl.constexpr = 8 if WEIGHTS == "int4" else 4
    if WEIGHTS == "int4" or (WEIGHTS == "int8" and not cuda_capability_geq(9)):
        words = first_k // PER_WORD + tl.arange(0, BLOCK_K // PER_WORD)
        mask = out_mask[:, None] & (words < (K + PER_WORD - 1) // PER_WORD)[None, :]
        words_ptr = w_ptr.to(tl.pointer_type(tl.int32))
        word = tl.load(words_ptr + outs[:, None] * (w_stride // 4) + words[None, :], mask=mask, other=0)
    else:
        ks = first_k + tl.arange(0, BLOCK_K)
        mask = out_mask[:, None] & (ks < K)[None, :]
        w = tl.load(w_ptr + outs[:, None] * w_stride + ks[None, :], mask=mask, other=0)
    if WEIGHTS == "int8" and not cuda_capability_geq(9):
        even = tl.join((word << 24) >> 24, (word << 8) >> 24)
        odd = tl.join((word << 16) >> 24, word >> 24)
        w = tl.reshape(tl.join(even, odd), [BLOCK_N, BLOCK_K])
    elif WEIGHTS == "int4":
        even = tl.join(tl.join(word, word >> 16), tl.join(word >> 8, word >> 24))
        odd = tl.join(tl.join(word >> 4, word >> 20), tl.join(word >> 12, word >> 28))
        q = (tl.reshape(tl.join(even, odd), [BLOCK_N, BLOCK_K]) & 15).to(tl.float32) - 8.0
        GROUPS: tl.constexpr = (BLOCK_K + GROUP - 1) // GROUP
        groups = first_k // GROUP + tl.arange(0, GROUPS)
        scale = tl.load(scale_ptr + outs[:, None] * scale_stride + groups[None, :], mask=out_mask[:, None], other=0.0)
        scale = tl.broadcast_to(scale.to(tl.float32)[:, :, None], [BLOCK_N, GROUPS, BLOCK_K // GROUPS])
        w = q * tl.reshape(scale, [BLOCK_N, BLOCK_K])
    return w.to(DTYPE)
