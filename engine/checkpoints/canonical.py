"""The one form that every checkpoint becomes: a ``ModelConfig`` and these named tensors.

Linear weights are [out, in], as in ``torch.nn.Linear``. D is embed_dim, H hidden_dim, V vocab_size, C context_length::

    tok_emb [V, D]   pos_emb [C, D]   final_norm.weight [D]   final_norm.bias [D]   head [V, D]
    blocks.{i}.norm1.weight [D]      blocks.{i}.norm1.bias [D]
    blocks.{i}.qkv.weight [3D, D]    blocks.{i}.qkv.bias [3D]      queries, keys, values; heads in order within each
    blocks.{i}.proj.weight [D, D]    blocks.{i}.proj.bias [D]
    blocks.{i}.norm2.weight [D]      blocks.{i}.norm2.bias [D]
    blocks.{i}.fc.weight [H, D]      blocks.{i}.fc.bias [H]
    blocks.{i}.fc2.weight [D, H]     blocks.{i}.fc2.bias [D]

A bias that the checkpoint does not have is zeros. With ``tied_head`` the head is the very tensor ``tok_emb``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.config import ModelConfig
from engine.reference import GPTModel


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model as loaded.

    Args:
        config: its architecture.
        weights: the canonical tensors, in the dtype they were stored in.
        source: one line on what was recognised, for people.
        folder: where files that belong to the model are (its vocabulary), or None.
        eos_token_id: the end-of-text id, where the checkpoint says one.
        notes: what a default decided or what was skipped, a line each, for people.
    """

    config: ModelConfig
    weights: Mapping[str, torch.Tensor]
    source: str
    folder: Path | None = None
    eos_token_id: int | None = None
    notes: tuple[str, ...] = field(default=())


def canonical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every canonical tensor of ``config``."""
    width, hidden = config.embed_dim, config.hidden_dim
    shapes: dict[str, tuple[int, ...]] = {
        "tok_emb": (config.vocab_size, width),
        "pos_emb": (config.context_length, width),
        "final_norm.weight": (width,),
        "final_norm.bias": (width,),
        "head": (config.vocab_size, width),
    }
    linears = {"qkv": (3 * width, width), "proj": (width, width), "fc": (hidden, width), "fc2": (width, hidden)}
    for i in range(config.n_layers):
        for norm in ("norm1", "norm2"):
            shapes[f"blocks.{i}.{norm}.weight"] = shapes[f"blocks.{i}.{norm}.bias"] = (width,)
        for name, shape in linears.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
    return shapes


def check_canonical(config: ModelConfig, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that are missing, left over, of another shape, or not floating point, naming them."""
    shapes = canonical_shapes(config)
    problems = [f"{name} is missing, expected shape {list(shapes[name])}" for name in sorted(shapes.keys() - weights)]
    problems += [f"{name} is not known, shape {list(weights[name].shape)}" for name in sorted(weights.keys() - shapes)]
    for name in shapes.keys() & weights.keys():
        tensor = weights[name]
        if tuple(tensor.shape) != shapes[name]:
            problems.append(f"{name} has shape {list(tensor.shape)}, expected {list(shapes[name])}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} holds {tensor.dtype}, expected a floating-point type")
    if problems:
        raise ValueError("the weights do not fit the model: " + "; ".join(sorted(problems)))


def to_reference(config: ModelConfig, weights: Mapping[str, torch.Tensor]) -> GPTModel:
    """A ``GPTModel`` (evaluation mode, float32) with these weights: the oracle for this very model."""
    model = GPTModel(
        {
            "vocab_size": config.vocab_size,
            "context_length": config.context_length,
            "embed_dim": config.embed_dim,
            "n_heads": config.n_heads,
            "n_layers": config.n_layers,
            "hidden_dim": config.hidden_dim,
            "activation": config.activation,
            "norm_eps": config.norm_eps,
            "attn_scale": list(config.attn_scales),
            "qkv_bias": True,
            "tie_weights": config.tied_head,
        }
    )
    names = {"tok_emb.weight": "tok_emb", "pos_emb.weight": "pos_emb", "out_head.weight": "head"}
    names |= {"final_norm.scale": "final_norm.weight", "final_norm.shift": "final_norm.bias"}
    state = {name: weights[canonical].float() for name, canonical in names.items()}
    for i in range(config.n_layers):
        ours, block = f"trf_blocks.{i}.", f"blocks.{i}."
        for kind in ("weight", "bias"):
            qkv = weights[f"{block}qkv.{kind}"].float().chunk(3)
            for name, part in zip(("W_query", "W_key", "W_value"), qkv, strict=True):
                state[f"{ours}att.{name}.{kind}"] = part
            for name, canonical in {"att.out_proj": "proj", "ff.layers.0": "fc", "ff.layers.2": "fc2"}.items():
                state[f"{ours}{name}.{kind}"] = weights[f"{block}{canonical}.{kind}"].float()
        for norm in ("norm1", "norm2"):
            state[f"{ours}{norm}.scale"] = weights[f"{block}{norm}.weight"].float()
            state[f"{ours}{norm}.shift"] = weights[f"{block}{norm}.bias"].float()
    model.load_state_dict(state)
    return model.eval()
