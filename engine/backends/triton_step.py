"""One step of the model as launches of ``kernels/``: packed weights, paged cache, buffers, and the order of launches.

Importing this module imports Triton, which fixes for the whole process whether kernels are compiled or interpreted:
``triton_backend.py`` settles that first. A step is one upload, an embedding, five launches a layer, the head, and the
sampling; nothing in it waits for the device.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engine.backends.base import Batch, SamplingBatch, Sparse
from engine.config import ModelConfig
from kernels import attention, embedding, head_sample, linear, logits, sampling, tiles, weights


@dataclass(frozen=True, slots=True)
class Block:
    """A transformer block's packed weights; norms are (weight, bias), linears (weights, bias)."""

    norm1: tuple[torch.Tensor, torch.Tensor]
    qkv: tuple[weights.Weights, torch.Tensor]
    proj: tuple[weights.Weights, torch.Tensor]
    norm2: tuple[torch.Tensor, torch.Tensor]
    fc: tuple[weights.Weights, torch.Tensor]
    fc2: tuple[weights.Weights, torch.Tensor]


@dataclass(frozen=True, slots=True)
class PackedModel:
    """All weights on the device, in the storage type."""

    tok_emb: weights.Weights
    pos_emb: torch.Tensor
    blocks: tuple[Block, ...]
    final_norm: tuple[torch.Tensor, torch.Tensor]
    head: weights.Weights


def pack_model(
    model: ModelConfig, canonical: Mapping[str, torch.Tensor], dtype: torch.dtype, device: torch.device
) -> PackedModel:
    """Copy canonical weights to the device in the kernels' layout; a tied head is the embedding's very tensor."""

    def vector(name: str) -> torch.Tensor:
        return canonical[name].detach().to(device, dtype, copy=True).contiguous()

    def matrix(name: str) -> weights.Weights:
        return weights.pack(canonical[name].detach().to(device), dtype)

    def norm(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return vector(f"{name}.weight"), vector(f"{name}.bias")

    def affine(name: str) -> tuple[weights.Weights, torch.Tensor]:
        return matrix(f"{name}.weight"), vector(f"{name}.bias")

    tok_emb = matrix("tok_emb")
    blocks = tuple(
        Block(
            norm(f"blocks.{i}.norm1"),
            affine(f"blocks.{i}.qkv"),
            affine(f"blocks.{i}.proj"),
            norm(f"blocks.{i}.norm2"),
            affine(f"blocks.{i}.fc"),
            affine(f"blocks.{i}.fc2"),
        )
        for i in range(model.n_layers)
    )
    head = tok_emb if model.tied_head else matrix("head")
    return PackedModel(tok_emb, vector("pos_emb"), blocks, norm("final_norm"), head)


def packed_bytes(model: PackedModel) -> int:
    """Bytes of all packed tensors, each counted once."""
    found = {}

    def visit(value: object) -> None:
        if isinstance(value, torch.Tensor):
            found[value.data_ptr()] = value.nbytes
        elif isinstance(value, weights.Weights):
            visit(value.data)
        elif isinstance(value, tuple):
            for part in value:
                visit(part)
        elif isinstance(value, PackedModel | Block):
            for name in value.__slots__:
                visit(getattr(value, name))

    visit(model)
    return sum(found.values())


def upload(arrays: Mapping[str, npt.NDArray[np.generic]], device: torch.device) -> dict[str, torch.Tensor]:
    """Copy arrays to the device in one transfer; unsigned integers arrive as the signed ones with the same bits."""
    types = {"i4": torch.int32, "u4": torch.int32, "i8": torch.int64, "u8": torch.int64, "f4": torch.float32}
    flat, places, size = [], {}, 0
    for name, array in arrays.items():
        places[name] = (size, array.nbytes, array.shape, types[array.dtype.str[1:]])
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        padding = -len(data) % 16
        flat += [data, np.zeros(padding, np.uint8)]
        size += len(data) + padding
    host = torch.from_numpy(np.concatenate(flat))
    if device.type == "cuda":
        host = host.pin_memory()
    on_device = host.to(device, non_blocking=True)
    return {
        name: on_device[start : start + nbytes].view(dtype).view(shape)
        for name, (start, nbytes, shape, dtype) in places.items()
    }


def _aligned(count: int) -> int:
    """Elements of a row so that the next one starts where the compiler likes it: its specialisations depend on that."""
    return tiles.cdiv(count, 16) * 16


class Buffers:
    """Scratch tensors by name, made once and made anew when a step needs a larger one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flat: dict[str, torch.Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of this shape and type. New ones are zero; what an old one holds is left."""
        count = int(np.prod(shape, dtype=np.int64))
        flat = self._flat.get(name)
        if flat is None or len(flat) < count:
            size = tiles.next_power_of_2(max(count, 16))
            flat = self._flat[name] = torch.zeros(size, dtype=dtype, device=self._device)
        return flat[:count].view(shape)


@dataclass(frozen=True, slots=True)
class StepTensors:
    """What a step leaves on the device: drawn rows (None without any), and logits asked for."""

    drawn: "sampling.Drawn | None"
    logits: torch.Tensor | None


class TritonStep:
    """Runs steps of one model on one device.

    Args:
        model: the architecture.
        packed: its weights.
        dtype: the storage type of weights, cache and activations.
        block_size: tokens in a block of the cache.
    """

    def __init__(self, model: ModelConfig, packed: PackedModel, dtype: torch.dtype, block_size: int) -> None:
        self.packed = packed
        self._model = model
        self._dtype = dtype
        self._device = packed.pos_emb.device
        self._buffers = Buffers(self._device)
        split = tiles.split_kv(model.n_heads, model.context_length)
        self._paging = attention.Paging(model.n_heads, model.head_dim, block_size, split)
        self._drawn_ids = torch.zeros(1, dtype=torch.int32, device=self._device)
        self.cache = torch.empty(0)

    def allocate(self, num_blocks: int) -> None:
        """A cache [n_layers, 2, num_blocks, n_heads, block_size, head_dim]; the old one goes first."""
        model, paging = self._model, self._paging
        self.cache = torch.empty(0)
        shape = (model.n_layers, 2, num_blocks, model.n_heads, paging.block_size, model.head_dim)
        self.cache = torch.empty(shape, dtype=self._dtype, device=self._device)

    def run(self, batch: Batch) -> StepTensors:
        """Queue one step."""
        most_queries = int(np.diff(batch.query_starts).max())
        choice = tiles.attention_tiles(self._model.head_dim, self._dtype.itemsize, most_queries)
        arrays: dict[str, npt.NDArray[np.generic]] = {
            "token_ids": batch.token_ids,
            "positions": batch.positions,
            "slots": batch.slots,
            "block_tables": batch.block_tables,
            "query_tiles": attention.query_tiles(batch.query_starts, batch.positions, choice.block_q),
            "row_ids": np.concatenate([batch.draw_rows, batch.logits_rows]).astype(np.int32),
            "previous_rows": np.full_like(batch.token_ids, -1) if batch.previous_rows is None else batch.previous_rows,
        }
        if batch.block_copies is not None:
            arrays["block_copies"] = batch.block_copies.astype(np.int64)
        if batch.sampling is not None:
            arrays |= _sampling_arrays(batch.sampling)
        inputs = upload(arrays, self._device)
        if batch.block_copies is not None:
            source, destination = inputs["block_copies"].unbind(1)
            self.cache[:, :, destination] = self.cache[:, :, source]
        final = self._layers(inputs, choice, int(batch.context_lens.max()))
        return self._outputs(final, inputs, batch)

    def _layers(
        self, inputs: Mapping[str, torch.Tensor], choice: "tiles.AttentionTiles", longest: int
    ) -> "linear.Norm":
        """Embedding and blocks. The residual stream is then in buffer "x0"; returns the final norm with statistics."""
        model, dtype, get = self._model, self._dtype, self._buffers.get
        rows, width = len(inputs["token_ids"]), model.embed_dim
        x0, x1 = get("x0", (rows, width), torch.float32), get("x1", (rows, width), torch.float32)
        stats0, stats1 = (get(name, (2, _aligned(rows)), torch.float32)[:, :rows] for name in ("stats0", "stats1"))
        q, attended = get("q", (rows, width), dtype), get("attended", (rows, width), dtype)
        hidden = get("hidden", (rows, model.hidden_dim), dtype)
        workspace = self._workspace(rows)
        partials, counters = attention.scratch_sizes(len(inputs["query_tiles"]), self._paging, choice, longest)
        attention_partials = get("attention_partials", (partials,), torch.float32)
        attention_counters = get("attention_counters", (counters,), torch.int32)
        tok, eps = self.packed.tok_emb, model.norm_eps
        embedding.embedding(
            inputs["token_ids"], inputs["previous_rows"], self._drawn_ids, inputs["positions"], tok.data,
            self.packed.pos_emb, x0, stats0[0], stats0[1], eps,
        )  # fmt: skip
        for layer, block in enumerate(self.packed.blocks):
            k, v = self.cache[layer]
            cache = linear.KVCache(k, v, inputs["slots"])
            norm1, norm2 = linear.Norm(*block.norm1, *stats0), linear.Norm(*block.norm2, *stats1)
            after_attention = linear.Residual(x0, stats1[0], stats1[1], eps)
            after_block = linear.Residual(x1, stats0[0], stats0[1], eps)
            linear.linear(x0, *block.qkv, q, workspace, dtype=dtype, norm=norm1, cache=cache)
            attention.attention(
                q, k, v, inputs["block_tables"], inputs["query_tiles"], attended, attention_partials,
                attention_counters, self._paging, model.attn_scales[layer], choice, longest,
            )  # fmt: skip
            linear.linear(attended, *block.proj, x1, workspace, dtype=dtype, residual=after_attention)
            linear.linear(x1, *block.fc, hidden, workspace, dtype=dtype, norm=norm2, activation=model.activation)
            linear.linear(hidden, *block.fc2, x0, workspace, dtype=dtype, residual=after_block)
        return linear.Norm(*self.packed.final_norm, *stats0)

    def _workspace(self, rows: int) -> "linear.Workspace":
        size, width, hidden = self._dtype.itemsize, self._model.embed_dim, self._model.hidden_dim
        shapes = ((3 * width, width), (width, width), (hidden, width), (width, hidden))
        needed = [linear.Workspace.needed(rows, out, inner, size) for out, inner in shapes]
        partials, tile_counters, row_counters = (max(column) for column in zip(*needed, strict=True))
        get = self._buffers.get
        return linear.Workspace(
            get("partials", (partials,), torch.float32),
            get("tile_counters", (tile_counters,), torch.int32),
            get("row_counters", (row_counters,), torch.int32),
        )

    def _outputs(self, final: "linear.Norm", inputs: Mapping[str, torch.Tensor], batch: Batch) -> StepTensors:
        """Head and sampling: logits of the drawn rows first, then of the rows asked for."""
        draws, asked, vocab_size = len(batch.draw_rows), len(batch.logits_rows), self._model.vocab_size
        if draws + asked == 0:
            return StepTensors(None, None)
        rows, width = len(inputs["token_ids"]), self._model.embed_dim
        x = self._buffers.get("x0", (rows, width), torch.float32)
        if batch.sampling is not None and not asked and _only_greedy(batch.sampling):
            drawn = self._new_drawn(draws, 0)
            head_sample.head_sample(
                x, self.packed.head, final, inputs["row_ids"], _options(inputs, batch.sampling), drawn,
                self._head_scratch(draws), self._dtype,
            )  # fmt: skip
            return StepTensors(drawn, None)
        shape = (draws + asked, _aligned(vocab_size))
        if asked:  # the caller keeps them
            y = torch.empty(shape, dtype=torch.float32, device=self._device)[:, :vocab_size]
        else:
            y = self._buffers.get("logits", shape, torch.float32)[:, :vocab_size]
        logits.logits(x, self.packed.head, final, inputs["row_ids"], y, self._dtype)
        if batch.sampling is None:
            return StepTensors(None, y)
        return StepTensors(self._draw(y[:draws], inputs, batch.sampling), y[draws:] if asked else None)

    def _draw(self, y: torch.Tensor, inputs: Mapping[str, torch.Tensor], batch: SamplingBatch) -> "sampling.Drawn":
        draws, vocab_size = y.shape
        drawn = self._new_drawn(draws, min(batch.num_logprobs, vocab_size))
        edited = batch.output_counts is not None or batch.logit_bias is not None
        scratch = self._buffers.get("scratch", (draws, vocab_size), torch.float32) if edited else y
        sampling.sampling(y, _options(inputs, batch), drawn, scratch)
        return drawn

    def _new_drawn(self, draws: int, top: int) -> "sampling.Drawn":
        """Where this step's drawn tokens go; the next step may take them from there."""

        def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=self._device)

        tokens, ranks, status = empty(torch.int32, 3, _aligned(draws))[:, :draws]
        logprobs, top_logprobs = empty(torch.float32, draws), empty(torch.float32, draws, top)
        self._drawn_ids = tokens
        return sampling.Drawn(tokens, logprobs, ranks, status, empty(torch.int32, draws, top), top_logprobs)

    def _head_scratch(self, draws: int) -> "head_sample.HeadScratch":
        count, get = draws * tiles.cdiv(self._model.vocab_size, tiles.VOCAB_TILE), self._buffers.get
        return head_sample.HeadScratch(
            get("head_floats", (4 * _aligned(count),), torch.float32),
            get("head_ids", (count,), torch.int32),
            get("head_counters", (draws,), torch.int32),
        )

    @property
    def num_drawn(self) -> int:
        """How many tokens the step before drew: what ``previous_rows`` may point to."""
        return len(self._drawn_ids)


def _only_greedy(batch: SamplingBatch) -> bool:
    """Whether every row takes its largest logit as it is, so that its rank is 1 and no logits are needed."""
    edits = (batch.output_counts, batch.logit_bias, batch.allowed)
    return not batch.temperature.any() and not batch.num_logprobs and all(edit is None for edit in edits)


def _sampling_arrays(batch: SamplingBatch) -> dict[str, npt.NDArray[np.generic]]:
    names = ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    arrays: dict[str, npt.NDArray[np.generic]] = {name: getattr(batch, name) for name in names}
    arrays |= {"seeds": batch.seeds, "draw_positions": batch.positions, "sample_index": batch.sample_index}
    for name, sparse in (("counts", batch.output_counts), ("bias", batch.logit_bias)):
        if sparse is not None:
            arrays |= {f"{name}.{part}": getattr(sparse, part) for part in Sparse.__slots__}
    if batch.allowed is not None:
        arrays["allowed"] = batch.allowed
    return arrays


def _options(inputs: Mapping[str, torch.Tensor], batch: SamplingBatch) -> "sampling.Options":
    def sparse(name: str, given: Sparse | None) -> "sampling.SparseRows | None":
        return None if given is None else sampling.SparseRows(*(inputs[f"{name}.{p}"] for p in Sparse.__slots__))

    return sampling.Options(
        inputs["temperature"], inputs["top_k"], inputs["top_p"], inputs["min_p"], inputs["seeds"],
        inputs["draw_positions"], inputs["sample_index"], inputs["presence_penalty"], inputs["frequency_penalty"],
        inputs["repetition_penalty"], sparse("counts", batch.output_counts), sparse("bias", batch.logit_bias),
        inputs.get("allowed"),
    )  # fmt: skip
