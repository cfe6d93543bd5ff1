"""Recognise a checkpoint, whatever its form, and load it."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.checkpoints import course, hub, hugging_face, live, nanogpt
from engine.checkpoints.canonical import Checkpoint, check_canonical
from engine.checkpoints.gpt2_names import bare_names
from engine.checkpoints.pickled import find_tensors, read_pickled
from engine.checkpoints.safe_tensors import read_safetensors
from engine.checkpoints.settings import as_mapping, ignored_note, read_config, saved_config
from engine.files import read_json_object

PICKLED_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

Config = Mapping[str, Any] | str | os.PathLike[str] | None


def load_checkpoint(
    source: str | os.PathLike[str] | torch.nn.Module, config: Config = None, revision: str | None = None
) -> Checkpoint:
    """Load a model of the GPT-2 family.

    Args:
        source: a live module of the course's or the book's form; a Hugging Face folder; a file: ``.pt``, ``.pth``,
            ``.bin``, ``.ckpt`` or ``.safetensors`` with tensors under the course's, nanoGPT's or Hugging Face's names;
            or a name on the Hugging Face hub, such as ``gpt2``.
        config: what the checkpoint does not say, as a mapping or a JSON file's path, in the keys of its own form.
        revision: a branch, tag or commit on the hub.

    Returns:
        The canonical tensors on the CPU (a live module's where they are), in their stored dtype. Those of files are
        memory-mapped: the file has to stay as it is while they are in use.

    Raises:
        ValueError: nothing is there, it cannot be read, is not supported, or does not fit; the message says which.
    """
    if isinstance(source, torch.nn.Module):
        return _live(source, config, revision)
    if not isinstance(source, str | os.PathLike):
        kind = type(source).__qualname__
        raise ValueError(f"a checkpoint is a path, a hub name or a torch.nn.Module, got a {kind}")
    given = read_config(config)
    path = Path(source).expanduser()
    if not path.exists() and _is_hub_name(source):
        checkpoint = hugging_face.load_folder(hub.download(str(source), revision), given)
    elif not path.exists():
        raise ValueError(f"{path} does not exist")
    elif revision is not None:
        raise ValueError(f"revision={revision!r} is for a name on the Hugging Face hub; {path} is here")
    elif path.is_dir():
        checkpoint = hugging_face.load_folder(path, given)
    else:
        checkpoint = _load_file(path, given)
    check_canonical(checkpoint.config, checkpoint.weights)
    return checkpoint


def _live(module: torch.nn.Module, config: Config, revision: str | None) -> Checkpoint:
    for name, value in (("config", config), ("revision", revision)):
        if value is not None:
            raise ValueError(f"{name}= is not used with a live module, which says everything itself; leave it out")
    recognised = live.recognise(module)
    live.refuse_hooks(module, type(module).__qualname__)
    return Checkpoint(recognised.config, live.canonical_weights(recognised), f"live {recognised.description}")


def _is_hub_name(source: str | os.PathLike[str]) -> bool:
    suffixes = (*PICKLED_SUFFIXES, ".safetensors")
    return isinstance(source, str) and HUB_NAME.fullmatch(source) is not None and not source.endswith(suffixes)


def _load_file(path: Path, config: dict[str, Any] | None) -> Checkpoint:
    notes: tuple[str, ...] = ()
    rest: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        tensors = read_safetensors(path)
    elif path.suffix in PICKLED_SUFFIXES:
        content, stubs = read_pickled(path)
        tensors, rest = find_tensors(path, content)
        if stubs:
            notes = (f"read as inert data, their code not imported: {', '.join(stubs)}",)
    else:
        accepted = ", ".join((*PICKLED_SUFFIXES, ".safetensors"))
        raise ValueError(f"{path} is no checkpoint by its name; accepted: a folder, or a file ending in {accepted}")
    return _by_names(path, tensors, rest, config, notes)


def _by_names(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    rest: Mapping[str, Any],
    config: dict[str, Any] | None,
    notes: tuple[str, ...],
) -> Checkpoint:
    """The format is told by the tensors' names, and nanoGPT from Hugging Face by the linear weights' orientation."""
    if nanogpt.looks_like_nanogpt(tensors):
        model_args = as_mapping(rest.get("model_args")) or {}
        notes += ignored_note(rest, "model_args")
        return nanogpt.load_nanogpt(path, tensors, model_args, config or {}, notes)
    found = saved_config(rest)
    if found is None and (path.parent / "config.json").is_file() and not _says_enough(config):
        found = str(path.parent / "config.json"), read_json_object(path.parent / "config.json")
        notes += (f"configuration from {found[0]}",)
    saved = found[1] if found else {}
    notes += ignored_note(rest, found[0] if found else None)
    if course.looks_like_course(tensors):
        return course.load_course(path, tensors, saved, config or {}, notes)
    if "h.0.attn.c_attn.weight" in bare_names(tensors):
        fields = hugging_face.merged_config(saved, config)
        if "n_head" not in fields and "num_attention_heads" not in fields:
            raise ValueError(
                f"{path} holds tensors under Hugging Face's names and no configuration; put its config.json beside "
                "it, or pass config= (a mapping, or the path of the config.json)"
            )
        return hugging_face.from_tensors(path, tensors, fields, notes)
    names = ", ".join(sorted(tensors)[:6]) or "none at all"
    raise ValueError(
        f"{path} holds tensors under names that are not known ({names}); known are the course's (trf_blocks.0.att...), "
        "nanoGPT's (transformer.h.0...) and Hugging Face's GPT-2 (h.0.attn.c_attn...)"
    )


def _says_enough(config: Mapping[str, Any] | None) -> bool:
    return config is not None and ("n_heads" in config or "n_head" in config)
