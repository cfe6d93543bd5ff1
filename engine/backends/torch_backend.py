"""The ``torch`` backend: the step in plain PyTorch, on anything PyTorch runs on. The contract's readable definition.

Linear layers run in the storage dtype; LayerNorm statistics, the softmax, the residual stream and the logits are in
float32 (in float64 for a float64 model). The bits of a row depend on the shapes that PyTorch's matrix products see, so
this backend is not batch invariant.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from engine.backends import torch_sampling
from engine.backends.base import Backend, Batch, Capacity, StepOutput
from engine.backends.checks import check_batch, check_choice, check_no_screen_head, check_no_strict_jit, free_memory
from engine.config import ModelConfig
from engine.messages import UndrawableRow
from engine.reference import ACTIVATIONS


@dataclass(frozen=True, slots=True)
class Norm:
    """LayerNorm's factors ``[D]``, in the dtype of the residual stream."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True, slots=True)
class Linear:
    """``weight`` [out, in] and ``bias`` [out], in the storage dtype."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Block:
    """The weights of a transformer block."""

    norm1: Norm
    qkv: Linear
    proj: Linear
    norm2: Norm
    fc: Linear
    fc2: Linear


@dataclass(frozen=True, slots=True)
class _Sequence:
    """Where one sequence of a batch is: its rows, its blocks in the cache, the length it has after this step."""

    rows: slice
    blocks: slice | torch.Tensor
    length: int


class TorchBackend(Backend):
    """See ``Backend``. ``threads`` sets PyTorch's thread count, which is one number for the whole process."""

    name: ClassVar[str] = "torch"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16", "float64")
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "mps")
    batch_invariant: ClassVar[bool] = False

    def __init__(
        self,
        model: ModelConfig,
        weights: Mapping[str, torch.Tensor],
        *,
        dtype: str,
        device: str,
        block_size: int,
        threads: int | None = None,
        memory_fraction: float = 0.9,
        strict_jit: bool = False,
        screen_head: bool = False,
    ) -> None:
        check_choice("dtype", dtype, self.dtypes, self.name)
        check_no_strict_jit(strict_jit, self.name)
        check_no_screen_head(screen_head, self.name)
        check_choice("device", device.partition(":")[0], self.devices, self.name)
        if dtype == "float64" and device.startswith("mps"):
            raise ValueError("the torch backend has no dtype 'float64' on device 'mps'; it accepts float32 and smaller")
        if threads is not None:
            torch.set_num_threads(threads)
        self._model = model
        self._device = torch.device(device)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._wide = torch.promote_types(self._dtype, torch.float32)
        self._block_size = block_size
        self._memory_fraction = memory_fraction
        self._cache = torch.empty(0)
        self._last_drawn = torch.empty(0, dtype=torch.int64)
        self.update_weights(weights)

    def update_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        def stored(name: str) -> torch.Tensor:
            return weights[name].detach().to(self._device, self._dtype).contiguous()  # the same memory if it fits

        def norm(name: str) -> Norm:
            weight, bias = (weights[f"{name}.{kind}"].detach().to(self._device, self._wide) for kind in Norm.__slots__)
            return Norm(weight, bias)

        def linear(name: str) -> Linear:
            return Linear(stored(f"{name}.weight"), stored(f"{name}.bias"))

        self._tok_emb, self._pos_emb = stored("tok_emb"), stored("pos_emb")
        self._final_norm = norm("final_norm")
        self._head = self._tok_emb if self._model.tied_head else stored("head")
        self._blocks = [
            Block(
                norm(f"blocks.{i}.norm1"),
                linear(f"blocks.{i}.qkv"),
                linear(f"blocks.{i}.proj"),
                norm(f"blocks.{i}.norm2"),
                linear(f"blocks.{i}.fc"),
                linear(f"blocks.{i}.fc2"),
            )
            for i in range(self._model.n_layers)
        ]

    def capacity(self) -> Capacity:
        item = self._dtype.itemsize
        per_block = 2 * self._model.n_layers * self._block_size * self._model.embed_dim * item
        weight_bytes = self._model.num_parameters * item
        return Capacity(weight_bytes, per_block, free_memory(self._device, self._memory_fraction))

    def allocate(self, num_blocks: int) -> None:
        model = self._model
        shape = (model.n_layers, 2, num_blocks, self._block_size, model.n_heads, model.head_dim)
        self._cache = torch.empty(0)  # the old one goes before the new one comes
        self._cache = torch.empty(shape, dtype=self._dtype, device=self._device)

    def submit(self, batch: Batch) -> StepOutput:
        with torch.inference_mode():
            return self._step(batch)

    def collect(self, handle: StepOutput) -> StepOutput:
        return handle

    def _step(self, batch: Batch) -> StepOutput:
        x = self._hidden(batch)  # [T, D]
        drawn = self._logits(x[self._index(batch.draw_rows)])  # [R, V]
        wanted = self._logits(x[self._index(batch.logits_rows)]) if len(batch.logits_rows) else None  # [L, V]
        if batch.sampling is None:
            empty = np.empty((0,), np.int32)
            floats = empty.astype(np.float32)
            return StepOutput(empty, floats, empty, empty[:, None], floats[:, None], wanted)
        _check_logits(drawn)
        token_ids = torch_sampling.draw(drawn, batch.sampling)
        self._last_drawn = token_ids
        logprobs, ranks, top_ids, top = torch_sampling.logprobs(drawn, token_ids, batch.sampling.num_logprobs)
        return StepOutput(
            token_ids.int().cpu().numpy(),
            logprobs.cpu().numpy(),
            ranks.int().cpu().numpy(),
            top_ids.int().cpu().numpy(),
            top.cpu().numpy(),
            wanted,
        )

    def _hidden(self, batch: Batch) -> torch.Tensor:
        """The residual stream after the last block, ``[T, D]`` in float32 or wider; writes K and V to the cache."""
        num_blocks = self._cache.shape[2] if self._cache.dim() == 6 else 0
        check_batch(batch, self._model, num_blocks, self._block_size, len(self._last_drawn))
        if batch.block_copies is not None:
            source, destination = self._index(batch.block_copies).T
            self._cache[:, :, destination] = self._cache[:, :, source]
        tokens = self._index(batch.token_ids)
        if batch.previous_rows is not None:
            previous = self._index(batch.previous_rows)
            tokens = torch.where(previous >= 0, self._last_drawn[previous.clamp_min(0)], tokens)
        slots = self._index(batch.slots)
        written = None if (batch.slots >= 0).all() else slots >= 0
        sequences = self._sequences(batch)
        x = self._tok_emb[tokens].to(self._wide) + self._pos_emb[self._index(batch.positions)].to(self._wide)
        for layer, block in enumerate(self._blocks):
            qkv = block.qkv(self._normalise(x, block.norm1))  # [T, 3D]
            q, k, v = qkv.view(-1, 3, self._model.n_heads, self._model.head_dim).unbind(1)  # [T, H, d] each
            cache = self._cache[layer].flatten(1, 2)  # [2, slots, H, d]
            if written is None:
                cache[0].index_copy_(0, slots, k)
                cache[1].index_copy_(0, slots, v)
            else:
                cache[0].index_copy_(0, slots[written], k[written])
                cache[1].index_copy_(0, slots[written], v[written])
            x = x + block.proj(self._attention(layer, q, sequences))
            x = x + block.fc2(ACTIVATIONS[self._model.activation](block.fc(self._normalise(x, block.norm2))))
        return x

    def _attention(self, layer: int, q: torch.Tensor, sequences: list[_Sequence]) -> torch.Tensor:
        """Causal attention of each sequence's rows of ``q`` ``[T, H, d]`` over its cached positions; ``[T, D]``."""
        out = torch.empty_like(q)
        for sequence in sequences:
            keys, values = (
                self._cache[layer, i, sequence.blocks].flatten(0, 1)[: sequence.length].transpose(0, 1)  # [H, C, d]
                for i in (0, 1)
            )
            queries = q[sequence.rows].transpose(0, 1)  # [H, N, d]
            count = queries.shape[1]
            first = sequence.length - count  # position of the first query
            whole = first == 0 and count > 1
            mask = None
            if count > 1 and not whole:
                positions = torch.arange(sequence.length, device=self._device)
                mask = positions <= positions[first:, None]  # [N, C]
            attended = F.scaled_dot_product_attention(
                queries[None],
                keys[None],
                values[None],
                attn_mask=mask,
                is_causal=whole,
                scale=self._model.attn_scales[layer],
            )
            out[sequence.rows] = attended[0].transpose(0, 1)
        return out.flatten(1)

    def _sequences(self, batch: Batch) -> list[_Sequence]:
        """The batch's sequences; a run of consecutive blocks becomes a slice, so that reading it copies nothing."""
        found = []
        for s, length in enumerate(batch.context_lens.tolist()):
            table = batch.block_tables[s, : -(-length // self._block_size)]
            rows = slice(int(batch.query_starts[s]), int(batch.query_starts[s + 1]))
            consecutive = bool((np.diff(table) == 1).all())
            blocks = slice(int(table[0]), int(table[-1]) + 1) if consecutive else self._index(table)
            found.append(_Sequence(rows, blocks, length))
        return found

    def _normalise(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, self._model.norm_eps)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """Final norm and head of ``x`` ``[N, D]``; ``[N, V]`` in float32 or wider."""
        normed = self._normalise(x, self._final_norm)
        return F.linear(normed.to(self._dtype), self._head).to(self._wide)

    def _index(self, array: npt.NDArray[np.integer]) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self._device)


def _check_logits(logits: torch.Tensor) -> None:
    """Refuse rows from which no token can be drawn: NaN, +inf, or nothing but -inf."""
    top = logits.amax(dim=1)  # NaN wins a maximum
    bad = ~torch.isfinite(top)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise UndrawableRow(
            f"the logits of drawn row {row} have maximum {top[row].item()}: no token can be drawn from them", row
        )
