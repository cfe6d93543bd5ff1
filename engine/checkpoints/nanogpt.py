"""nanoGPT's ``ckpt.pt``: ``model_args`` beside ``model``, GPT-2's names, linear weights [out, in].

nanoGPT applied the tanh GELU until it took ``nn.GELU()``, the exact one, in 2023. The checkpoint does not say which.
Versions that wrote no ``bias`` into ``model_args`` were all of the first kind; otherwise the exact one is taken. Either
is said in a note, and ``config={"activation": "gelu_tanh"}`` overrides it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.checkpoints.activations import activation_named
from engine.checkpoints.canonical import Checkpoint
from engine.checkpoints.gpt2_names import HEAD, bare_names, to_canonical
from engine.checkpoints.tensors import count_layers, share_memory
from engine.config import ModelConfig

SIZES = {"vocab_size": "wte.weight", "block_size": "wpe.weight"}  # rows of these tensors
KNOWN = ("vocab_size", "block_size", "n_embd", "n_layer", "n_head", "bias", "dropout", "activation")


def looks_like_nanogpt(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether GPT-2's names are there with linear weights [out, in]."""
    weight = bare_names(tensors).get("h.0.attn.c_attn.weight")
    return weight is not None and weight.dim() == 2 and weight.shape[0] == 3 * weight.shape[1]


def _settings(path: Path, model_args: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """``model_args`` with the user's ``config`` over them, every key known or without effect."""
    strange = sorted(set(config) - set(KNOWN) - {key for key in config if config[key] is None and key in model_args})
    if strange:
        raise ValueError(f"config has unknown keys {', '.join(strange)}; for nanoGPT: {', '.join(KNOWN)}")
    for key in config.keys() & model_args.keys() - {"activation", "dropout"}:
        if key in KNOWN and config[key] != model_args[key]:
            raise ValueError(f"{path}: model_args has {key}={model_args[key]!r} and config has {key}={config[key]!r}")
    settings = {**model_args, **config}
    for key in sorted(settings.keys() - set(KNOWN)):
        if settings[key]:  # False, 0 and None are how such switches are off
            raise ValueError(
                f"{path}: model_args has {key}={settings[key]!r}, which nanoGPT does not have and this engine does "
                f'not know; if it changes nothing in the model, pass config={{"{key}": None}}'
            )
    return settings


def _sizes(path: Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that the tensors show, checked against what is said about them."""
    for name in ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight"):
        if name not in tensors or tensors[name].dim() != 2:
            raise ValueError(f"{path} lacks {name}, or it is not a matrix: it is no whole nanoGPT checkpoint")
    found = {key: tensors[name].shape[0] for key, name in SIZES.items()}
    found |= {"n_embd": tensors["wte.weight"].shape[1], "n_layer": count_layers(tensors, "h.")}
    for key, value in found.items():
        if settings.get(key, value) != value:
            raise ValueError(f"{path}: its settings say {key}={settings[key]!r}, its tensors say {value}")
    if "n_head" not in settings:
        raise ValueError(f'{path} does not say n_head; pass config={{"n_head": ...}}')
    return found


def _activation(settings: Mapping[str, Any], model_args: Mapping[str, Any]) -> tuple[str, str]:
    """The activation, and the note that says why."""
    if settings.get("activation") is not None:
        return activation_named(settings["activation"], "activation"), ""
    if model_args and "bias" not in model_args:
        name, reason = "gelu_tanh", "as nanoGPT had it while model_args held no bias"
    else:
        name, reason = "gelu", "nn.GELU(), as nanoGPT has it since mid-2023 (before: gelu_tanh)"
    return name, f'activation {name}: {reason}; config={{"activation": ...}} overrides it'


def load_nanogpt(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    model_args: Mapping[str, Any],
    config: Mapping[str, Any],
    notes: tuple[str, ...],
) -> Checkpoint:
    """A nanoGPT checkpoint.

    Args:
        path: the file, for messages.
        tensors: its state_dict.
        model_args: what was saved beside it, perhaps empty.
        config: the user's ``config=``; it adds what is missing, and may override ``activation``.
        notes: notes so far.

    Raises:
        ValueError: a setting is unknown or contradicts the tensors, ``n_head`` is nowhere, or a tensor is missing,
            left over or misshapen.
    """
    settings = _settings(path, model_args, config)
    bare = bare_names(tensors)
    found = _sizes(path, bare, settings)
    bias = "ln_f.bias" in bare
    if "bias" in settings and bool(settings["bias"]) != bias:
        raise ValueError(f"{path}: its settings say bias={settings['bias']!r}, its tensors say bias={bias}")
    activation, note = _activation(settings, model_args)
    tied = HEAD not in bare or share_memory(bare[HEAD], bare["wte.weight"])
    model = ModelConfig(
        vocab_size=found["vocab_size"],
        context_length=found["block_size"],
        embed_dim=found["n_embd"],
        n_heads=settings["n_head"],
        n_layers=found["n_layer"],
        hidden_dim=bare["h.0.mlp.c_fc.weight"].shape[0],
        activation=activation,
        tied_head=tied,
    )
    weights = to_canonical(str(path), model, bare, conv1d=False, bias=bias)
    return Checkpoint(model, weights, f"nanoGPT checkpoint {path}", notes=(*notes, *filter(None, (note,))))
