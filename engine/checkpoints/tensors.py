"""What the formats share: prefixes, layer counts, the check of names and shapes, tied heads."""

import re
from collections.abc import Collection, Mapping

import torch

WRAPPER_PREFIXES = ("_orig_mod.", "module.")


def strip_prefixes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names without what ``torch.compile`` and data-parallel wrappers put before them.

    Raises:
        ValueError: two names become one.
    """
    stripped: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        short = name
        while short.startswith(WRAPPER_PREFIXES):
            short = short.removeprefix("_orig_mod.").removeprefix("module.")
        if short in stripped:
            raise ValueError(f"the checkpoint holds {short} twice, once under a wrapper's prefix ({name})")
        stripped[short] = tensor
    return stripped


def count_layers(names: Collection[str], stem: str) -> int:
    """Layers under ``stem``: 1 + the largest index in names such as ``{stem}{index}.rest``, 0 where there is none."""
    pattern = re.compile(re.escape(stem) + r"(\d+)\.")
    return 1 + max((int(match[1]) for name in names if (match := pattern.match(name))), default=-1)


def check_tensors(what: str, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that are missing, left over or misshapen, naming each with both shapes.

    Args:
        what: the checkpoint in words, for the error.
        tensors: what was found.
        expected: name -> shape of every tensor that has to be there.

    Raises:
        ValueError: with every problem, the first twelve in full.
    """
    problems = []
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            problems.append(f"{name} is missing, expected shape {list(expected[name])}")
        elif name not in expected:
            problems.append(f"{name} is not part of this model, shape {list(tensors[name].shape)}")
        elif tuple(tensors[name].shape) != expected[name]:
            problems.append(f"{name} has shape {list(tensors[name].shape)}, expected {list(expected[name])}")
        elif not tensors[name].is_floating_point():
            problems.append(f"{name} holds {tensors[name].dtype}, expected a floating-point type")
    if problems:
        more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ValueError(f"{what} does not fit the model: " + "; ".join(problems[:12]) + more)


def share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the two are one tensor in memory, seen the same way."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def bias_or_zeros(bias: torch.Tensor | None, weight: torch.Tensor, size: int) -> torch.Tensor:
    """``bias``, or ``size`` zeros in the dtype and on the device of ``weight`` where the model has none."""
    return weight.new_zeros(size) if bias is None else bias
