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
    ks = first_k + tl.arange(0, BLOCK_K)
    out_mask = outs < N
    k_mask = ks < K
    if WEIGHTS == "int4":
        pairs = first_k // 2 + tl.arange(0, BLOCK_K // 2)
        mask = out_mask[:, None] & (pairs < (K + 1) // 2)[None, :]
        packed = tl.load(w_ptr + outs[:, None] * w_stride + pairs[None, :], mask=mask, other=0x88)
        low = (packed & 15).to(tl.float32) - 8.0
        high = (packed >> 4).to(tl.float32) - 8.0
        w = tl.reshape(tl.join(low, high), [BLOCK_N, BLOCK_K])
        scale = tl.load(
            scale_ptr + outs[:, None] * scale_stride + ks[None, :] // GROUP,
            mask=out_mask[:, None] & k_mask[None, :],
            other=0.0,
        )
        w = w * scale.to(tl.float32)
    else:
        mask = out_mask[:, None] & k_mask[None, :]
        w = tl.load(w_ptr + outs[:, None] * w_stride + ks[None, :], mask=mask, other=0)
    return w.to(DTYPE)
