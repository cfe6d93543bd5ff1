"""Steps built by hand, for tests of a backend below the engine: random weights, scattered blocks, batches."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from sampling_batches import neutral_sampling

from engine.backends.base import Backend, Batch, SamplingBatch, StepOutput
from engine.checkpoints.canonical import canonical_shapes
from engine.config import ModelConfig

BLOCK = 16  # tokens of a cache block


def random_weights(model: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Canonical weights with activations of a sensible size."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in canonical_shapes(model).items():
        values = torch.randn(shape, generator=generator)
        scale = {"weight": shape[-1] ** -0.5, "bias": 0.1}.get(name.rpartition(".")[2], 0.3)
        weights[name] = values * 0.1 + 1 if "norm" in name and name.endswith("weight") else values * scale
    if model.tied_head:
        weights["head"] = weights["tok_emb"]
    return weights


def quantised(weights: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """The canonical weights that the triton backend computes with where those of linears and head are int8 or int4."""
    from kernels.weights import pack, unpack

    def rounded(name: str, weight: torch.Tensor) -> torch.Tensor:
        stays = weight.dim() == 1 or name.endswith("_emb") or kind == "float"
        return weight if stays else unpack(pack(weight, torch.bfloat16, kind))

    return {name: rounded(name, weight) for name, weight in weights.items()}


def tokens(count: int, seed: int = 0, vocab_size: int = 97) -> list[int]:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, vocab_size, count).tolist()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit."""
    bits = [t.reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


@dataclass
class Running:
    """A sequence with its blocks, scattered over the cache, and how much of it has run."""

    blocks: list[int]
    done: int = 0


@dataclass
class Driver:
    """Builds batches by hand: which tokens of which sequence run, and of which rows to return logits or draw."""

    backend: Backend
    num_blocks: int = 60
    free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.release()

    def release(self) -> None:
        """Forget all sequences; their blocks are free again."""
        self.free = np.random.default_rng(1).permutation(self.num_blocks).tolist()

    def sequence(self, length: int) -> Running:
        return Running([self.free.pop() for _ in range(-(-length // BLOCK))])

    def batch(self, parts: Sequence[tuple[Running, Sequence[int]]], draw: SamplingBatch | None = None) -> Batch:
        counts = [len(ids) for _, ids in parts]
        starts = np.cumsum([0, *counts]).astype(np.int32)
        positions = np.concatenate([np.arange(s.done, s.done + len(ids)) for s, ids in parts]).astype(np.int32)
        tables = np.full((len(parts), max(len(s.blocks) for s, _ in parts)), 10**6, np.int32)
        slots = []
        for row, (s, ids) in enumerate(parts):
            tables[row, : len(s.blocks)] = s.blocks
            slots += [s.blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(s.done, s.done + len(ids))]
            s.done += len(ids)
        for row, (s, _) in enumerate(parts):
            tables[row, -(-s.done // BLOCK) :] = 10**6  # past the last block: must not be read
        return Batch(
            token_ids=np.concatenate([ids for _, ids in parts]).astype(np.int32),
            positions=positions,
            slots=np.array(slots, np.int64),
            query_starts=starts,
            context_lens=np.array([s.done for s, _ in parts], np.int32),
            block_tables=tables,
            draw_rows=(starts[1:] - 1 if draw is not None else np.empty(0)).astype(np.int32),
            logits_rows=np.arange(starts[-1] if draw is None else 0, dtype=np.int32),
            sampling=draw,
        )

    def run(self, parts: Sequence[tuple[Running, Sequence[int]]], draw: SamplingBatch | None = None) -> StepOutput:
        return self.backend.collect(self.backend.submit(self.batch(parts, draw)))

    def logits(self, parts: Sequence[tuple[Running, Sequence[int]]]) -> torch.Tensor:
        logits = self.run(parts).logits
        assert logits is not None
        return logits

    def in_chunks(self, ids: Sequence[int], cuts: Sequence[int]) -> torch.Tensor:
        """Logits of a whole sequence, run in chunks that end at ``cuts``."""
        s = self.sequence(len(ids))
        edges = [0, *cuts, len(ids)]
        return torch.cat([self.logits([(s, ids[a:b])]) for a, b in pairwise(edges)])


def greedy(rows: int, **changes: object) -> SamplingBatch:
    """Greedy draws of ``rows`` rows, with changes."""
    own = {"temperature": np.zeros(rows, np.float32), "seeds": np.arange(rows, dtype=np.uint64)}
    return neutral_sampling(rows, **(own | changes))
