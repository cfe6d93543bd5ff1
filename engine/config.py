"""What a model is (``ModelConfig``) and how an engine runs it (``EngineConfig``): every default and every check."""

from dataclasses import dataclass
from typing import Literal

ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "silu")
MAX_THREADS = 1024  # more than machines have CPUs, fewer than systems refuse


def _require_positive(owner: str, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{owner}.{name} must be a positive integer, got {value!r}")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The architecture of a GPT-2 family model: pre-norm blocks, learned positions, GELU-like feed-forward.

    Args:
        vocab_size: rows of the token embedding and of the head.
        context_length: rows of the position embedding, the longest sequence in tokens.
        embed_dim: width D of the residual stream.
        n_heads: attention heads; ``embed_dim`` is a multiple of it.
        n_layers: transformer blocks.
        hidden_dim: width of the feed-forward; 4 x embed_dim in GPT-2.
        activation: "gelu_tanh" (GPT-2's), "gelu" (the exact one), "relu" or "silu".
        norm_eps: added to the variance in every LayerNorm.
        attn_scales: one factor per layer that multiplies q.k; empty means 1/sqrt(head_dim) everywhere.
        tied_head: whether the head's weight is the token embedding's.

    Raises:
        ValueError: a size is not a positive integer, ``embed_dim`` is not a multiple of ``n_heads``, the activation
            is not known, or ``attn_scales`` does not have ``n_layers`` entries.
    """

    vocab_size: int
    context_length: int
    embed_dim: int
    n_heads: int
    n_layers: int
    hidden_dim: int
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-5
    attn_scales: tuple[float, ...] = ()
    tied_head: bool = False

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "context_length", "embed_dim", "n_heads", "n_layers", "hidden_dim")
        _require_positive("ModelConfig", **{name: getattr(self, name) for name in sizes})
        if self.embed_dim % self.n_heads:
            raise ValueError(f"embed_dim={self.embed_dim} is not a multiple of n_heads={self.n_heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not supported; choose from {', '.join(ACTIVATIONS)}")
        scales = self.attn_scales or (self.head_dim**-0.5,) * self.n_layers
        if len(scales) != self.n_layers:
            raise ValueError(f"attn_scales has {len(scales)} entries for n_layers={self.n_layers}")
        object.__setattr__(self, "attn_scales", scales)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.n_heads

    @property
    def num_parameters(self) -> int:
        """Parameters of the canonical form; a tied head counts once."""
        width, hidden = self.embed_dim, self.hidden_dim
        block = 4 * width * width + 4 * width + 2 * width * hidden + hidden + width + 4 * width
        tables = (self.vocab_size * (1 if self.tied_head else 2) + self.context_length) * width
        return tables + self.n_layers * block + 2 * width


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How an engine runs a model.

    Args:
        backend: "auto", or a backend that `python -m engine.doctor` lists.
        dtype: "auto", "float32", "bfloat16", "float16", "float64", "int8", "int4", "int4-g64" or "int4-g128", where the
            backend has it. int8 and int4 are weights; activations are int8 too on a CPU, and bfloat16 on a GPU.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps", where the backend has it.
        threads: CPU threads of the native or torch backend, 1024 at most; None: as many as this process may use.
        max_model_len: longest sequence in tokens; None: the model's context length.
        max_num_seqs: sequences that run at the same time.
        max_num_batched_tokens: tokens that one step may run, over all sequences.
        block_size: tokens in a block of the KV cache.
        kv_cache_memory_bytes: bytes for the KV cache; None: what the sequences can need, if there is room for it.
        context_overflow: at the context length, "stop" with finish_reason "length", or "slide" the window over the
            last tokens, at the price of a whole prefill for every token.
        strict_jit: raise where a step would compile a kernel after warm-up; the triton backend alone has it.
        screen_head: requests with no option but a temperature, and none for logprobs, read an int8 copy of the head,
            and of the head itself the few outputs that could be drawn: the same tokens from fewer bytes, while
            ``cumulative_logprob`` becomes an estimate; the native backend alone has it, in float32 and bfloat16.

    Raises:
        ValueError: a count is not a positive integer or too large, or an option has a value that it does not accept.
    """

    backend: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    kv_cache_memory_bytes: int | None = None
    context_overflow: Literal["stop", "slide"] = "stop"
    strict_jit: bool = False
    screen_head: bool = False

    def __post_init__(self) -> None:
        _require_positive(
            "EngineConfig",
            threads=self.threads,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            kv_cache_memory_bytes=self.kv_cache_memory_bytes,
        )
        if (self.threads or 1) > MAX_THREADS:
            raise ValueError(f"EngineConfig.threads must be at most {MAX_THREADS}, got {self.threads}")
        if self.context_overflow not in ("stop", "slide"):
            raise ValueError(f"context_overflow must be 'stop' or 'slide', got {self.context_overflow!r}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_num_seqs={self.max_num_seqs}: "
                "every running sequence needs a token in each step"
            )
