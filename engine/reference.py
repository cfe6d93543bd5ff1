"""The model in plain PyTorch: what every backend of this project is held to.

``GPTModel(config)`` is the GPT of the course page: token and position embeddings, a stack of pre-norm
transformer blocks, a final LayerNorm, a linear head. It is written to be read, imports nothing else of this
project, and recomputes everything at every call. So do ``generate_next_token``, ``generate_greedy`` and
``generate_sampled``, the loops of that page: they are the baseline that ``python -m engine.bench`` compares with.

Sources: Radford et al. 2019 (GPT-2) for the architecture; Ba et al. 2016 for LayerNorm; Hendrycks and Gimpel 2016
for GELU and its tanh form.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}

REQUIRED = ("vocab_size", "context_length", "n_heads", "n_layers")
OPTIONAL: dict[str, Any] = {
    "drop_rate": 0.0,
    "qkv_bias": False,
    "activation": "gelu_tanh",
    "hidden_dim": None,  # the width of the feed-forward; None is 4 x embed_dim
    "norm_eps": 1e-5,
    "attn_scale": None,  # multiplies q.k: a float, or one per layer; None is 1 / sqrt(head_dim)
    "tie_weights": False,  # the head shares the token embedding's weight
}


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` with every optional key filled in and ``emb_dim`` renamed to ``embed_dim``.

    Raises:
        ValueError: a required key is missing, a key is unknown, a size is not a positive integer,
            ``embed_dim`` is not a multiple of ``n_heads``, or the activation is not in ``ACTIVATIONS``.
    """
    full = dict(config)
    if "emb_dim" in full:
        if full.get("embed_dim", full["emb_dim"]) != full["emb_dim"]:
            raise ValueError(f"config gives embed_dim={full['embed_dim']} and emb_dim={full['emb_dim']}; give one")
        full["embed_dim"] = full.pop("emb_dim")
    required = (*REQUIRED, "embed_dim")
    missing = [key for key in required if key not in full]
    if missing:
        raise ValueError(f"config lacks {', '.join(missing)}; it needs {', '.join(required)}")
    unknown = sorted(set(full) - set(required) - set(OPTIONAL))
    if unknown:
        raise ValueError(f"config has unknown keys {', '.join(unknown)}; known: {', '.join((*required, *OPTIONAL))}")
    for key in required:
        if not isinstance(full[key], int) or full[key] < 1:
            raise ValueError(f"config[{key!r}] must be a positive integer, got {full[key]!r}")
    full = {**OPTIONAL, **full}
    if full["embed_dim"] % full["n_heads"]:
        raise ValueError(f"embed_dim={full['embed_dim']} is not a multiple of n_heads={full['n_heads']}")
    if full["activation"] not in ACTIVATIONS:
        raise ValueError(f"activation {full['activation']!r} is not known; choose from {', '.join(ACTIVATIONS)}")
    if full["hidden_dim"] is None:
        full["hidden_dim"] = 4 * full["embed_dim"]
    return full


class LayerNorm(nn.Module):
    """``scale * (x - mean) / sqrt(var + eps) + shift`` over the last dimension, the variance biased (divided by N)."""

    def __init__(self, emb_dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        var = x.var(dim=-1, keepdim=True, unbiased=False)
        return self.scale * (x - mean) / torch.sqrt(var + self.eps) + self.shift


class Activation(nn.Module):
    """The feed-forward's non-linearity, one of ``ACTIVATIONS``. It has no parameters."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ACTIVATIONS[self.name](x)

    def extra_repr(self) -> str:
        return self.name


class MultiHeadAttention(nn.Module):
    """Causal self-attention, ``num_heads`` heads of ``d_out / num_heads`` dimensions, ``[B, T, D] -> [B, T, D]``."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        context_length: int,
        dropout: float,
        num_heads: int,
        qkv_bias: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = d_out // num_heads
        self.scale = 1.0 / math.sqrt(self.head_dim) if scale is None else scale
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(dropout)
        future = torch.triu(torch.ones(context_length, context_length, dtype=torch.bool), diagonal=1)
        self.register_buffer("mask", future, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch_size, seq_len, width = x.shape

        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.view(batch_size, seq_len, self.num_heads, self.head_dim).transpose(1, 2)  # [B, H, T, d]

        queries, keys, values = heads(self.W_query(x)), heads(self.W_key(x)), heads(self.W_value(x))
        scores = queries @ keys.transpose(2, 3) * self.scale  # [B, H, T, T]
        scores = scores.masked_fill(self.get_buffer("mask")[:seq_len, :seq_len], float("-inf"))
        weights = self.dropout(torch.softmax(scores, dim=-1))
        context = (weights @ values).transpose(1, 2).reshape(batch_size, seq_len, width)  # [B, T, D]
        out: torch.Tensor = self.out_proj(context)
        return out


class FeedForward(nn.Module):
    """Linear to ``hidden_dim``, the activation, Linear back. ``[B, T, D] -> [B, T, D]``."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        full = complete_config(config)
        self.layers = nn.Sequential(
            nn.Linear(full["embed_dim"], full["hidden_dim"]),
            Activation(full["activation"]),
            nn.Linear(full["hidden_dim"], full["embed_dim"]),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return out


class TransformerBlock(nn.Module):
    """``x + att(norm1(x))``, then ``x + ff(norm2(x))``. ``[B, T, D] -> [B, T, D]``."""

    def __init__(self, config: Mapping[str, Any], layer: int = 0) -> None:
        super().__init__()
        full = complete_config(config)
        scale = full["attn_scale"]
        self.att = MultiHeadAttention(
            d_in=full["embed_dim"],
            d_out=full["embed_dim"],
            context_length=full["context_length"],
            dropout=full["drop_rate"],
            num_heads=full["n_heads"],
            qkv_bias=full["qkv_bias"],
            scale=scale if scale is None or isinstance(scale, float | int) else scale[layer],
        )
        self.ff = FeedForward(full)
        self.norm1 = LayerNorm(full["embed_dim"], full["norm_eps"])
        self.norm2 = LayerNorm(full["embed_dim"], full["norm_eps"])
        self.drop_shortcut = nn.Dropout(full["drop_rate"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_shortcut(self.att(self.norm1(x)))
        out: torch.Tensor = x + self.drop_shortcut(self.ff(self.norm2(x)))
        return out


class GPTModel(nn.Module):
    """The course page's GPT.

    Args:
        config: a mapping with ``vocab_size``, ``context_length``, ``embed_dim`` (or ``emb_dim``), ``n_heads`` and
            ``n_layers``, and optionally the keys of ``OPTIONAL``.

    Raises:
        ValueError: what ``complete_config`` refuses.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        full = complete_config(config)
        self.config = full
        self.tok_emb = nn.Embedding(full["vocab_size"], full["embed_dim"])
        self.pos_emb = nn.Embedding(full["context_length"], full["embed_dim"])
        self.drop_emb = nn.Dropout(full["drop_rate"])
        self.trf_blocks = nn.Sequential(*[TransformerBlock(full, layer) for layer in range(full["n_layers"])])
        self.final_norm = LayerNorm(full["embed_dim"], full["norm_eps"])
        self.out_head = nn.Linear(full["embed_dim"], full["vocab_size"], bias=False)
        if full["tie_weights"]:
            self.out_head.weight = self.tok_emb.weight

    def forward(self, in_idx: torch.Tensor) -> torch.Tensor:
        """Token ids ``[B, T]`` (integers, T at most ``context_length``) to logits ``[B, T, vocab_size]``."""
        _, seq_len = in_idx.shape
        tok_embeds = self.tok_emb(in_idx)  # [B, T, D]
        pos_embeds = self.pos_emb(torch.arange(seq_len, device=in_idx.device))  # [T, D]
        x = tok_embeds + pos_embeds
        x = self.drop_emb(x)
        x = self.trf_blocks(x)
        x = self.final_norm(x)
        logits: torch.Tensor = self.out_head(x)
        return logits


def generate_next_token(model: Callable[[torch.Tensor], torch.Tensor], context: torch.Tensor) -> torch.Tensor:
    """One token drawn from the model's distribution after ``context`` ``[B, T]``; returns ids ``[B, 1]``."""
    logits = model(context)  # [B, T, V]
    probs = F.softmax(logits[:, -1, :], dim=-1)
    return torch.multinomial(probs, num_samples=1)


def generate_sampled(model: Callable[[torch.Tensor], torch.Tensor], context: torch.Tensor, steps: int) -> torch.Tensor:
    """The page's loop: draw, append, run the whole context again. Returns ``[B, T + steps]``."""
    for _ in range(steps):
        context = torch.cat([context, generate_next_token(model, context)], dim=1)
    return context


def generate_greedy(model: Callable[[torch.Tensor], torch.Tensor], context: torch.Tensor, steps: int) -> torch.Tensor:
    """The same loop with the most probable token in place of a draw. Returns ``[B, T + steps]``."""
    for _ in range(steps):
        next_token = model(context)[:, -1, :].argmax(dim=-1, keepdim=True)
        context = torch.cat([context, next_token], dim=1)
    return context
