"""Tile sizes, in plain Python: what a launcher asks for is a function of the shapes, and can be listed without a GPU.

Two kinds of numbers live here. Those that decide the order of a sum (``BLOCK_K``, ``split_k``, ``split_kv``,
``BLOCK_KV``, ``STAT_CHUNK``, ``VOCAB_TILE``) depend on the model's shape only, so that a row's bits do not depend on
the batch. The others (rows of a tile, warps, stages) may follow the batch.
"""

from dataclasses import dataclass
from typing import Any

BLOCK_N = 64  # outputs of a linear tile: the M side of the tensor core, 64 so that sm_90 uses wgmma for any row count
MIN_ROWS = 16  # of a linear tile: with 8, Triton 3.7.1 falls back from wgmma to mma.sync on sm_90
BLOCK_K = 64  # depth that K splits are made of, and of one step of a linear
BLOCK_K_FLOAT32 = 32  # of one step in float32: with 64, sm_80 spills
BLOCK_KV = 64  # keys of one step of attention, where they are narrow
KEY_BYTES = 16384  # of one step, at most: two steps of keys and of values fit the shared memory of every target
MOST_ROWS_NORMALISED = {"float": 64, "int8": 32, "int4": 16}  # by one program of a linear; with more, sm_80 spills
STAT_ROWS = 8  # rows that a stand-alone LayerNorm, or the embedding, does at a time
STAT_CHUNK = 256  # columns that are added elementwise before the tree
VOCAB_TILE = 64  # vocabulary entries whose softmax mass is one tree; equals BLOCK_N, the tile of the head
TARGET_PROGRAMS = 132  # multiprocessors of an H100: a decode launch should have at least as many programs
MAX_SPLITS = 16  # splits of K, so that the last arriver's sum stays short
MIN_BLOCKS_PER_SPLIT = 2  # with one, Triton adds the sum of the splits inside the product, which rounds otherwise


@dataclass(frozen=True, slots=True)
class LinearTiles:
    """How one linear is cut. ``fused`` programs walk all K splits themselves, in the same order as the last arriver."""

    block_t: int
    block_k: int
    splits: int
    blocks_per_split: int
    fused: bool
    num_warps: int
    num_stages: int
    norm_rows: int  # that the last program of a row block normalises at a time


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def launch_options(num_warps: int, num_stages: int = 1, dependent: bool = False) -> dict[str, Any]:
    """Compiler options of a launch. No fused multiply-add: bits must not depend on what the compiler fuses.

    ``dependent`` launches may start while the kernel before them runs (``kernels/dependent.py``).
    """
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}
    return options | {"launch_pdl": True} if dependent else options


def split_k(out_features: int, in_features: int) -> tuple[int, int]:
    """How many K splits a linear has, and of how many ``BLOCK_K`` steps each: a function of the model's shape only."""
    out_blocks, k_blocks = cdiv(out_features, BLOCK_N), cdiv(in_features, BLOCK_K)
    per_split = max(MIN_BLOCKS_PER_SPLIT, out_blocks * k_blocks // TARGET_PROGRAMS, cdiv(k_blocks, MAX_SPLITS))
    splits = cdiv(k_blocks, per_split)
    return splits, cdiv(k_blocks, splits)


def linear_tiles(
    num_rows: int, out_features: int, in_features: int, element_size: int, residual: bool = False, kind: str = "float"
) -> LinearTiles:
    """Tiles of a linear [out_features, in_features] with weights of a ``kind``, on ``num_rows`` rows.

    With a ``residual`` one program normalises all rows of a tile: those have fewer rows. Where choices change was
    measured on an H200 (benchmarks/RESULTS.md); ``launches.TILE_EDGES`` and the backend's warm-up know the places.
    """
    splits, blocks_per_split = split_k(out_features, in_features)
    if residual:
        fused, most = num_rows > 64, 16 if num_rows <= 256 else MOST_ROWS_NORMALISED[kind]
    else:
        fused, most = num_rows > 16, 32 if num_rows <= 64 else 64
    fused = fused or splits == 1
    return _linear_tiles(num_rows, element_size, splits, blocks_per_split, fused, most, kind)


def logits_tiles(num_rows: int, in_features: int, element_size: int, kind: str = "float") -> LinearTiles:
    """Tiles of the head: no K splits, since the vocabulary alone makes enough programs."""
    return _linear_tiles(num_rows, element_size, 1, cdiv(in_features, BLOCK_K), True, 64, kind)


def _linear_tiles(
    num_rows: int, element_size: int, splits: int, blocks: int, fused: bool, most: int, kind: str
) -> LinearTiles:
    block_t, norm_rows = min(max(MIN_ROWS, next_power_of_2(num_rows)), most), 4 if num_rows <= 4 else MIN_ROWS
    if element_size == 4:
        block_k = BLOCK_K_FLOAT32
        num_warps = 8 if block_t == 64 else 4  # with 4, GPT-2 XL's spill
        return LinearTiles(block_t, block_k, splits, blocks * (BLOCK_K // block_k), fused, num_warps, 3, norm_rows)
    stages = {"int4": {32: 3, 64: 6}, "float": {64: 3}}.get(kind, {})  # int4: sm_80 spills with 4
    return LinearTiles(block_t, BLOCK_K, splits, blocks, fused, 4, stages.get(block_t, 4), norm_rows)


def split_kv(n_heads: int, context_length: int) -> int:
    """Positions of one KV split: a power of two of at least ``BLOCK_KV``, from the model's shape only."""
    wanted = n_heads * context_length // TARGET_PROGRAMS
    return min(max(BLOCK_KV, 1 << max(wanted, 1).bit_length() - 1), 512)


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """How attention is cut. ``fused`` programs walk all KV splits themselves."""

    block_q: int
    block_kv: int
    fused: bool
    num_warps: int
    num_stages: int


def attention_tiles(head_dim: int, element_size: int, most_queries: int) -> AttentionTiles:
    """Tiles of attention where no sequence brings more than ``most_queries`` tokens.

    Below 64 rows every NVIDIA target stays on ``mma.sync``; the warps are the fewest with which nothing spills.
    """
    many = most_queries > 16
    block_kv = min(BLOCK_KV, KEY_BYTES // (next_power_of_2(head_dim) * element_size))
    if element_size == 4:
        return AttentionTiles(16, block_kv, many, 8 if many or head_dim > 128 else 4, 2)
    if many:
        return AttentionTiles(32, block_kv, True, 8, 2)
    return AttentionTiles(16, block_kv, False, 2 if head_dim <= 128 else 8, 2)


def vocab_groups(vocab_size: int) -> int:
    """Vocabulary tiles that one step of a walk over the vocabulary takes: from the model's shape only."""
    return min(64, next_power_of_2(cdiv(vocab_size, VOCAB_TILE)))
