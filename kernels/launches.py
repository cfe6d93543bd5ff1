"""The launches of one step, listed for a model's shape without a model: what to compile, and what a step moves.

Tensors are on torch's "meta" device: they have shapes and no memory. The lists are made by calling the launchers, so
that they ask for exactly what a real step asks for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels import attention, embedding, head_ranks, head_sample, layer_norm, linear, logits, sampling, tiles
from kernels.cost import Cost
from kernels.weights import INT4_GROUP, ROW_ALIGN, Weights


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a GPT-2 family model."""

    vocab_size: int
    context_length: int
    width: int
    heads: int
    layers: int
    hidden: int
    activation: str = "gelu_tanh"


MODELS = {
    "gpt2": ModelShape(50257, 1024, 768, 12, 12, 3072),
    "gpt2-medium": ModelShape(50257, 1024, 1024, 16, 24, 4096),
    "gpt2-large": ModelShape(50257, 1024, 1280, 20, 36, 5120),
    "gpt2-xl": ModelShape(50257, 1024, 1600, 25, 48, 6400),
}
BLOCK_SIZE = 16  # tokens of a cache block


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a step, and how many times the step makes it (once a layer, or once)."""

    name: str
    times: int
    run: Callable[[], None]
    cost: Cost


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A meta tensor."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _integers(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.int32)


def meta_weights(n: int, k: int, dtype: torch.dtype, kind: str = "float") -> Weights:
    """Packed weights [n, k] without memory."""
    if kind == "int8":
        return Weights(empty(n, tiles.cdiv(k, ROW_ALIGN) * ROW_ALIGN, dtype=torch.int8), (n, k), kind, empty(n))
    if kind == "int4":
        padded = tiles.cdiv(k, 256) * 256
        scales = empty(n, padded // INT4_GROUP, dtype=torch.float16)
        return Weights(empty(n, padded // 2, dtype=torch.uint8), (n, k), kind, scales, INT4_GROUP)
    return Weights(empty(n, tiles.cdiv(k, ROW_ALIGN) * ROW_ALIGN, dtype=dtype), (n, k))


def _linears(shape: ModelShape, rows: int, dtype: torch.dtype, kind: str) -> list[Launch]:
    """The four linears of a layer."""
    d, hidden, size = shape.width, shape.hidden, dtype.itemsize
    workspace = linear.Workspace(empty(16), _integers(16), _integers(16))
    stream, stats = empty(rows, d), empty(rows)
    norm = linear.Norm(empty(d, dtype=dtype), empty(d, dtype=dtype), stats, stats)
    residual = linear.Residual(stream, stats, stats, 1e-5)
    cache_shape = (4096, shape.heads, BLOCK_SIZE, d // shape.heads)
    k, v, slots = empty(*cache_shape, dtype=dtype), empty(*cache_shape, dtype=dtype), empty(rows, dtype=torch.int64)
    cache = linear.KVCache(k, v, slots)
    act, act_hidden = empty(rows, d, dtype=dtype), empty(rows, hidden, dtype=dtype)

    def launch(
        name: str, x: torch.Tensor, n: int, width: int, y: torch.Tensor, epilogue: str, **options: object
    ) -> Launch:
        weights, bias = meta_weights(n, width, dtype, kind), empty(n, dtype=dtype)
        cost = linear.cost(rows, weights, dtype, size, "norm" in options, epilogue, size)
        return Launch(
            name,
            shape.layers,
            lambda: linear.linear(x, weights, bias, y, workspace, dtype=dtype, **options),  # type: ignore[arg-type]
            cost,
        )

    return [
        launch("qkv", stream, 3 * d, d, act, "qkv", norm=norm, cache=cache),
        launch("proj", act, d, d, stream, "residual", residual=residual),
        launch("fc", stream, hidden, d, act_hidden, "none", norm=norm, activation=shape.activation),
        launch("fc2", act_hidden, d, hidden, stream, "residual", residual=residual),
    ]


def _attention(shape: ModelShape, spans: Sequence[tuple[int, int]], dtype: torch.dtype) -> Launch:
    head_dim = shape.width // shape.heads
    choice = tiles.attention_tiles(head_dim, dtype.itemsize, max(count for _, count in spans))
    paging = attention.Paging(shape.heads, head_dim, BLOCK_SIZE, tiles.split_kv(shape.heads, shape.context_length))
    starts = np.cumsum([0, *(count for _, count in spans)]).astype(np.int32)
    positions = np.concatenate([np.arange(first, first + count) for first, count in spans]).astype(np.int32)
    listed = attention.query_tiles(starts, positions, choice.block_q)
    rows, longest = len(positions), max(first + count for first, count in spans)
    cache_shape = (4096, shape.heads, BLOCK_SIZE, head_dim)
    k, v, q, out = (
        empty(*size, dtype=dtype) for size in (cache_shape, cache_shape, (rows, shape.width), (rows, shape.width))
    )
    tables, partials, counters = _integers(len(spans), 64), empty(16), _integers(16)
    tile_list = _integers(len(listed), 4)
    return Launch(
        "attention",
        shape.layers,
        lambda: attention.attention(
            q, k, v, tables, tile_list, out, partials, counters, paging, 0.125, choice, longest
        ),
        attention.cost(listed.tolist(), paging, dtype.itemsize, choice),
    )


def options(rows: int, vocab_size: int, edits: bool = False, masked: bool = False) -> sampling.Options:
    """Sampling options without memory."""
    sparse = sampling.SparseRows(_integers(rows + 1), _integers(16), empty(16)) if edits else None
    allowed = _integers(rows, tiles.cdiv(vocab_size, 32)) if masked else None
    f, i = empty(rows), _integers(rows)
    return sampling.Options(f, i, f, f, empty(rows, dtype=torch.int64), i, i, f, f, f, sparse, sparse, allowed)


def _sampling(shape: ModelShape, rows: int, edits: bool = False, masked: bool = False) -> Launch:
    i, f = _integers(rows), empty(rows)
    drawn = sampling.Drawn(i, f, i, i, _integers(rows, 1), empty(rows, 1))
    y = empty(rows, tiles.cdiv(shape.vocab_size, 16) * 16)[:, : shape.vocab_size]
    chosen = options(rows, shape.vocab_size, edits, masked)
    return Launch(
        "sampling",
        1,
        lambda: sampling.sampling(y, chosen, drawn, empty(rows, shape.vocab_size)),
        sampling.cost(rows, shape.vocab_size, 1, rows),
    )


def _head_sample(
    shape: ModelShape, rows: int, dtype: torch.dtype, kind: str, edits: bool = False, top: int = 0
) -> list[Launch]:
    """The fused head and draw, and the ranks that may follow it."""
    d = shape.width
    w, stats, i = meta_weights(shape.vocab_size, d, dtype, kind), empty(rows), _integers(rows)
    norm = linear.Norm(empty(d, dtype=dtype), empty(d, dtype=dtype), stats, stats)
    drawn = sampling.Drawn(i, stats, i, i, _integers(rows, top), empty(rows, top))
    floats, ids, counters = head_sample.HeadScratch.needed(rows, shape.vocab_size, top)
    scratch = head_sample.HeadScratch(empty(floats), _integers(ids), _integers(counters))
    chosen, x = options(rows, shape.vocab_size, edits), empty(rows, d)
    return [
        Launch(
            "head_sample",
            1,
            lambda: head_sample.head_sample(x, w, norm, i, chosen, drawn, scratch, dtype),
            head_sample.cost(rows, w, dtype.itemsize),
        ),
        Launch(
            "head_ranks",
            1,
            lambda: head_ranks.head_ranks(x, w, norm, i, drawn, scratch, dtype),
            head_ranks.cost(rows, w, dtype.itemsize, top, 0),
        ),
    ]


def step_launches(
    shape: ModelShape, spans: Sequence[tuple[int, int]], dtype: torch.dtype, kind: str = "float"
) -> list[Launch]:
    """The launches of a step that runs ``spans``, a sequence each, and draws for each.

    Args:
        spans: (first position, number of tokens) of each sequence.
        dtype: the storage type of activations and cache, and of weights where ``kind`` is "float".
    """
    rows, draws, d, size = sum(count for _, count in spans), len(spans), shape.width, dtype.itemsize
    i, stats = _integers(rows), empty(rows)
    tok, pos = meta_weights(shape.vocab_size, d, dtype).data, empty(shape.context_length, d, dtype=dtype)
    stream, head = empty(rows, d), meta_weights(shape.vocab_size, d, dtype, kind)
    norm = linear.Norm(empty(d, dtype=dtype), empty(d, dtype=dtype), stats, stats)
    y = empty(draws, tiles.cdiv(shape.vocab_size, 16) * 16)[:, : shape.vocab_size]
    row_ids = _integers(draws)
    qkv, proj, fc, fc2 = _linears(shape, rows, dtype, kind)
    return [
        Launch(
            "embedding",
            1,
            lambda: embedding.embedding(i, i, i, i, tok, pos, stream, stats, stats, 1e-5),
            embedding.cost(rows, d, size, rows, rows),
        ),
        qkv,
        _attention(shape, spans, dtype),
        proj,
        fc,
        fc2,
        Launch(
            "logits",
            1,
            lambda: logits.logits(stream, head, norm, row_ids, y, dtype),
            logits.cost(draws, head, size),
        ),
        _sampling(shape, draws),
    ]


def all_launches(shape: ModelShape, dtype: torch.dtype, kind: str = "float") -> list[Launch]:
    """A launch of every specialisation that decoding 1 to 256 sequences and prefilling any prompt asks for."""
    found: list[Launch] = []
    for batch in (1, 32, 64, 256):
        found += step_launches(shape, [(100, 1)] * batch, dtype, kind)
        found += _head_sample(shape, batch, dtype, kind)
        found += _head_sample(shape, batch, dtype, kind, edits=True, top=1)[:1]
    found += step_launches(shape, [(0, 512)], dtype, kind)
    found += [_sampling(shape, 1, edits, masked) for edits in (False, True) for masked in (False, True)]
    x, w = empty(8, shape.width, dtype=dtype), empty(shape.width, dtype=dtype)
    found.append(
        Launch(
            "layer_norm", 0, lambda: layer_norm.layer_norm(x, w, w, x, 1e-5), layer_norm.cost(8, shape.width, 2, False)
        )
    )
    return found


def step_bytes(launches: Sequence[Launch]) -> int:
    """Unique bytes that a step's launches read and write, each launch as often as it is made."""
    return sum(launch.times * launch.cost.total_bytes for launch in launches)
