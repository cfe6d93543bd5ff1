"""One step of the model as launches of ``kernels/``: packed weights, paged cache, buffers, and the order of launches.

Importing this module imports Triton, which fixes for the whole process whether kernels are compiled or interpreted:
``triton_backend.py`` settles that first. A step is one upload, an embedding, five launches a layer, the head, and the
sampling; or, where a graph was captured of those, the upload and the graph. Nothing in it waits for the device.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from engine.backends.base import Batch
from engine.backends.triton_buffers import Buffers, DrawnLayout, Layout, Slot, Slots, aligned
from engine.backends.triton_graphs import (
    ROW_IDS,
    Captured,
    Graphs,
    capture,
    padded_layout,
    padded_length,
    padded_rows,
    write_padded,
)
from engine.backends.triton_head import Head, device_options, sampling_arrays
from engine.backends.triton_weights import PackedModel
from engine.config import ModelConfig
from kernels import attention, embedding, head_ranks, head_sample, linear, logits, sampling, tiles
from kernels.launches import MOST_ROWS_DEPENDENT

DRAWN_WORDS = 1 << 16  # int32 words at one address for what a step draws; a step that needs more gets its own


@dataclass(frozen=True, slots=True)
class Program:
    """All that the launches of a step depend on besides what its buffers hold."""

    layout: Layout
    choice: tiles.AttentionTiles
    longest: int
    head: Head
    dependent: bool  # kernels start while the one before ends


@dataclass(frozen=True, slots=True)
class StepTensors:
    """What a step leaves on the device: drawn rows (the first of a padded, packed buffer), and logits asked for."""

    slot: Slot
    num_drawn: int
    drawn: DrawnLayout | None
    packed: torch.Tensor | None
    logits: torch.Tensor | None


class TritonStep:
    """Runs steps of one model on one device.

    Args:
        model: the architecture.
        packed: its weights.
        dtype: the storage type of weights, cache and activations.
        block_size: tokens in a block of the cache.
        graphs: whether decode steps are captured and replayed.
        dependent: whether in steps of few rows kernels start while the one before ends (``kernels/dependent.py``).
    """

    def __init__(
        self,
        model: ModelConfig,
        packed: PackedModel,
        dtype: torch.dtype,
        block_size: int,
        graphs: bool = True,
        dependent: bool = False,
    ) -> None:
        self.packed = packed
        self.slots = Slots(packed.pos_emb.device)
        self.graphs = Graphs() if graphs else None
        self.num_drawn = 0  # by the step before: what ``previous_rows`` may point to
        self._model = model
        self._dtype = dtype
        self._dependent = dependent
        self._device = packed.pos_emb.device
        self._buffers = Buffers(self._device)
        split = tiles.split_kv(model.n_heads, model.context_length)
        self._paging = attention.Paging(model.n_heads, model.head_dim, block_size, split)
        self._drawn = self._drawn_before = torch.zeros(DRAWN_WORDS, dtype=torch.int32, device=self._device)
        self.cache = torch.empty(0)

    def allocate(self, num_blocks: int) -> None:
        """A cache [n_layers, 2, num_blocks, n_heads, block_size, head_dim]; the old one goes first."""
        model, paging = self._model, self._paging
        self._forget_graphs()
        self.cache = torch.empty(0)
        shape = (model.n_layers, 2, num_blocks, model.n_heads, paging.block_size, model.head_dim)
        self.cache = torch.empty(shape, dtype=self._dtype, device=self._device)

    def set_weights(self, packed: PackedModel) -> None:
        """Take other weights of the same shapes."""
        self._forget_graphs()
        self.packed = packed

    def _forget_graphs(self) -> None:
        if self.graphs is not None:
            self.graphs.clear()

    def run(self, batch: Batch) -> StepTensors:
        """Queue one step."""
        rows = self._graph_rows(batch)
        return self._run_eagerly(batch) if rows is None else self._run_decode(batch, rows)

    def _run_eagerly(self, batch: Batch) -> StepTensors:
        """Queue a step's launches one by one."""
        most_queries = int(np.diff(batch.query_starts).max())
        choice = tiles.attention_tiles(self._model.head_dim, self._dtype.itemsize, most_queries)
        arrays = self._arrays(batch)
        arrays["query_tiles"] = attention.query_tiles(batch.query_starts, batch.positions, choice.block_q)
        arrays["row_ids"] = np.concatenate([batch.draw_rows, batch.logits_rows]).astype(np.int32)
        layout, head = Layout.of(arrays), Head.of(batch, self._model.vocab_size)
        inputs, slot = self._buffers.get("inputs", (layout.size,), torch.uint8), self.slots.take()
        for name, place in slot.arrays(layout).items():
            place[...] = arrays[name]
        slot.upload(layout, inputs)
        program = Program(layout, choice, int(batch.context_lens.max()), head, self._starts_early(len(batch.token_ids)))
        logits, packed = self._launch_first(program, inputs, None)
        return self._left(slot, head, len(batch.draw_rows), packed, logits)

    def _run_decode(self, batch: Batch, rows: int) -> StepTensors:
        """Queue a step as a graph of ``rows`` rows, which is captured where there is none."""
        assert self.graphs is not None
        arrays, model = self._arrays(batch), self._model
        arrays["query_tiles"] = attention.query_tiles_of_decode(batch.positions)
        longest = padded_length(int(batch.context_lens.max()), self._paging.split, model.context_length)
        head = Head.of(batch, model.vocab_size)
        head = replace(head, draws=rows if head.draws else 0, asked=rows if head.asked else 0)
        key = rows, longest, head, tuple(arrays)
        captured, slot = self.graphs.get(key), self.slots.take()
        if captured is not None:
            layout, inputs = captured.layout, captured.inputs
        else:
            layout = padded_layout(arrays, rows, tiles.cdiv(longest, self._paging.block_size))
            inputs = self._buffers.get("inputs", (layout.size,), torch.uint8)
        write_padded(arrays, slot.arrays(layout))
        slot.upload(layout, inputs)
        if captured is not None:
            captured.graph.replay()
            logits, packed = captured.logits, self._drawn
        else:
            choice = tiles.attention_tiles(model.head_dim, self._dtype.itemsize, 1)
            program = Program(layout, choice, longest, head, self._starts_early(rows))
            logits, packed = self._launch_first(program, inputs, key)
        if logits is not None and head.asked:
            logits = logits[: len(batch.logits_rows)].clone()  # the caller keeps them; the next step writes there again
        return self._left(slot, head, len(batch.draw_rows), packed, logits)

    def _starts_early(self, rows: int) -> bool:
        """Whether the kernels of a step of so many rows start while the one before ends."""
        return self._dependent and rows <= MOST_ROWS_DEPENDENT

    def _left(
        self, slot: Slot, head: Head, draws: int, packed: torch.Tensor, logits: torch.Tensor | None
    ) -> StepTensors:
        """What a step leaves: of ``head.draws`` rows the first ``draws`` are real."""
        asked = None if logits is None or not head.asked else logits[head.draws :]
        if not head.draws:
            return StepTensors(slot, 0, None, None, asked)
        self._drawn_before, self.num_drawn = packed, draws
        drawn = DrawnLayout(head.draws, head.top)
        return StepTensors(slot, draws, drawn, packed[: drawn.size], asked)

    def _arrays(self, batch: Batch) -> dict[str, npt.NDArray[np.generic]]:
        """What a step uploads, but for query tiles and row ids."""
        arrays: dict[str, npt.NDArray[np.generic]] = {
            "token_ids": batch.token_ids,
            "positions": batch.positions,
            "slots": batch.slots,
            "block_tables": batch.block_tables,
            "previous_rows": np.full_like(batch.token_ids, -1) if batch.previous_rows is None else batch.previous_rows,
        }
        if batch.block_copies is not None:
            arrays["block_copies"] = batch.block_copies.astype(np.int64)
        if batch.sampling is not None:
            arrays |= sampling_arrays(batch.sampling)
        return arrays

    def _graph_rows(self, batch: Batch) -> int | None:
        """Rows of the graph that serves this step: of a token a sequence, all drawn from or all asked for, no lists
        of ids. None where no graph does."""
        rows, options = len(batch.token_ids), batch.sampling
        drawn, asked = len(batch.draw_rows), len(batch.logits_rows)
        if (
            self.graphs is None
            or rows > len(ROW_IDS)
            or len(batch.query_starts) != rows + 1
            or (drawn, asked) not in ((rows, 0), (0, rows))
            or batch.block_copies is not None
            or (options is not None and (options.output_counts is not None or options.logit_bias is not None))
            or (batch.previous_rows is not None and self._drawn_before is not self._drawn)
            or not ((batch.draw_rows if drawn else batch.logits_rows) == ROW_IDS[:rows]).all()
        ):
            return None
        return padded_rows(rows)

    def _launch_first(
        self, program: Program, packed: torch.Tensor, key: Hashable
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Queue the launches one by one, and capture them where there is a key: (logits if any, packed drawn rows)."""
        inputs, head = program.layout.views(packed), program.head
        if "block_copies" in inputs:
            source, destination = inputs["block_copies"].unbind(1)
            self.cache[:, :, destination] = self.cache[:, :, source]
        logits = self._room_for_logits(head, key is not None)
        size = DrawnLayout(head.draws, head.top).size
        drawn = self._drawn
        if size > len(drawn):
            drawn = torch.empty(size, dtype=torch.int32, device=self._device)
        before = self._drawn_before

        def launch() -> None:
            self._outputs(self._layers(inputs, program, before), inputs, program, logits, drawn)

        if key is not None and self.graphs is not None:
            before = self._drawn  # where a graph finds them; the step before left none that count elsewhere
            launch()
            graph = capture(self._device, launch)
            kept = (*self._buffers.tensors(), self._drawn)
            self.graphs.put(key, Captured(graph, program.layout, packed, logits, kept))
        else:
            launch()
        return logits, drawn

    def _room_for_logits(self, head: Head, decode: bool) -> torch.Tensor | None:
        """Where logits go [draws + asked, vocab_size]: to memory of their own where the caller keeps them."""
        if head.fused or head.draws + head.asked == 0:
            return None
        vocab_size = self._model.vocab_size
        shape = (head.draws + head.asked, aligned(vocab_size))
        if head.asked and not decode:
            return torch.empty(shape, dtype=torch.float32, device=self._device)[:, :vocab_size]
        return self._buffers.get("logits", shape, torch.float32)[:, :vocab_size]

    def _layers(self, inputs: Mapping[str, torch.Tensor], program: Program, before: torch.Tensor) -> torch.Tensor:
        """Embedding, blocks and final norm: the normalised rows [T, width].

        ``before`` has the tokens that the step before drew. Nothing but kernels runs, on buffers and ``inputs``.
        """
        model, dtype, get = self._model, self._dtype, self._buffers.get
        choice, longest = program.choice, program.longest
        rows, width = len(inputs["token_ids"]), model.embed_dim
        x0, x1 = get("x0", (rows, width), torch.float32), get("x1", (rows, width), torch.float32)
        normed = get("normed", (rows, width), dtype)  # a linear reads it before the next one with a residual writes it
        q, attended = get("q", (rows, width), dtype), get("attended", (rows, width), dtype)
        hidden = get("hidden", (rows, model.hidden_dim), dtype)
        workspace = self._workspace(rows)
        partials, counters = attention.scratch_sizes(rows, len(inputs["query_tiles"]), self._paging, choice, longest)
        attention_partials = get("attention_partials", (partials,), torch.float32)
        attention_counters = get("attention_counters", (counters,), torch.int32)
        tok, eps, blocks = self.packed.tok_emb, model.norm_eps, self.packed.blocks
        embedding.embedding(
            inputs["token_ids"], inputs["previous_rows"], before, inputs["positions"], tok.data,
            self.packed.pos_emb, x0, *blocks[0].norm1, normed, eps, program.dependent,
        )  # fmt: skip
        following = [block.norm1 for block in blocks[1:]] + [self.packed.final_norm]
        for layer, (block, next_norm) in enumerate(zip(blocks, following, strict=True)):
            k, v = self.cache[layer]
            cache = linear.KVCache(k, v, inputs["slots"])
            run = partial(linear.linear, workspace=workspace, dependent=program.dependent)
            run(normed, *block.qkv, q, cache=cache)
            attention.attention(
                q, k, v, inputs["block_tables"], inputs["query_tiles"], attended, attention_partials,
                attention_counters, self._paging, model.attn_scales[layer], choice, longest, program.dependent,
            )  # fmt: skip
            run(attended, *block.proj, x1, residual=linear.Residual(x0, *block.norm2, normed, eps))
            run(normed, *block.fc, hidden, activation=model.activation)
            run(hidden, *block.fc2, x0, residual=linear.Residual(x1, *next_norm, normed, eps))
        return normed

    def _workspace(self, rows: int) -> "linear.Workspace":
        size, width, hidden = self._dtype.itemsize, self._model.embed_dim, self._model.hidden_dim
        shapes = ((3 * width, width, False), (width, width, True), (hidden, width, False), (width, hidden, True))
        needed = [linear.Workspace.needed(rows, out, inner, size, residual) for out, inner, residual in shapes]
        partials, tile_counters, row_counters = (max(column) for column in zip(*needed, strict=True))
        get = self._buffers.get
        return linear.Workspace(
            get("partials", (partials,), torch.float32),
            get("tile_counters", (tile_counters,), torch.int32),
            get("row_counters", (row_counters,), torch.int32),
        )

    def _outputs(
        self,
        x: torch.Tensor,
        inputs: Mapping[str, torch.Tensor],
        program: Program,
        y: torch.Tensor | None,
        packed: torch.Tensor,
    ) -> None:
        """Head on normalised rows x, and draws: logits ``y`` of the drawn rows first, then of the rows asked for."""
        head = program.head
        if head.draws + head.asked == 0:
            return
        layout = DrawnLayout(head.draws, head.top)
        drawn = sampling.Drawn(**layout.split(packed[: layout.size]))
        if head.fused:
            self._draw_fused(x, inputs, program, drawn)
            return
        assert y is not None
        logits.logits(x, self.packed.head, inputs["row_ids"], y, program.dependent)
        if head.draws:
            options = device_options(inputs)
            edited = options.output_counts is not None or options.logit_bias is not None
            shape = (head.draws, self._model.vocab_size)
            scratch = self._buffers.get("scratch", shape, torch.float32) if edited else y
            sampling.sampling(y[: head.draws], options, drawn, scratch)

    def _draw_fused(
        self, x: torch.Tensor, inputs: Mapping[str, torch.Tensor], program: Program, drawn: "sampling.Drawn"
    ) -> None:
        """Draw without logits in memory; a second launch counts ranks and collects the top N where they are read."""
        head, get = program.head, self._buffers.get
        floats, ids, counters = head_sample.HeadScratch.needed(head.draws, self._model.vocab_size, head.top)
        scratch = head_sample.HeadScratch(
            get("head_floats", (floats,), torch.float32),
            get("head_ids", (ids,), torch.int32),
            get("head_counters", (counters,), torch.int32),
        )
        matrix, row_ids, options = self.packed.head, inputs["row_ids"], device_options(inputs)
        head_sample.head_sample(x, matrix, row_ids, options, drawn, scratch, head.ranks, program.dependent)
        if head.ranks:
            head_ranks.head_ranks(x, matrix, row_ids, drawn, scratch)
