"""The launches of one step, listed for a model's shape without a model: what to compile, and what a step moves.

Tensors are on torch's "meta" device, where they have shapes and no memory, unless another one is asked for, on which
the launches can be run: their bytes are counted so. The lists are made by calling the launchers, so that they ask for
exactly what a real step asks for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

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
HEAD_DIMS = (20, 80, 96, 128, 256)  # that models of the family have, besides the 64 of all of GPT-2's
BLOCK_SIZE = 16  # tokens of a cache block
CACHE_BLOCKS = 4096  # of a layer's cache
TILE_EDGES = (1, 4, 5, 16, 17, 32, 33, 64, 65, 256)  # rows at which a launcher's choice of tiles may change
MOST_ROWS_DEPENDENT = 4  # of a step whose kernels may start early: on an H200 one row gained by it, eight lost


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a step on so many rows, and how many times the step makes it (once a layer, or once).

    ``streamed`` are the weights and the KV cache that it reads, ``scratch`` is what its programs hand to each other.
    """

    name: str
    times: int
    rows: int
    run: Callable[[], None]
    cost: Cost
    streamed: tuple[torch.Tensor, ...] = ()
    scratch: tuple[torch.Tensor, ...] = ()


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor on the device of the list; zero where it has memory."""
    return torch.zeros(shape, dtype=dtype)


def _integers(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.int32)


def _aligned(count: int) -> int:
    """Elements of a row so that the next one starts where the compiler likes it."""
    return tiles.cdiv(count, 16) * 16


def _different(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Different integers, from 0 on."""
    return torch.arange(int(np.prod(shape)), dtype=dtype).view(shape)


def _cache(shape: ModelShape, dtype: torch.dtype, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one layer, in one tensor as those of all layers are."""
    return empty(2, blocks, shape.heads, BLOCK_SIZE, shape.width // shape.heads, dtype=dtype).unbind()  # type: ignore[return-value]


def meta_weights(n: int, k: int, dtype: torch.dtype, kind: str = "float") -> Weights:
    """Packed weights [n, k] without memory."""
    if kind == "int8":
        return Weights(empty(n, tiles.cdiv(k, ROW_ALIGN) * ROW_ALIGN, dtype=torch.int8), (n, k), kind, empty(n))
    if kind == "int4":
        padded = tiles.cdiv(k, 256) * 256
        scales = empty(n, padded // INT4_GROUP, dtype=torch.float16)
        return Weights(empty(n, padded // 2, dtype=torch.uint8), (n, k), kind, scales, INT4_GROUP)
    return Weights(empty(n, tiles.cdiv(k, ROW_ALIGN) * ROW_ALIGN, dtype=dtype), (n, k))


def _linears(
    shape: ModelShape, rows: int, dtype: torch.dtype, kind: str, blocks: int = CACHE_BLOCKS, dependent: bool = False
) -> list[Launch]:
    """The four linears of a layer."""
    d, hidden, size = shape.width, shape.hidden, dtype.itemsize
    (x0, x1), normed = empty(2, rows, d), empty(rows, d, dtype=dtype)
    residual = linear.Residual(x0, *empty(2, d, dtype=dtype), normed, 1e-5)
    cache = linear.KVCache(*_cache(shape, dtype, blocks), _different(rows, dtype=torch.int64))
    act, act_hidden = empty(rows, d, dtype=dtype), empty(rows, hidden, dtype=dtype)

    def launch(
        name: str, x: torch.Tensor, n: int, width: int, y: torch.Tensor, epilogue: str, **options: object
    ) -> Launch:
        weights, bias = meta_weights(n, width, dtype, kind), empty(n, dtype=dtype)
        partials, tile_counters, row_counters = linear.Workspace.needed(rows, n, width, size, epilogue == "residual")
        workspace = linear.Workspace(empty(partials), _integers(tile_counters), _integers(row_counters))
        cost = linear.cost(rows, weights, size, epilogue)
        return Launch(
            name,
            shape.layers,
            rows,
            lambda: linear.linear(x, weights, bias, y, workspace, dependent=dependent, **options),  # type: ignore[arg-type]
            cost,
            (weights.data,),
            (workspace.partials, workspace.tile_counters, workspace.row_counters),
        )

    return [
        launch("qkv", normed, 3 * d, d, act, "qkv", cache=cache),
        launch("proj", act, d, d, x1, "residual", residual=residual),
        launch("fc", normed, hidden, d, act_hidden, "none", activation=shape.activation),
        launch("fc2", act_hidden, d, hidden, x1, "residual", residual=residual),
    ]


def _attention(
    shape: ModelShape,
    spans: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    blocks: int = CACHE_BLOCKS,
    dependent: bool = False,
) -> Launch:
    head_dim = shape.width // shape.heads
    choice = tiles.attention_tiles(head_dim, dtype.itemsize, max(count for _, count in spans))
    paging = attention.Paging(shape.heads, head_dim, BLOCK_SIZE, tiles.split_kv(shape.heads, shape.context_length))
    starts = np.cumsum([0, *(count for _, count in spans)]).astype(np.int32)
    positions = np.concatenate([np.arange(first, first + count) for first, count in spans]).astype(np.int32)
    listed = attention.query_tiles(starts, positions, choice.block_q)
    rows, longest = len(positions), max(first + count for first, count in spans)
    (k, v), (q, out) = _cache(shape, dtype, blocks), empty(2, rows, shape.width, dtype=dtype)
    partials, counters = attention.scratch_sizes(rows, len(listed), paging, choice, longest)
    floats, zeros = empty(partials), _integers(counters)
    tables = _different(len(spans), tiles.cdiv(shape.context_length, BLOCK_SIZE))
    tile_list = torch.tensor(listed)
    return Launch(
        "attention",
        shape.layers,
        rows,
        lambda: attention.attention(
            q, k, v, tables, tile_list, out, floats, zeros, paging, 0.125, choice, longest, dependent
        ),
        attention.cost(listed.tolist(), paging, dtype.itemsize, choice),
        (k, v),
        (floats, zeros),
    )


def options(rows: int, vocab_size: int, edits: bool = False, masked: bool = False) -> sampling.Options:
    """Sampling options of greedy rows, with lists of ids or a mask that name none."""
    sparse = sampling.SparseRows(_integers(rows + 1), _integers(16), empty(16)) if edits else None
    allowed = _integers(rows, tiles.cdiv(vocab_size, 32)) if masked else None
    f, i = empty(rows), _integers(rows)
    seeds = empty(rows, dtype=torch.int64)
    return sampling.Options(f, i, f, f, seeds, i, i, f, f, f, sparse, sparse, allowed)


def _drawn(rows: int, top: int) -> sampling.Drawn:
    """What a draw writes, without its values."""
    tokens, ranks, status = empty(3, _aligned(rows), dtype=torch.int32)[:, :rows]
    return sampling.Drawn(tokens, empty(rows), ranks, status, _integers(rows, top), empty(rows, top))


def _sampling(shape: ModelShape, rows: int, *edits: bool) -> Launch:
    drawn = _drawn(rows, 1)
    y = empty(rows, _aligned(shape.vocab_size))[:, : shape.vocab_size]
    chosen, scratch = options(rows, shape.vocab_size, *edits), empty(rows, shape.vocab_size)
    return Launch(
        "sampling",
        1,
        rows,
        lambda: sampling.sampling(y, chosen, drawn, scratch),
        sampling.cost(rows, shape.vocab_size, 1, 0),
    )


def _head_sample(
    shape: ModelShape,
    rows: int,
    dtype: torch.dtype,
    kind: str,
    edits: bool = False,
    top: int = 0,
    dependent: bool = False,
) -> list[Launch]:
    """The fused head and draw, and the ranks that may follow it."""
    d = shape.width
    w, row_ids, drawn = meta_weights(shape.vocab_size, d, dtype, kind), _different(rows), _drawn(rows, top)
    floats, ids, counters = head_sample.HeadScratch.needed(rows, shape.vocab_size, top)
    scratch = head_sample.HeadScratch(empty(floats), _integers(ids), _integers(counters))
    chosen, x = options(rows, shape.vocab_size, edits), empty(rows, d, dtype=dtype)
    return [
        Launch(
            "head_sample",
            1,
            rows,
            lambda: head_sample.head_sample(x, w, row_ids, chosen, drawn, scratch, dependent=dependent),
            head_sample.cost(rows, w, dtype.itemsize),
            (w.data,),
            (scratch.floats, scratch.ids, scratch.counters),
        ),
        Launch(
            "head_ranks",
            1,
            rows,
            lambda: head_ranks.head_ranks(x, w, row_ids, drawn, scratch),
            head_ranks.cost(rows, w, dtype.itemsize, top, 0),
            (w.data,),
        ),
    ]


def step_launches(
    shape: ModelShape,
    spans: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    kind: str = "float",
    device: str = "meta",
    fused: bool = False,
) -> list[Launch]:
    """The launches of a step that runs ``spans``, a sequence each, and draws for each.

    Args:
        spans: (first position, number of tokens) of each sequence.
        dtype: the storage type of activations and cache, and of weights where ``kind`` is "float".
        device: where the tensors are. Weights and cache are zero; tokens, positions and blocks are different ones.
        fused: with "head_sample" in place of "logits" and "sampling", as where no row has top-k, top-p or min-p.
    """
    with torch.device(device):
        launches = _step_launches(shape, spans, dtype, kind)
        return launches[:-2] + _head_sample(shape, len(spans), dtype, kind)[:1] if fused else launches


def _step_launches(
    shape: ModelShape, spans: Sequence[tuple[int, int]], dtype: torch.dtype, kind: str, dependent: bool = False
) -> list[Launch]:
    rows, draws, d, size = sum(count for _, count in spans), len(spans), shape.width, dtype.itemsize
    ids, positions = _different(rows), _different(rows) % shape.context_length
    fresh = torch.full((rows,), -1, dtype=torch.int32)
    tok, pos = meta_weights(shape.vocab_size, d, dtype).data, empty(shape.context_length, d, dtype=dtype)
    stream, normed, head = empty(rows, d), empty(rows, d, dtype=dtype), meta_weights(shape.vocab_size, d, dtype, kind)
    norm = empty(2, d, dtype=dtype)
    y = empty(draws, _aligned(shape.vocab_size))[:, : shape.vocab_size]
    row_ids = _different(draws)
    qkv, proj, fc, fc2 = _linears(shape, rows, dtype, kind, dependent=dependent)
    return [
        Launch(
            "embedding",
            1,
            rows,
            lambda: embedding.embedding(ids, fresh, ids, positions, tok, pos, stream, *norm, normed, 1e-5, dependent),
            embedding.cost(rows, d, size, rows, min(rows, shape.context_length)),
        ),
        qkv,
        _attention(shape, spans, dtype, dependent=dependent),
        proj,
        fc,
        fc2,
        Launch(
            "logits",
            1,
            draws,
            lambda: logits.logits(normed, head, row_ids, y, dependent),
            logits.cost(draws, head, size),
            (head.data,),
        ),
        _sampling(shape, draws),
    ]


def all_launches(shape: ModelShape, dtype: torch.dtype, kind: str = "float", dependent: bool = False) -> list[Launch]:
    """A launch of every specialisation that decoding 1 to 256 sequences and prefilling any prompt asks for.

    With ``dependent``, those too that a step of up to ``MOST_ROWS_DEPENDENT`` rows asks for where kernels start early.
    """
    with torch.device("meta"):
        found: list[Launch] = []
        few = [(batch, True) for batch in TILE_EDGES if dependent and batch <= MOST_ROWS_DEPENDENT]
        for batch, early in [*((batch, False) for batch in TILE_EDGES), *few]:
            found += _step_launches(shape, [(100, 1)] * batch, dtype, kind, early)
            found += _head_sample(shape, batch, dtype, kind, dependent=early)
            found += _head_sample(shape, batch, dtype, kind, edits=True, top=1, dependent=early)[:1]
        for length in (17, 257, 512):
            found += _step_launches(shape, [(0, length)], dtype, kind)
        found += [_sampling(shape, 1, *edits) for edits in product((False, True), repeat=2)]
        blocks = _large_cache(shape, dtype)
        for rows in TILE_EDGES:
            found += _linears(shape, rows, dtype, kind, blocks)[:1]
        found += [_attention(shape, [(100, count)], dtype, blocks) for count in (1, 17)]
        x, w = empty(8, shape.width, dtype=dtype), empty(shape.width, dtype=dtype)
        cost = layer_norm.cost(8, shape.width, dtype.itemsize, False)
        found.append(Launch("layer_norm", 0, 8, lambda: layer_norm.layer_norm(x, w, w, x, 1e-5), cost))
    return found


def head_launches(dtype: torch.dtype) -> list[Launch]:
    """Attention with heads of ``HEAD_DIMS``, as a decode step and a prompt ask for it."""
    found = []
    with torch.device("meta"):
        for head_dim in HEAD_DIMS:
            shape = ModelShape(50257, 1024, 12 * head_dim, 12, 12, 48 * head_dim)
            for count, blocks in product((1, 17), (CACHE_BLOCKS, _large_cache(shape, dtype))):
                found.append(_attention(shape, [(100, count)], dtype, blocks))
    return found


def _large_cache(shape: ModelShape, dtype: torch.dtype) -> int:
    """Blocks of more than 2 GiB: compiled for AMD a pointer into them is another type, and a cache on a GPU is that."""
    return 2**31 // (BLOCK_SIZE * shape.width * dtype.itemsize) + 1


def step_bytes(launches: Sequence[Launch]) -> int:
    """Unique bytes that a step's launches read and write, each launch as often as it is made."""
    return sum(launch.times * launch.cost.total_bytes for launch in launches)
