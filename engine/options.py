"""What ``LLM(**options)`` takes besides its own arguments: the fields of ``EngineConfig``, and vLLM's names."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engine.config import EngineConfig, ModelConfig
from engine.logs import get_logger
from engine.messages import MAX_LOGPROBS

DTYPE_ALIASES = {"half": "float16", "float": "float32"}

_INERT: dict[str, tuple[Any, Sequence[Any] | None]] = {
    "tensor_parallel_size": (1, (1,)),
    "pipeline_parallel_size": (1, (1,)),
    "data_parallel_size": (1, (1,)),
    "distributed_executor_backend": (None, (None,)),
    "quantization": (None, (None,)),
    "tokenizer_mode": ("auto", ("auto", "slow")),
    "tokenizer_revision": (None, (None,)),
    "skip_tokenizer_init": (False, (False,)),
    "task": ("auto", ("auto", "generate")),
    "runner": ("auto", ("auto", "generate")),
    "load_format": ("auto", ("auto",)),
    "download_dir": (None, (None,)),
    "hf_overrides": (None, (None,)),
    "kv_cache_dtype": ("auto", ("auto",)),
    "cpu_offload_gb": (0, (0,)),
    "enable_lora": (False, (False,)),
    "max_logprobs": (MAX_LOGPROBS, range(MAX_LOGPROBS + 1)),
    "enforce_eager": (False, None),
    "trust_remote_code": (False, None),
    "swap_space": (4, None),
    "disable_log_stats": (True, None),
    "disable_custom_all_reduce": (False, None),
    "enable_prefix_caching": (None, None),
    "enable_chunked_prefill": (None, None),
    "max_seq_len_to_capture": (8192, None),
}
"""vLLM's arguments that change nothing in what this engine answers: (vLLM's default, what is accepted; None: all)."""


def engine_config(options: Mapping[str, Any]) -> EngineConfig:
    """The ``EngineConfig`` of an ``LLM``'s keyword arguments.

    vLLM's names of dtypes are read as the engine's. vLLM's arguments that change nothing here are named in a line of
    the log where they are not vLLM's defaults.

    Raises:
        TypeError: an argument is not known.
        ValueError: one has a value that it cannot have.
    """
    names = {field.name for field in dataclasses.fields(EngineConfig)}
    for name in options:
        if name not in names and name not in _INERT:
            raise TypeError(
                f"LLM has no argument {name!r}; it has {', '.join(sorted(names))}, and those in its docstring"
            )
    own = {name: value for name, value in options.items() if name in names}
    _take_inert({name: value for name, value in options.items() if name not in names})
    return EngineConfig(**own | ({"dtype": dtype_name(own["dtype"])} if "dtype" in own else {}))


def dtype_name(dtype: Any) -> Any:
    """The engine's name of a dtype that has another in vLLM ("half", a ``torch.dtype``); anything else as it is."""
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    return DTYPE_ALIASES.get(name, name)


def _take_inert(given: Mapping[str, Any]) -> None:
    """Refuse what is not accepted; log what differs from vLLM's default."""
    for name, value in given.items():
        accepted = _INERT[name][1]
        if accepted is not None and value not in accepted:
            whole = f"an integer from 0 to {MAX_LOGPROBS}" if isinstance(accepted, range) else None
            listed = whole or " or ".join(map(repr, accepted))
            raise ValueError(f"{name}={value!r} is not supported; it can only be {listed}")
    idle = [f"{name}={value!r}" for name, value in given.items() if value != _INERT[name][0]]
    if idle:
        get_logger().info("without effect in this engine: %s", ", ".join(idle))


def max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    if (config.max_model_len or 1) > model.context_length:
        raise ValueError(f"max_model_len={config.max_model_len} is above the model's context of {model.context_length}")
    return config.max_model_len or model.context_length
