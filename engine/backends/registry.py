"""Which backends there are, and which one ``auto`` takes and why."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.backends.base import Backend


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend with the settings that "auto" became, and one line on why."""

    backend: type[Backend]
    dtype: str
    device: str
    reason: str


def _load_torch() -> type[Backend]:
    from engine.backends.torch_backend import TorchBackend

    return TorchBackend


def _load_triton() -> type[Backend]:
    from engine.backends.triton_backend import TritonBackend

    return TritonBackend


def _load_triton_interpret() -> type[Backend]:
    from engine.backends.triton_backend import TritonInterpretBackend

    return TritonInterpretBackend


BACKENDS: dict[str, Callable[[], type[Backend]]] = {
    "torch": _load_torch,
    "triton": _load_triton,
    "triton-interpret": _load_triton_interpret,
}
"""Name -> a function that imports the adapter, so that naming a backend does not load the others."""


def default_device() -> tuple[str, str]:
    """The device that ``auto`` means for the torch backend here, and why."""
    if torch.cuda.is_available():
        return "cuda", "PyTorch sees a GPU"
    if torch.backends.mps.is_available():
        return "mps", "PyTorch sees an Apple GPU"
    return "cpu", "PyTorch sees no GPU"


def choose(backend: str = "auto", dtype: str = "auto", device: str = "auto") -> Choice:
    """Settle every "auto".

    Raises:
        ValueError: the backend is not known, with those that are.
    """
    name = "torch" if backend == "auto" else backend
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose from auto, {', '.join(BACKENDS)}")
    adapter = BACKENDS[name]()
    where, why = default_device()
    if where not in adapter.devices:
        where, why = adapter.devices[0], f"the {name} backend runs on {', '.join(adapter.devices)}"
    reasons = ["the only one in this version"] if backend == "auto" else ["asked for"]
    reasons += [why] if device == "auto" else []
    reasons += ["float32 gives the reference's own tokens"] if dtype == "auto" else []
    chosen_dtype = "float32" if dtype == "auto" else dtype
    return Choice(adapter, chosen_dtype, where if device == "auto" else device, "; ".join(reasons))
