"""What the command lines share: options derived from the dataclasses, and errors that say what to type."""

import argparse
import dataclasses
import inspect
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from engine.config import EngineConfig

_BROKEN_PIPE = 141  # 128 and the number of SIGPIPE: what a shell reports of a program that the signal ended
_DOCTOR = "to see what this machine has:\n    python -m engine.doctor"
_SUGGESTIONS = (
    (
        "its own tokenizer",
        "without --tokenizer, which takes the one beside the checkpoint, or with its folder:\n"
        "    {command} --tokenizer path/to/folder ...",
    ),
    (
        "config=",
        "to give what the checkpoint does not say:\n    {command} --config '{{\"n_heads\": 12}}' ...",
    ),
    ("context_overflow", "to use the last tokens only:\n    {command} --context-overflow slide ..."),
    ("tokenizer", "to name a tokenizer (gpt2, a folder, or a .tiktoken file):\n    {command} --tokenizer gpt2 ..."),
    ("kv_cache_memory_bytes", "{command} --max-model-len 256 --max-num-seqs 8 ..."),
    ("backend", _DOCTOR),
    ("device", _DOCTOR),
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
    """Add an option for each field of a dataclass (or for those named), with its type, default and help.

    A field that may be a sequence is an option that can be given several times; a number that may be None takes "none".
    """
    hints, texts = typing.get_type_hints(cls), documented(cls)
    for field in dataclasses.fields(cls):
        if names is not None and field.name not in names:
            continue
        flag, text = "--" + field.name.replace("_", "-"), texts[field.name].replace("%", "%%")
        taken = _taken(hints[field.name])
        if taken.get("action") == "append":
            text += " (can be given several times)"
        elif taken.get("action") is None and field.default is not None:
            text += " (default: %(default)s)"
        parser.add_argument(flag, default=field.default, help=text, **taken)


def _taken(hint: Any) -> dict[str, Any]:
    """What ``add_argument`` needs to take values of a type."""
    if hint is bool:
        return {"action": "store_true"}
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": typing.get_args(hint)}
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        if typing.get_origin(kind) is Sequence:
            return {"action": "append", "type": typing.get_args(kind)[0]}
    return {"type": _or_none(kinds[0]) if type(None) in kinds and kinds[0] is not str else kinds[0]}


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = f"{kind.__name__} or none"  # argparse says: invalid int or none value: 'x'
    return read


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


def writable(text: str) -> Path:
    """An argument's path, once it is known that it can be written: a file there keeps its content, none is left.

    Raises:
        ArgumentTypeError: it cannot be written, and why.
    """
    path = Path(os.path.realpath(text))
    new = not os.path.exists(path)
    try:
        if new or path.is_file() or path.is_dir():  # a pipe's reader would take the closing for its end
            path.open("ab").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {error.strerror}") from error
    if new:
        path.unlink()
    return Path(text)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # for run, in place of rich's exit with 1


def console() -> Console:
    """Standard output for tables and styles."""
    return _Console(file=sys.stdout, soft_wrap=True)


def run(command: str, main: Callable[[], None]) -> None:
    """Run a command; what goes wrong is one message with the line to type, and an exit status, not a traceback.

    Where nobody reads its output any more (``| head``) it ends without a word.
    """
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # while it can be caught
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # what is left in them is written when Python ends
            os.dup2(nowhere, stream.fileno())
        raise SystemExit(_BROKEN_PIPE) from None
    except (ValueError, TypeError, OSError, ImportError) as error:
        message = str(error) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        hint = next((text for word, text in _SUGGESTIONS if word in message), "{command} --help")
        print(f"try: {hint.format(command=command)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
