"""What the checkpoint tests share: a GPT in the book's manner, odd configurations, the comparison of logits."""

from typing import Any

import torch
from torch import nn

from engine.checkpoints.canonical import Checkpoint, to_reference
from engine.reference import GPTModel

SMALL = {"vocab_size": 97, "context_length": 16, "embed_dim": 40, "n_heads": 2, "n_layers": 2}
ODD_CONFIGS: dict[str, dict[str, Any]] = {
    "head_dim 20": SMALL,
    "head_dim 80, three layers": {**SMALL, "embed_dim": 80, "n_heads": 1, "n_layers": 3},
    "qkv_bias": {**SMALL, "qkv_bias": True},
    "tied head": {**SMALL, "tie_weights": True},
    "exact gelu": {**SMALL, "activation": "gelu"},
    "relu, narrow feed-forward": {**SMALL, "activation": "relu", "hidden_dim": 24},
    "silu, eps": {**SMALL, "activation": "silu", "norm_eps": 1e-3},
    "scales": {**SMALL, "attn_scale": [0.5, 0.1]},
}


def random_gpt(config: dict[str, Any], seed: int = 0) -> GPTModel:
    """The reference with weights that are all different, biases and norms included."""
    torch.manual_seed(seed)
    return randomise(GPTModel(config))


def randomise(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if "scale" in name or ("norm" in name and "weight" in name) or "ln_" in name else 0.0
            parameter.copy_(torch.randn_like(parameter) * 0.2 + offset)
    return model.eval()


def assert_same_logits(checkpoint: Checkpoint, model: Any) -> None:
    """The checkpoint's model and ``model`` agree to 1e-5 on random tokens of a whole context."""
    config = checkpoint.config
    ids = torch.randint(config.vocab_size, (2, config.context_length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(ids)
        theirs = getattr(theirs, "logits", theirs[0] if isinstance(theirs, tuple) else theirs)
        torch.testing.assert_close(to_reference(config, checkpoint.weights)(ids), theirs, atol=1e-5, rtol=1e-5)


class BookGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        root = torch.sqrt(torch.tensor(2.0 / torch.pi))  # float32, whatever x is
        return 0.5 * x * (1 + torch.tanh(root * (x + 0.044715 * torch.pow(x, 3))))


class BookNorm(nn.Module):
    def __init__(self, emb_dim: int) -> None:
        super().__init__()
        self.eps = 1e-5
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.scale * centred / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + self.eps) + self.shift


class BookAttention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = config["emb_dim"]
        self.num_heads = config["n_heads"]
        self.W_query = nn.Linear(width, width, bias=config["qkv_bias"])
        self.W_key = nn.Linear(width, width, bias=config["qkv_bias"])
        self.W_value = nn.Linear(width, width, bias=config["qkv_bias"])
        self.out_proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(config["drop_rate"])
        length = config["context_length"]
        self.register_buffer("mask", torch.triu(torch.ones(length, length), diagonal=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            linear(x).view(batch, length, self.num_heads, -1).transpose(1, 2)
            for linear in (self.W_query, self.W_key, self.W_value)
        )
        scores = (q @ k.transpose(2, 3)).masked_fill(self.mask.bool()[:length, :length], -torch.inf)
        weights = self.dropout(torch.softmax(scores / k.shape[-1] ** 0.5, dim=-1))
        return self.out_proj((weights @ v).transpose(1, 2).reshape(batch, length, width))


class BookFeedForward(nn.Module):
    def __init__(self, config: dict[str, Any], activation: nn.Module) -> None:
        super().__init__()
        width = config["emb_dim"]
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), activation, nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class BookBlock(nn.Module):
    def __init__(self, config: dict[str, Any], activation: nn.Module, norm: type[nn.Module]) -> None:
        super().__init__()
        self.att = BookAttention(config)
        self.ff = BookFeedForward(config, activation)
        self.norm1 = norm(config["emb_dim"])
        self.norm2 = norm(config["emb_dim"])
        self.drop_resid = nn.Dropout(config["drop_rate"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_resid(self.att(self.norm1(x)))
        return x + self.drop_resid(self.ff(self.norm2(x)))


class BookGPT(nn.Module):
    """The book's model: emb_dim, drop_resid, a mask buffer that is saved, its own GELU and LayerNorm."""

    def __init__(
        self,
        config: dict[str, Any],
        activation: nn.Module | None = None,
        norm: type[nn.Module] = BookNorm,
        tied: bool = False,
        container: Any = nn.Sequential,
    ) -> None:
        super().__init__()
        width = config["emb_dim"]
        self.tok_emb = nn.Embedding(config["vocab_size"], width)
        self.pos_emb = nn.Embedding(config["context_length"], width)
        self.drop_emb = nn.Dropout(config["drop_rate"])
        blocks = [BookBlock(config, activation or BookGELU(), norm) for _ in range(config["n_layers"])]
        self.trf_blocks = nn.Sequential(*blocks) if container is nn.Sequential else nn.ModuleList(blocks)
        self.final_norm = norm(width)
        self.out_head = nn.Linear(width, config["vocab_size"], bias=False)
        if tied:
            self.out_head.weight = self.tok_emb.weight

    def forward(self, in_idx: torch.Tensor) -> torch.Tensor:
        x = self.drop_emb(self.tok_emb(in_idx) + self.pos_emb(torch.arange(in_idx.shape[1], device=in_idx.device)))
        for block in self.trf_blocks:
            x = block(x)
        return self.out_head(self.final_norm(x))


BOOK_CONFIG: dict[str, Any] = {
    "vocab_size": 97,
    "context_length": 16,
    "emb_dim": 40,
    "n_heads": 2,
    "n_layers": 2,
    "drop_rate": 0.1,
    "qkv_bias": False,
}


def random_book(**kwargs: Any) -> BookGPT:
    torch.manual_seed(0)
    return randomise(BookGPT(BOOK_CONFIG, **kwargs))
