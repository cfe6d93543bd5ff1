"""Configurations that come with a checkpoint: a mapping, a JSON file, or an inert stub of a config object."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.checkpoints.pickled import Stub
from engine.files import read_json_object

SAVED_CONFIG_KEYS = ("config", "model_config", "cfg", "model_cfg", "gpt_config", "args", "model_args", "hparams")


def read_config(config: Mapping[str, Any] | str | os.PathLike[str] | None) -> dict[str, Any] | None:
    """What the user passed as ``config=``: a mapping, or the path of a JSON file.

    Raises:
        ValueError: it is something else, or the file cannot be read.
    """
    if config is None:
        return None
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, str | os.PathLike):
        return read_json_object(Path(config))
    raise ValueError(f"config must be a mapping or the path of a JSON file, got a {type(config).__qualname__}")


def as_mapping(value: Any) -> dict[str, Any] | None:
    """A saved config as a dictionary, if it is a dictionary or a stub with attributes."""
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if isinstance(value, Stub) and vars(value):
        return dict(vars(value))
    return None


def saved_config(rest: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The first config saved beside a state_dict: the key it is under, and its content."""
    for key in SAVED_CONFIG_KEYS:
        content = as_mapping(rest.get(key))
        if content:
            return key, content
    return None


def ignored_note(rest: Mapping[str, Any], used: str | None) -> tuple[str, ...]:
    """A note that names what else a checkpoint holds and this engine does not read."""
    others = sorted(str(key) for key in rest if key != used)
    return (f"also in the file, not read: {', '.join(others)}",) if others else ()
