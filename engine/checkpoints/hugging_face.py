"""Hugging Face's GPT-2 family: a folder with ``config.json`` and safetensors or ``pytorch_model.bin``, sharded or not.

distilgpt2, gpt2 to gpt2-xl, DialoGPT, Cerebras-GPT and CodeParrot are of this form.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.checkpoints.canonical import Checkpoint
from engine.checkpoints.gpt2_config import (
    ALIASES,
    DEFAULTS,
    HARMLESS,
    REFUSED_UNLESS,
    end_of_text_id,
    read_gpt2_config,
)
from engine.checkpoints.gpt2_names import bare_names, is_mask_buffer, to_canonical
from engine.checkpoints.pickled import find_tensors, read_pickled
from engine.checkpoints.safe_tensors import read_safetensors
from engine.files import read_json_object

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"


def _read_one(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path, keep=lambda name: not is_mask_buffer(name))
    content, _ = read_pickled(path)
    return find_tensors(path, content)[0]


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    """The tensors of the shards that ``index`` lists; each file is opened once."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map, so it does not say which files hold the weights")
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        path = index.parent / shard
        if Path(shard).name != shard or not path.is_file():
            raise ValueError(f"{index} lists the file {shard}, which is not in {index.parent}")
        tensors.update(_read_one(path))
    lost = sorted(name for name in weight_map if name not in tensors and not is_mask_buffer(name))
    if lost:
        raise ValueError(f"{index} lists tensors that its files do not hold: {', '.join(lost[:12])}")
    return tensors


def read_weights(folder: Path) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of a folder and the name of the file that they came from; safetensors first.

    Raises:
        ValueError: there is no file of weights, or one is missing, truncated or corrupt.
    """
    for name in (SAFETENSORS, PICKLED):
        if (folder / name).is_file():
            return _read_one(folder / name), name
        if (folder / f"{name}.index.json").is_file():
            return _read_shards(folder / f"{name}.index.json"), f"{name}.index.json"
    raise ValueError(f"{folder} has a config.json but no weights: expected {SAFETENSORS} or {PICKLED}, or their shards")


def merged_config(fields: Mapping[str, Any], config: Mapping[str, Any] | None) -> dict[str, Any]:
    """``fields`` with the user's ``config`` over them.

    Raises:
        ValueError: ``config`` has a key that no GPT-2 config has.
    """
    known = DEFAULTS.keys() | ALIASES.keys() | REFUSED_UNLESS.keys() | HARMLESS
    strange = sorted((config or {}).keys() - known)
    if strange:
        keys = ", ".join(DEFAULTS)
        raise ValueError(f"config has unknown keys {', '.join(strange)}; keys that count for a GPT-2 model: {keys}")
    over = dict(config or {})
    kept = {key: value for key, value in fields.items() if ALIASES.get(key) not in over}
    for alias, key in ALIASES.items():
        if alias in over:
            kept.pop(key, None)
    return {**kept, **over}


def load_folder(folder: Path, config: Mapping[str, Any] | None = None) -> Checkpoint:
    """The model in ``folder``; the user's ``config`` overrides fields of its ``config.json``.

    Raises:
        ValueError: something is missing, unsupported, misshapen or corrupt, by name.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(_no_config(folder))
    fields = merged_config(read_json_object(folder / "config.json"), config)
    if fields.get("eos_token_id") is None and (folder / "generation_config.json").is_file():
        fields["eos_token_id"] = read_json_object(folder / "generation_config.json").get("eos_token_id")
    read_gpt2_config(fields)  # what is not supported is said before gigabytes are opened
    tensors, name = read_weights(folder)
    return from_tensors(folder / name, tensors, fields, ())


def from_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], fields: Mapping[str, Any], notes: tuple[str, ...]
) -> Checkpoint:
    """A checkpoint from tensors under Hugging Face's names and the fields of its config.

    Raises:
        ValueError: a field is not supported, or a tensor is missing, left over or misshapen.
    """
    model, more = read_gpt2_config(fields)
    eos_token_id, eos_notes = end_of_text_id(fields, model.vocab_size)
    weights = to_canonical(str(path), model, bare_names(tensors), conv1d=True, bias=True)
    return Checkpoint(
        model,
        weights,
        f"Hugging Face GPT-2 checkpoint {path}",
        folder=path.parent,
        eos_token_id=eos_token_id,
        notes=(*notes, *more, *eos_notes),
    )


def _no_config(folder: Path) -> str:
    text = f"{folder} has no config.json, so it is not a Hugging Face folder"
    suffixes = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
    files = sorted(path.name for path in folder.iterdir() if path.suffix in suffixes)
    if files:
        text += f"; to load a file in it, give its path: {folder / files[0]}"
    return text
