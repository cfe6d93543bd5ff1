"""safetensors files: named tensors, memory-mapped, no code."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


def read_safetensors(path: Path, keep: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
    """The tensors of one file whose names ``keep`` accepts, on the CPU, as views of the mapped file.

    Raises:
        ValueError: the file is truncated, corrupt or not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys() if keep(name)}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).strip() or type(error).__name__
        raise ValueError(
            f"{path} cannot be read: it is truncated, corrupt, or not a safetensors file ({reason})"
        ) from error
