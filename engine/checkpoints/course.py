"""A state_dict of the course's ``GPTModel``, or of the book classes that it descends from.

Everything that shapes show is taken from them and checked against the config; ``n_heads`` they do not show, so it has
to be said. The activation and the norms' epsilon are not in a state_dict either: a default decides, and a note says so.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.checkpoints.activations import activation_named
from engine.checkpoints.canonical import Checkpoint
from engine.checkpoints.tensors import bias_or_zeros, check_tensors, count_layers, share_memory, strip_prefixes
from engine.config import ModelConfig

LINEARS = {"att.out_proj": "proj", "ff.layers.0": "fc", "ff.layers.2": "fc2"}
QKV = ("att.W_query", "att.W_key", "att.W_value")
TABLES = ("tok_emb.weight", "pos_emb.weight", "ff.layers.0.weight")
DERIVED = ("vocab_size", "context_length", "embed_dim", "n_layers", "hidden_dim", "qkv_bias")
SAID = ("n_heads", "activation", "norm_eps", "attn_scale", "tie_weights", "drop_rate")
DEFAULTS: dict[str, Any] = {"activation": "gelu_tanh", "norm_eps": 1e-5}


def looks_like_course(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether these are the course's names."""
    return any(name.startswith("trf_blocks.") for name in strip_prefixes(tensors))


def _derived(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What the tensors show of the config."""
    first = {name: f"trf_blocks.0.{name}" if name.startswith("ff") else name for name in TABLES}
    for name in first.values():
        if name not in tensors or tensors[name].dim() != 2:
            raise ValueError(f"{path} lacks {name}, or it is not a matrix: it is no whole checkpoint of this form")
    vocab_size, embed_dim = tensors[first["tok_emb.weight"]].shape
    return {
        "vocab_size": vocab_size,
        "context_length": tensors[first["pos_emb.weight"]].shape[0],
        "embed_dim": embed_dim,
        "n_layers": count_layers(tensors, "trf_blocks."),
        "hidden_dim": tensors[first["ff.layers.0.weight"]].shape[0],
        "qkv_bias": any(f"trf_blocks.0.{name}.bias" in tensors for name in QKV),
    }


def _one_name(config: Mapping[str, Any], who: str) -> dict[str, Any]:
    """``config`` with ``emb_dim`` renamed to ``embed_dim``."""
    full = dict(config)
    if "emb_dim" in full:
        value = full.pop("emb_dim")
        if full.setdefault("embed_dim", value) != value:
            raise ValueError(f"{who} has embed_dim={full['embed_dim']!r} and emb_dim={value!r}; give one")
    return full


def _settings(
    path: Path, derived: Mapping[str, Any], saved: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """All that is known of the model: what was said agrees with itself and with the tensors. And notes."""
    saved = _one_name(saved, f"the config saved with {path}")
    config = {key: value for key, value in _one_name(config, "config").items() if value is not None}
    strange = sorted(config.keys() - {*DERIVED, *SAID})
    if strange:
        known = ", ".join((*DERIVED, *SAID))
        raise ValueError(f"config has unknown keys {', '.join(strange)}; known: {known} (or emb_dim for embed_dim)")
    settings = {key: value for key, value in saved.items() if key in (*DERIVED, *SAID) and value is not None}
    notes: tuple[str, ...] = ()
    if unused := sorted(saved.keys() - {*DERIVED, *SAID}):
        notes = (f"keys of the saved config that were not used: {', '.join(unused)}",)
    for key, value in config.items():
        if key != "drop_rate" and settings.setdefault(key, value) != value:
            raise ValueError(f"config has {key}={value!r} and the config saved with {path} has {key}={settings[key]!r}")
    for key, value in derived.items():
        if settings.get(key) is not None and settings[key] != value:
            raise ValueError(f"config has {key}={settings[key]!r}, the tensors in {path} say {key}={value!r}")
    if settings.get("n_heads") is None:
        raise ValueError(
            f"{path} holds tensors only, and n_heads cannot be seen in them; "
            f'pass config={{"n_heads": ...}} (embed_dim is {derived["embed_dim"]})'
        )
    defaults = {key: value for key, value in DEFAULTS.items() if settings.get(key) is None}
    if defaults:
        said = ", ".join(f"{key}={value!r}" for key, value in defaults.items())
        notes += (f"not in the checkpoint, by default {said}; config= overrides it",)
    return {**settings, **defaults, **derived}, notes


def _scales(value: Any, n_layers: int) -> tuple[float, ...]:
    """``attn_scale`` of a config, a factor or one for each layer, as ``ModelConfig.attn_scales``."""
    if value is None:
        return ()
    values = list(value) if isinstance(value, list | tuple) else [value] * n_layers
    if not values or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise ValueError(f"attn_scale must be a number, or one for each layer, got {value!r}")
    return tuple(float(v) for v in values)


def _is_tied(path: Path, tensors: Mapping[str, torch.Tensor], said: Any) -> bool:
    embedding, head = tensors["tok_emb.weight"], tensors.get("out_head.weight")
    if head is None:
        if not said:
            raise ValueError(
                f"{path}: out_head.weight is missing, expected shape {list(embedding.shape)}; "
                'if the head is the token embedding, pass config={"tie_weights": True}'
            )
        return True
    if share_memory(embedding, head):
        return True
    if said and not torch.equal(embedding, head):
        raise ValueError(f"config has tie_weights={said!r}, but in {path} out_head.weight differs from tok_emb.weight")
    return bool(said)


def _norm_names(tensors: Mapping[str, torch.Tensor]) -> tuple[str, str]:
    """The norms' parameters: the course's own LayerNorm, or ``nn.LayerNorm``."""
    return ("weight", "bias") if "final_norm.weight" in tensors else ("scale", "shift")


def _expected(model: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape; a linear has a bias in every layer if it has one in the first, a norm a shift likewise."""
    width, hidden = model.embed_dim, model.hidden_dim
    sizes = dict.fromkeys((*QKV, "att.out_proj"), (width, width))
    sizes |= {"ff.layers.0": (hidden, width), "ff.layers.2": (width, hidden)}
    scale, shift = _norm_names(tensors)
    norms = [f"final_norm.{scale}"] + [f"final_norm.{shift}"] * (scale == "scale" or "final_norm.bias" in tensors)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(norms, (width,))
    shapes |= {"tok_emb.weight": (model.vocab_size, width), "pos_emb.weight": (model.context_length, width)}
    if "out_head.weight" in tensors or not model.tied_head:
        shapes["out_head.weight"] = (model.vocab_size, width)
    qkv_bias = any(f"trf_blocks.0.{name}.bias" in tensors for name in QKV)
    for i in range(model.n_layers):
        for norm in ("norm1", "norm2"):
            shapes |= {f"trf_blocks.{i}.{norm}.{name.split('.')[1]}": (width,) for name in norms}
        for name, size in sizes.items():
            shapes[f"trf_blocks.{i}.{name}.weight"] = size
            if qkv_bias if name in QKV else f"trf_blocks.0.{name}.bias" in tensors:
                shapes[f"trf_blocks.{i}.{name}.bias"] = size[:1]
    return shapes


def _to_canonical(model: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    scale, shift = _norm_names(tensors)
    weights = {"tok_emb": tensors["tok_emb.weight"], "pos_emb": tensors["pos_emb.weight"]}

    def norm(theirs: str, ours: str) -> None:
        weights[f"{ours}.weight"] = weight = tensors[f"{theirs}.{scale}"]
        weights[f"{ours}.bias"] = bias_or_zeros(tensors.get(f"{theirs}.{shift}"), weight, weight.shape[0])

    norm("final_norm", "final_norm")
    for i in range(model.n_layers):
        theirs, ours = f"trf_blocks.{i}", f"blocks.{i}"
        norm(f"{theirs}.norm1", f"{ours}.norm1")
        norm(f"{theirs}.norm2", f"{ours}.norm2")
        weights[f"{ours}.qkv.weight"] = qkv = torch.cat([tensors[f"{theirs}.{name}.weight"] for name in QKV])
        biases = [tensors[f"{theirs}.{name}.bias"] for name in QKV if f"{theirs}.{name}.bias" in tensors]
        weights[f"{ours}.qkv.bias"] = bias_or_zeros(torch.cat(biases) if biases else None, qkv, qkv.shape[0])
        for name, canonical in LINEARS.items():
            weights[f"{ours}.{canonical}.weight"] = weight = tensors[f"{theirs}.{name}.weight"]
            bias = tensors.get(f"{theirs}.{name}.bias")
            weights[f"{ours}.{canonical}.bias"] = bias_or_zeros(bias, weight, weight.shape[0])
    weights["head"] = weights["tok_emb"] if model.tied_head else tensors["out_head.weight"]
    return weights


def load_course(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    saved: Mapping[str, Any],
    config: Mapping[str, Any],
    notes: tuple[str, ...],
) -> Checkpoint:
    """A state_dict in the course's form.

    Args:
        path: the file, for messages.
        tensors: its state_dict.
        saved: a config saved with it, perhaps empty; its other keys are named in a note.
        config: the user's ``config=``, in ``GPTModel``'s keys; an unknown key is refused.
        notes: notes so far.

    Raises:
        ValueError: ``n_heads`` is nowhere, something said contradicts the tensors, or a tensor is missing, left over
            or misshapen.
    """
    tensors = {name: t for name, t in strip_prefixes(tensors).items() if not name.endswith(".att.mask")}
    settings, more = _settings(path, _derived(path, tensors), saved, config)
    model = ModelConfig(
        **{key: settings[key] for key in ("vocab_size", "context_length", "embed_dim", "n_heads", "n_layers")},
        hidden_dim=settings["hidden_dim"],
        activation=activation_named(settings["activation"], "activation"),
        norm_eps=float(settings["norm_eps"]),
        attn_scales=_scales(settings.get("attn_scale"), settings["n_layers"]),
        tied_head=_is_tied(path, tensors, settings.get("tie_weights")),
    )
    check_tensors(str(path), tensors, _expected(model, tensors))
    weights = _to_canonical(model, tensors)
    return Checkpoint(model, weights, f"state_dict of the course's GPTModel, {path}", notes=(*notes, *more))
