"""The weights of a model as the Triton kernels read them: packed matrices and vectors, on the device."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from engine.config import ModelConfig
from kernels import weights

STORAGE = {
    "float32": (torch.float32, "float"),
    "bfloat16": (torch.bfloat16, "float"),
    "float16": (torch.float16, "float"),
    "int8": (torch.bfloat16, "int8"),
    "int4": (torch.bfloat16, "int4"),
    "int4-g64": (torch.bfloat16, "int4"),
}
"""dtype -> storage type of activations, cache and embeddings; kind of the linears' and the head's weights."""


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
    """All weights on the device. Those of linears and head may be quantised, the others are in the storage type."""

    tok_emb: weights.Weights
    pos_emb: torch.Tensor
    blocks: tuple[Block, ...]
    final_norm: tuple[torch.Tensor, torch.Tensor]
    head: weights.Weights


def pack_model(
    model: ModelConfig, canonical: Mapping[str, torch.Tensor], dtype: str, device: torch.device
) -> PackedModel:
    """Copy canonical weights to the device in the kernels' layout, ``dtype`` one of ``STORAGE``.

    A tied head is the embedding's very tensor, unless the head is quantised.
    """
    storage, kind = STORAGE[dtype]

    def vector(name: str) -> torch.Tensor:
        return canonical[name].detach().to(device, storage, copy=True).contiguous()

    def matrix(name: str, kind: str = kind) -> weights.Weights:
        return weights.pack(canonical[name].detach().to(device), storage, kind)

    def norm(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return vector(f"{name}.weight"), vector(f"{name}.bias")

    def affine(name: str) -> tuple[weights.Weights, torch.Tensor]:
        return matrix(f"{name}.weight"), vector(f"{name}.bias")

    tok_emb = matrix("tok_emb", "float")
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
    head = tok_emb if model.tied_head and kind == "float" else matrix("head")
    return PackedModel(tok_emb, vector("pos_emb"), blocks, norm("final_norm"), head)


def packed_bytes(model: PackedModel) -> int:
    """Bytes of all packed tensors, each counted once."""
    found = {}

    def visit(value: object) -> None:
        if isinstance(value, torch.Tensor):
            found[value.data_ptr()] = value.nbytes
        elif isinstance(value, weights.Weights):
            visit((value.data, value.scales))
        elif isinstance(value, tuple):
            for part in value:
                visit(part)
        elif isinstance(value, PackedModel | Block):
            for name in value.__slots__:
                visit(getattr(value, name))

    visit(model)
    return sum(found.values())
