"""A live ``nn.Module`` of the course's shape, or of the book's ("Build a Large Language Model (From Scratch)").

Structure and names say what a module is; they cannot say what its own ``forward`` does with them. Whoever runs the
result in its place has to compare the two once.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from engine.checkpoints.activations import identify_activation
from engine.checkpoints.canonical import canonical_shapes
from engine.checkpoints.live_checks import (
    Source,
    attention_scale,
    linear,
    norm_parts,
    parts,
    refuse_hooks,
    refuse_mixed,
    refuse_wrapped,
    table,
)
from engine.checkpoints.tensors import share_memory
from engine.config import ModelConfig

__all__ = ["Recognised", "Source", "canonical_weights", "recognise", "refuse_hooks"]


@dataclass(frozen=True, slots=True)
class Recognised:
    """What ``recognise`` found.

    Args:
        config: the architecture.
        description: one line for people.
        sources: canonical name -> where its parameters are, in order: one, three for ``qkv`` (to concatenate), none
            for a bias that the module does not have (zeros). ``tok_emb`` comes first. A tied head has its own source.
    """

    config: ModelConfig
    description: str
    sources: Mapping[str, tuple[Source, ...]]


def recognise(module: nn.Module) -> Recognised:
    """What model this is, and where its parameters are.

    Raises:
        ValueError: it is not of a supported shape; the class, the submodule and what is supported are named.
    """
    name = type(module).__qualname__
    refuse_wrapped(module)
    root = parts(module, name, ("tok_emb", "pos_emb", "trf_blocks", "final_norm", "out_head"))
    blocks = list(parts(root["trf_blocks"], "trf_blocks", None).values())
    if not blocks:
        raise ValueError(f"{name}.trf_blocks is empty; at least one block is needed")
    for path, child in module.named_modules():
        if path:
            refuse_hooks(child, path)
    sources: dict[str, tuple[Source, ...]] = {}
    sources["tok_emb"] = table(root["tok_emb"], "tok_emb")
    sources["pos_emb"] = table(root["pos_emb"], "pos_emb")
    traits = [_block(block, i, sources) for i, block in enumerate(blocks)]
    final_eps = _norm(root["final_norm"], "final_norm", "final_norm", sources)
    sources["head"], head_bias = linear(root["out_head"], "out_head")
    if head_bias:
        raise ValueError("out_head has a bias; a head without one is supported (nn.Linear(..., bias=False))")
    refuse_mixed(sources)
    config = _config(sources, traits, final_eps)
    return Recognised(config, _describe(module, config, sources), sources)


@dataclass(frozen=True, slots=True)
class _Traits:
    """What has to be the same in every block, and the attention's scale, which may differ."""

    shape: tuple[tuple[int, ...], ...]
    n_heads: int
    activation: str
    eps: float
    scale: float


def _norm(module: nn.Module, path: str, canonical: str, sources: dict[str, tuple[Source, ...]]) -> float:
    eps, weight, bias = norm_parts(module, path)
    sources[f"{canonical}.weight"], sources[f"{canonical}.bias"] = weight, bias
    return eps


def _block(block: nn.Module, i: int, sources: dict[str, tuple[Source, ...]]) -> _Traits:
    """Enter the sources of block ``i`` and return its traits."""
    path, ours = f"trf_blocks.{i}", f"blocks.{i}"
    children = parts(block, path, ("att", "ff", "norm1", "norm2"))
    att = parts(children["att"], f"{path}.att", ("W_query", "W_key", "W_value", "out_proj"))
    ff = parts(children["ff"], f"{path}.ff", ("layers",))
    layers = parts(ff["layers"], f"{path}.ff.layers", None)
    if list(layers) != ["0", "1", "2"]:
        kinds = ", ".join(type(layer).__qualname__ for layer in layers.values())
        raise ValueError(f"{path}.ff.layers holds [{kinds}]; supported is [Linear, activation, Linear]")
    eps1 = _norm(children["norm1"], f"{path}.norm1", f"{ours}.norm1", sources)
    qkv = [linear(att[name], f"{path}.att.{name}") for name in ("W_query", "W_key", "W_value")]
    if len({len(bias) for _, bias in qkv}) > 1:
        raise ValueError(f"{path}.att: W_query, W_key and W_value must all have a bias, or none of them")
    sources[f"{ours}.qkv.weight"] = tuple(source for weight, _ in qkv for source in weight)
    sources[f"{ours}.qkv.bias"] = tuple(source for _, bias in qkv for source in bias)
    sources[f"{ours}.proj.weight"], sources[f"{ours}.proj.bias"] = linear(att["out_proj"], f"{path}.att.out_proj")
    eps2 = _norm(children["norm2"], f"{path}.norm2", f"{ours}.norm2", sources)
    if eps1 != eps2:
        raise ValueError(f"{path}: norm1 has eps {eps1} and norm2 {eps2}; one value for all is supported")
    for index, name in (("0", "fc"), ("2", "fc2")):
        found = linear(layers[index], f"{path}.ff.layers.{index}")
        sources[f"{ours}.{name}.weight"], sources[f"{ours}.{name}.bias"] = found
    names = [name for name in sources if name.startswith(f"{ours}.")]
    shape = tuple(tuple(_read(source).shape) for name in names for source in sources[name])
    n_heads, scale = attention_scale(children["att"], f"{path}.att", _read(qkv[0][0][0]).shape[0])
    activation = identify_activation(layers["1"], f"{path}.ff.layers.1")
    return _Traits(shape, n_heads, activation, eps1, scale)


def _config(sources: Mapping[str, tuple[Source, ...]], traits: list[_Traits], final_eps: float) -> ModelConfig:
    first = traits[0]
    for i, other in enumerate(traits):
        for trait in ("shape", "n_heads", "activation", "eps"):
            a, b = getattr(first, trait), getattr(other, trait)
            if a != b:
                raise ValueError(f"trf_blocks.0 has {trait} {a} and trf_blocks.{i} has {b}; all must be alike")
    if final_eps != first.eps:
        raise ValueError(f"final_norm has eps {final_eps} and the blocks {first.eps}; one value for all is supported")
    vocab_size, width = _read(sources["tok_emb"][0]).shape
    hidden = _read(sources["blocks.0.fc.weight"][0]).shape[0]
    config = ModelConfig(
        vocab_size=vocab_size,
        context_length=_read(sources["pos_emb"][0]).shape[0],
        embed_dim=width,
        n_heads=first.n_heads,
        n_layers=len(traits),
        hidden_dim=hidden,
        activation=first.activation,
        norm_eps=first.eps,
        attn_scales=tuple(trait.scale for trait in traits),
        tied_head=share_memory(_read(sources["tok_emb"][0]), _read(sources["head"][0])),
    )
    _check_shapes(config, sources)
    return config


def _check_shapes(config: ModelConfig, sources: Mapping[str, tuple[Source, ...]]) -> None:
    shapes = canonical_shapes(config)
    for name, found in sources.items():
        rows, *columns = shapes[name]
        for source in found:
            expected = [rows // len(found), *columns]
            if list(_read(source).shape) != expected:
                kind = type(source[0]).__qualname__
                raise ValueError(
                    f"{name}: the {source[1]} of its {kind} has shape {list(_read(source).shape)}, expected {expected}"
                )


def _describe(module: nn.Module, config: ModelConfig, sources: Mapping[str, tuple[Source, ...]]) -> str:
    weight = _read(sources["tok_emb"][0])
    return (
        f"{type(module).__qualname__}: {config.n_layers} layers, {config.n_heads} heads of {config.head_dim}, "
        f"vocabulary {config.vocab_size}, context {config.context_length}, {config.activation}, "
        f"{'tied' if config.tied_head else 'own'} head, {str(weight.dtype).removeprefix('torch.')} on {weight.device}"
    )


def _read(source: Source) -> torch.Tensor:
    """The parameter that is there now."""
    owner, name = source
    parameter = owner._parameters.get(name)
    if parameter is None:
        raise ValueError(f"{type(owner).__qualname__} has lost its parameter {name} since the module was recognised")
    return parameter.detach()


def canonical_weights(recognised: Recognised) -> dict[str, torch.Tensor]:
    """The canonical tensors as they are now, detached.

    Only ``qkv`` and zero biases are new memory; the rest are the module's own parameters. With a tied head, ``head``
    is the very tensor ``tok_emb``.

    Raises:
        ValueError: a parameter is gone, or a tied head no longer is.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, sources in recognised.sources.items():
        tensors = [_read(source) for source in sources]
        if tensors:
            weights[name] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        else:  # a bias that is not there, after its weight
            weight = weights[name.removesuffix("bias") + "weight"]
            weights[name] = weight.new_zeros(weight.shape[0])
    if recognised.config.tied_head:
        if not share_memory(weights["tok_emb"], weights["head"]):
            raise ValueError("the head was tied to the token embedding when the module was recognised, and is not now")
        weights["head"] = weights["tok_emb"]
    return weights
