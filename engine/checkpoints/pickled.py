"""Files of ``torch.save``, read without running anything that they name.

``torch.load(weights_only=True)`` builds tensors and plain containers only. A class or function that a file names
beside those becomes an inert stub of that name, which keeps what it is given and does nothing; the real one is never
imported. So a config that was saved as an object can still be read.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import serialization

SAVE_LINE = 'torch.save(model.state_dict(), "model.pth")'


class Stub:
    """An object of a class that was not imported: its attributes, and nothing else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__.update(kwargs)

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)  # with __slots__: (dict or None, dict of slots)
        for part in parts:
            if isinstance(part, dict):
                self.__dict__.update({str(key): value for key, value in part.items()})


def _stand_in(full_name: str) -> tuple[Any, str]:
    """What takes the place of the global ``full_name``, as ``torch.serialization.safe_globals`` wants it."""
    if full_name == "collections.defaultdict":
        return (lambda *_: {}), full_name
    module, _, name = full_name.rpartition(".")
    return type(name, (Stub,), {"__module__": module}), full_name


def _unreadable(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} cannot be read as a checkpoint: {reason}")


def _is_zip(path: Path) -> bool:
    """Whether the file has the form that torch.save writes since PyTorch 1.6."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise _unreadable(path, str(error)) from error
    if not start:
        raise _unreadable(path, "the file is empty")
    return start == b"PK\x03\x04"


def _unsafe_globals(path: Path) -> list[str]:
    """What a file of the zip form names beyond the harmless globals; nothing of it is imported."""
    try:
        return sorted(serialization.get_unsafe_globals_in_checkpoint(path))
    except ValueError as error:
        raise _unreadable(path, f"it is a TorchScript archive; save the weights alone with {SAVE_LINE}") from error
    except (RuntimeError, EOFError, AssertionError, IndexError, pickle.UnpicklingError) as error:
        raise _unreadable(path, f"it is truncated, corrupt, or no file of torch.save ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]


def read_pickled(path: Path) -> tuple[Any, tuple[str, ...]]:
    """The object in a file of ``torch.save``, and the names of the globals that were read as stubs.

    Tensors are on the CPU, memory-mapped where the file's format allows it (every torch since 1.6).

    Raises:
        ValueError: the file is empty, truncated, corrupt or not of ``torch.save``, names something that may not be
            read even as a stub, or holds a whole module instead of its tensors.
    """
    zipped = _is_zip(path)
    unsafe = _unsafe_globals(path) if zipped else []
    try:
        with serialization.safe_globals([_stand_in(name) for name in unsafe]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        reason = "it names code that is not run here, or is not a file of torch.save"
        raise _unreadable(path, f"{reason} ({_first_line(error)}); save the weights with {SAVE_LINE}") from error
    except (RuntimeError, EOFError, AttributeError, LookupError, TypeError, ValueError, AssertionError) as error:
        raise _unreadable(path, f"it is truncated, corrupt, or no file of torch.save ({_first_line(error)})") from error
    _refuse_module(path, content)
    return content, tuple(unsafe)


def _refuse_module(path: Path, content: Any) -> None:
    values = [content, *content.values()] if isinstance(content, Mapping) else [content]
    for value in values:
        if isinstance(value, Stub) and {"_modules", "_parameters"} <= vars(value).keys():
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise ValueError(
                f"{path} holds a whole pickled module ({kind}); loading it would run its code. "
                f"Where the class is at hand, save the weights alone: {SAVE_LINE}"
            )


def find_tensors(path: Path, content: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state_dict in what ``read_pickled`` returned, and the rest of the dictionary around it.

    It is the dictionary itself, or under ``model_state_dict``, ``state_dict`` or ``model``.

    Raises:
        ValueError: there is none, with what was found instead.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__qualname__}, not a state_dict; save one with {SAVE_LINE}")
    for key in ("model_state_dict", "state_dict", "model"):
        inner = content.get(key)
        if isinstance(inner, Mapping) and _all_tensors(inner):
            return dict(inner), {name: value for name, value in content.items() if name != key}
    if _all_tensors(content):
        return dict(content), {}
    keys = ", ".join(str(key) for key in list(content)[:12]) or "nothing"
    raise ValueError(
        f"{path} holds no state_dict, neither bare nor under model_state_dict, state_dict or model; "
        f"its keys: {keys}. Save one with {SAVE_LINE}"
    )


def _all_tensors(mapping: Mapping[Any, Any]) -> bool:
    return bool(mapping) and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in mapping.items())
