"""What the command lines share: options derived from the dataclasses, and errors that say what to type."""

import argparse
import dataclasses
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from engine.config import EngineConfig

_SUGGESTIONS = (
    (
        "config=",
        "to give what the checkpoint does not say:\n    {command} --config '{{\"n_heads\": 12}}' ...",
    ),
    ("context_overflow", "to use the last tokens only:\n    {command} --context-overflow slide ..."),
    ("tokenizer", "to name a tokenizer (gpt2, a folder, or a .tiktoken file):\n    {command} --tokenizer gpt2 ..."),
    ("kv_cache_memory_bytes", "{command} --max-model-len 256 --max-num-seqs 8 ..."),
    ("backend", "to see what this machine has:\n    python -m engine.doctor"),
)


def documented(cls: type) -> dict[str, str]:
    """Name -> help text, from the ``Args`` section of a dataclass's docstring."""
    text = inspect.getdoc(cls) or ""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.DOTALL | re.MULTILINE)
    entries = re.findall(
        r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section.group(1) if section else "", re.DOTALL | re.MULTILINE
    )
    return {name: " ".join(words.split()) for name, words in entries}


def add_fields(parser: Any, cls: type, names: Sequence[str] | None = None) -> None:
    """Add an option for each field of a dataclass (or for those named), with its type, default and help."""
    hints, texts = typing.get_type_hints(cls), documented(cls)
    for field in dataclasses.fields(cls):
        if names is not None and field.name not in names:
            continue
        flag, text = "--" + field.name.replace("_", "-"), texts[field.name].replace("%", "%%")
        hint = hints[field.name]
        if hint is bool:
            parser.add_argument(flag, action="store_true", help=text)
            continue
        if isinstance(hint, types.UnionType):
            hint = next(option for option in typing.get_args(hint) if option is not type(None))
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else None
        shown = "" if field.default is None else " (default: %(default)s)"
        kind = str if choices else hint
        parser.add_argument(flag, type=kind, default=field.default, choices=choices, help=text + shown, metavar=None)


def chosen(args: argparse.Namespace, cls: type, names: Sequence[str] | None = None) -> dict[str, Any]:
    """The values that ``args`` has for the fields of a dataclass (or for those named)."""
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(cls) if names is None or f.name in names}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which model to load and how to run it."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="a checkpoint file or folder, or a hub name (default: the demo model)")
    model.add_argument("--config", help="a JSON file, or JSON, with what the checkpoint does not say (n_heads)")
    model.add_argument("--tokenizer", help="gpt2, a folder, or a .tiktoken file (default: the model's own)")
    add_fields(parser.add_argument_group("engine"), EngineConfig)


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of ``LLM`` that ``add_model_options`` took."""
    config = args.config
    if config is not None and config.lstrip().startswith("{"):
        try:
            config = json.loads(config)
        except json.JSONDecodeError as error:
            raise ValueError(f"--config is not JSON: {error}") from error
    return {"model": args.model, "config": config, "tokenizer": args.tokenizer, **chosen(args, EngineConfig)}


def run(command: str, main: Callable[[], None]) -> None:
    """Run a command; what goes wrong is one message with the line to type, and an exit status, not a traceback."""
    try:
        main()
    except (ValueError, TypeError, OSError, ImportError) as error:
        message = str(error) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        hint = next((text for word, text in _SUGGESTIONS if word in message), "{command} --help")
        print(f"try: {hint.format(command=command)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
