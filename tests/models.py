"""Tiny models for the tests: sizes that are awkward on purpose, weights large enough that mistakes show."""

import torch

from engine.checkpoints.canonical import canonical_shapes
from engine.config import ModelConfig
from engine.reference import GPTModel

ODD_CONFIGS = {
    "plain": {"vocab_size": 97, "context_length": 64, "embed_dim": 40, "n_heads": 2, "n_layers": 2},
    "head_dim_20": {"vocab_size": 61, "context_length": 48, "embed_dim": 60, "n_heads": 3, "n_layers": 2},
    "head_dim_80": {"vocab_size": 130, "context_length": 40, "embed_dim": 80, "n_heads": 1, "n_layers": 2},
    "gpt2_vocabulary": {"vocab_size": 50257, "context_length": 32, "embed_dim": 16, "n_heads": 2, "n_layers": 1},
    "qkv_bias": {
        "vocab_size": 97,
        "context_length": 40,
        "embed_dim": 32,
        "n_heads": 4,
        "n_layers": 3,
        "qkv_bias": True,
    },
    "tied": {"vocab_size": 97, "context_length": 40, "embed_dim": 32, "n_heads": 4, "n_layers": 2, "tie_weights": True},
    "exact_gelu": {
        "vocab_size": 97,
        "context_length": 40,
        "embed_dim": 32,
        "n_heads": 2,
        "n_layers": 2,
        "activation": "gelu",
    },
    "relu_narrow": {
        "vocab_size": 53,
        "context_length": 33,
        "embed_dim": 24,
        "n_heads": 2,
        "n_layers": 2,
        "activation": "relu",
        "hidden_dim": 37,
        "norm_eps": 1e-3,
    },
    "scaled_attention": {
        "vocab_size": 53,
        "context_length": 33,
        "embed_dim": 24,
        "n_heads": 2,
        "n_layers": 2,
        "attn_scale": [1.0, 0.5],
        "activation": "silu",
    },
}


def tiny_config(**changes: object) -> ModelConfig:
    """A canonical config of a few thousand parameters."""
    sizes = {"vocab_size": 97, "context_length": 64, "embed_dim": 40, "n_heads": 2, "n_layers": 2, "hidden_dim": 96}
    return ModelConfig(**{**sizes, **changes})  # type: ignore[arg-type]


def random_weights(config: ModelConfig, seed: int = 0, scale: float = 0.25) -> dict[str, torch.Tensor]:
    """Canonical tensors from N(0, scale), norm weights around 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(shape, generator=generator) * scale for name, shape in canonical_shapes(config).items()
    }
    for name in weights:
        if "norm" in name and name.endswith("weight"):
            weights[name] += 1
    if config.tied_head:
        weights["head"] = weights["tok_emb"]
    return weights


def tiny_module(seed: int = 0, **changes: object) -> GPTModel:
    """A ``GPTModel`` in evaluation mode whose weights are large enough that mistakes show."""
    torch.manual_seed(seed)
    model = GPTModel({**ODD_CONFIGS["plain"], **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
