"""The checks of ``live.py``: each returns a part of a module in a supported form, or refuses it by class and place."""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.utils import parametrize

Source: TypeAlias = tuple[nn.Module, str]  # the submodule, and the name of the parameter in it

INERT = (nn.Dropout, nn.Identity)  # in evaluation mode
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
WRAPPERS = {
    "DataParallel": "pass its .module",
    "DistributedDataParallel": "pass its .module",
    "FullyShardedDataParallel": "pass a module that holds whole parameters",
    "OptimizedModule": "pass its ._orig_mod, the module that torch.compile was given",
    "PeftModel": "pass .merge_and_unload()",
    "PeftModelForCausalLM": "pass .merge_and_unload()",
}
SUPPORTED = (
    "supported is a GPTModel as in the course or the book: tok_emb, pos_emb, trf_blocks, final_norm, out_head; "
    "in a block att (W_query, W_key, W_value, out_proj), ff.layers (Linear, activation, Linear), norm1, norm2"
)


def kind_of(module: nn.Module) -> str:
    """The class of ``module`` in full."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def refuse_wrapped(module: nn.Module) -> None:
    """Refuse a wrapper around a model, saying what to pass in its place."""
    for cls in type(module).__mro__:
        if cls.__name__ in WRAPPERS:
            raise ValueError(f"{kind_of(module)} wraps a model and is not supported: {WRAPPERS[cls.__name__]}")


def refuse_hooks(module: nn.Module, path: str) -> None:
    """Refuse forward hooks, parametrizations and a ``forward`` set on the object: they change what it computes."""
    if any(getattr(module, name) for name in HOOKS):
        raise ValueError(f"{path} ({kind_of(module)}) has a forward hook; modules without forward hooks are supported")
    if parametrize.is_parametrized(module):
        raise ValueError(f"{path} ({kind_of(module)}) is parametrized; plain parameters are supported")
    if "forward" in vars(module):
        raise ValueError(f"{path} ({kind_of(module)}) has a forward set on the object; a class's own is supported")


def parts(module: nn.Module, path: str, names: tuple[str, ...] | None) -> dict[str, nn.Module]:
    """The children of ``module`` called ``names``, or all of a Sequential or ModuleList (``None``), in order.

    Raises:
        ValueError: one is missing; or there is another one that is no dropout, a parameter of its own, or a
            floating-point buffer that is not ``mask``.
    """
    if names is None and type(module) not in (nn.Sequential, nn.ModuleList):
        raise ValueError(f"{path} is a {kind_of(module)}; nn.Sequential and nn.ModuleList are supported")
    children = {name: child for name, child in module._modules.items() if child is not None}
    for name in names or ():
        if name not in children:
            raise ValueError(f"{path} ({kind_of(module)}) has no submodule {name}; {SUPPORTED}")
    for name, child in children.items():
        if names is not None and name not in names and type(child) not in INERT:
            raise ValueError(f"{path} has a submodule {name} ({kind_of(child)}) that is not supported; {SUPPORTED}")
    refuse_tensors(module, path, allowed_buffers=("mask",))
    return {name: children[name] for name in names or children}


def refuse_tensors(module: nn.Module, path: str, allowed_buffers: tuple[str, ...] = ()) -> None:
    """Refuse parameters and floating-point buffers that ``module`` itself holds."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            raise ValueError(f"{path} ({kind_of(module)}) has a parameter {name} that is not supported; {SUPPORTED}")
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_floating_point() and name not in allowed_buffers:
            raise ValueError(f"{path} ({kind_of(module)}) has a buffer {name} that is not supported; {SUPPORTED}")


def _own(module: nn.Module, path: str, wanted: type[nn.Module], allowed: tuple[str, ...]) -> None:
    """Refuse a module whose forward is not the one of ``wanted``, or that holds more than ``allowed``."""
    if not isinstance(module, wanted) or type(module).forward is not wanted.forward:
        raise ValueError(f"{path} is a {kind_of(module)}; a plain nn.{wanted.__name__} is supported")
    if module._parameters.get("weight") is None:
        raise ValueError(f"{path} ({kind_of(module)}) has no plain parameter weight")
    if any(child is not None for child in module._modules.values()) or set(module._parameters) - set(allowed):
        raise ValueError(f"{path} ({kind_of(module)}) holds more than {', '.join(allowed)}; nothing else is supported")


def table(module: nn.Module, path: str) -> tuple[Source, ...]:
    """The weight of a plain ``nn.Embedding``."""
    _own(module, path, nn.Embedding, ("weight",))
    if getattr(module, "max_norm", None) is not None:
        raise ValueError(f"{path} has max_norm={module.max_norm}; an embedding without max_norm is supported")
    return ((module, "weight"),)


def linear(module: nn.Module, path: str) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
    """The weight of a plain ``nn.Linear``, and its bias or nothing."""
    _own(module, path, nn.Linear, ("weight", "bias"))
    bias = () if module._parameters.get("bias") is None else ((module, "bias"),)
    return ((module, "weight"),), bias


def norm_parts(module: nn.Module, path: str) -> tuple[float, tuple[Source, ...], tuple[Source, ...]]:
    """Epsilon, weight and bias (or nothing) of a LayerNorm: ``nn.LayerNorm``, or one with ``scale`` and ``shift``."""
    if isinstance(module, nn.LayerNorm):
        _own(module, path, nn.LayerNorm, ("weight", "bias"))
        names = ("weight", "bias")
    else:
        names = ("scale", "shift")
    parameters = {name for name, parameter in module._parameters.items() if parameter is not None}
    eps = getattr(module, "eps", None)
    wanted = {names[0]} if names[0] == "weight" and "bias" not in parameters else set(names)
    plain = not module._modules and not isinstance(eps, bool) and isinstance(eps, int | float)
    if parameters != wanted or not plain:
        raise ValueError(
            f"{path} ({kind_of(module)}) has parameters {', '.join(sorted(parameters)) or 'none'} and eps {eps!r}; "
            "supported is nn.LayerNorm, or a LayerNorm with parameters scale and shift and a number eps"
        )
    assert isinstance(eps, int | float)
    bias = ((module, names[1]),) if names[1] in parameters else ()
    return float(eps), ((module, names[0]),), bias


def attention_scale(module: nn.Module, path: str, width: int) -> tuple[int, float]:
    """``num_heads`` of an attention, and the factor on q.k: its ``scale`` where it has one, else 1/sqrt(head_dim)."""
    heads = getattr(module, "num_heads", None)
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"{path} ({kind_of(module)}) has num_heads={heads!r}; a divisor of {width} is supported")
    head_dim = getattr(module, "head_dim", width // heads)
    if head_dim != width // heads:
        raise ValueError(f"{path} has head_dim={head_dim!r}; {width // heads} is supported ({width} / {heads} heads)")
    scale = getattr(module, "scale", None)
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise ValueError(f"{path} has scale={scale!r}; a number is supported")
    return heads, head_dim**-0.5 if scale is None else float(scale)


def refuse_mixed(sources: Mapping[str, tuple[Source, ...]]) -> None:
    """Refuse parameters without data, of several dtypes, or on several devices."""
    first: torch.Tensor | None = None
    for name, found in sources.items():
        for owner, attribute in found:
            tensor = owner._parameters.get(attribute)
            if tensor is None:
                raise ValueError(f"{name}: {kind_of(owner)}.{attribute} is no plain parameter")
            if tensor.is_meta:
                raise ValueError(f"{name} is on the meta device, without data; load the weights first")
            if not tensor.is_floating_point():
                raise ValueError(f"{name} holds {tensor.dtype}; floating-point parameters are supported")
            first = tensor if first is None else first
            if (tensor.dtype, tensor.device) != (first.dtype, first.device):
                raise ValueError(
                    f"tok_emb is {first.dtype} on {first.device} and {name} is {tensor.dtype} on {tensor.device}; "
                    "one dtype and one device for the whole module are supported"
                )
