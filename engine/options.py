"""What ``LLM(**options)`` takes besides its own arguments: the fields of ``EngineConfig``, and vLLM's names."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from engine.config import EngineConfig, ModelConfig

# vLLM's arguments that change nothing in what this engine answers, and the values that are accepted.
_INERT: dict[str, tuple[Any, ...] | None] = {
    "tensor_parallel_size": (1,),
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "quantization": (None,),
    "tokenizer_mode": ("auto", "slow"),
    "skip_tokenizer_init": (False,),
    "task": ("auto", "generate"),
    "runner": ("auto", "generate"),
    "load_format": ("auto",),
    "kv_cache_dtype": ("auto",),
    "cpu_offload_gb": (0,),
    "enforce_eager": None,
    "trust_remote_code": None,
    "swap_space": None,
    "disable_log_stats": None,
    "disable_custom_all_reduce": None,
    "enable_prefix_caching": None,
    "enable_chunked_prefill": None,
    "max_seq_len_to_capture": None,
}


def engine_config(options: Mapping[str, Any]) -> EngineConfig:
    """The ``EngineConfig`` of an ``LLM``'s keyword arguments; refuses what it does not know."""
    names = {field.name for field in dataclasses.fields(EngineConfig)}
    for name, value in options.items():
        if name in names:
            continue
        if name not in _INERT:
            raise TypeError(
                f"LLM has no argument {name!r}; it has {', '.join(sorted(names))}, and those in its docstring"
            )
        accepted = _INERT[name]
        if accepted is not None and value not in accepted:
            raise ValueError(f"{name}={value!r} is not supported; it can only be {' or '.join(map(repr, accepted))}")
    return EngineConfig(**{name: value for name, value in options.items() if name in names})


def max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    if (config.max_model_len or 1) > model.context_length:
        raise ValueError(f"max_model_len={config.max_model_len} is above the model's context of {model.context_length}")
    return config.max_model_len or model.context_length
